"""What a user can cause and mend, told in one line."""

import argparse
import contextlib
import os
import sys
from typing import NoReturn


class UserError(ValueError):
    """Bad input. The message is one line: it names the thing that is wrong and the remedy."""


def lost_output(error: OSError, program: str) -> None:
    """The last word of a program whose output or files have gone: a full disk, a folder removed."""
    what = error.filename or "the output"
    remedy = "see that it is there and has room, and start again"
    print(f"{program}: {what}: {error.strerror}; {remedy}", file=sys.stderr)
    # What could not be written is still in the buffer: Python would try, and complain, once more.
    with contextlib.suppress(AttributeError, OSError):  # it may be closed, or no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Parser(argparse.ArgumentParser):
    """A command line whose errors are one line, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit code 2."""
        self.exit(2, f"{self.prog}: {message}; see --help\n")
