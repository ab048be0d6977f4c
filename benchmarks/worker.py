"""The other end of `harness.Worker`: answers JSON requests, one a line, until input ends.

A worker imports nothing but the standard library before `serve`, so that a peer's missing package
is a message and not a traceback. Everything else a library prints goes to stderr: stdout is the
channel.
"""

import contextlib
import json
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

Handler = Callable[[dict], dict]


def serve(start: Callable[[dict], tuple[Handler, dict]]) -> None:
    """Call `start(options)` (the first line), report what it says, then answer each request."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(message: dict) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    options = json.loads(sys.stdin.readline())
    if options["threads"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options["threads"]])
    try:
        handle, about = start(options)
    except ImportError as error:
        return say({"missing": f"{error.name or error}"})
    say(about)
    for line in sys.stdin:
        say(handle(json.loads(line)))


def versions(*packages: str) -> dict[str, str]:
    """Versions of the installed ones among `packages`, and of Python."""
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
