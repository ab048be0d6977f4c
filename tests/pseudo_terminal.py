"""Stand-ins for a person at a terminal: typed lines, and a pseudo-terminal for a whole program."""

import builtins
import contextlib
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]

# The process that opens a terminal first in a new session gets its Ctrl-C. The default handler is
# restored, because shells ignore SIGINT in the background, where the suite may run.
TAKE = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL);"
    " os.open(os.ttyname(0), os.O_RDWR); os.execv(sys.argv[1], sys.argv[1:])"
)


class Typist:
    """Stands in for the keyboard: what is typed line by line, then Ctrl-D; or Ctrl-C."""

    def __init__(self, monkeypatch, *lines):
        self._lines = list(lines)
        monkeypatch.setattr(builtins, "input", self)

    def __call__(self, prompt):
        if not self._lines:
            raise EOFError
        line = self._lines.pop(0)
        if line is KeyboardInterrupt:
            raise line
        return line


class Screen:
    """A program on a terminal: what is typed, and what was shown since it was last looked at."""

    def __init__(self, master, process):
        self._master, self._process = master, process
        self._text = b""

    def type(self, keys):
        os.write(self._master, keys)

    def until(self, pattern, seconds=120):
        deadline = time.monotonic() + seconds
        while not re.search(pattern.encode(), self._text, re.DOTALL):
            left = deadline - time.monotonic()
            assert left > 0, f"no {pattern} in {self._text[-500:]!r}"
            if select.select([self._master], [], [], min(left, 1))[0]:
                self._text += os.read(self._master, 65536)
        self._text = b""

    def exit_code(self):
        return self._process.wait(30)


@contextlib.contextmanager
def on_a_terminal(*arguments):
    """The `Screen` of a Python program, which ends with the context."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TAKE, sys.executable, *arguments],
        cwd=ROOT,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    try:
        yield Screen(master, process)
    finally:
        process.kill()
        process.wait()
        os.close(master)
