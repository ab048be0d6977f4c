"""What a user can cause and mend, told in one line."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import NoReturn


class UserError(ValueError):
    """Bad input. The message is one line: it names the thing that is wrong and the remedy."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C as KeyboardInterrupt, also where a library has made an error of its own of it: JAX
    raises ValueError, with the traceback in its text, of one that hits the comparison of two cache
    keys."""
    try:
        yield
    except Exception as error:
        if "KeyboardInterrupt" in str(error):
            raise KeyboardInterrupt from error
        raise


def lost_output(error: OSError, program: str) -> None:
    """The last word of a program whose output or files have gone: a full disk, a folder removed."""
    what = error.filename or "the output"
    remedy = "see that it is there and has room, and start again"
    print(f"{program}: {what}: {error.strerror}; {remedy}", file=sys.stderr)
    abandon_stdout()


def abandon_stdout() -> None:
    """Lets what is still in stdout's buffer go nowhere: at exit Python would try to write it, and
    complain, once more."""
    with contextlib.suppress(AttributeError, OSError):  # it may be closed, or no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Parser(argparse.ArgumentParser):
    """A command line whose errors are one line, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit code 2."""
        self.exit(2, f"{self.prog}: {message}; see --help\n")
