"""The process behind `harness.Worker`: answers JSON requests, one a line, until its input ends.

A worker imports only the standard library before `serve`, so that a peer's missing package is a
message and not a traceback. Whatever a library prints goes to stderr: stdout is the channel.
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
    """Calls `start(options)` with the first line, sends what it reports, then answers requests."""
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
    """The versions of Python and of those `packages` that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
