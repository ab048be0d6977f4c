"""What a user can cause and mend, told in one line."""

import argparse
import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn


class UserError(ValueError):
    """Bad input. The message is one line: it names the thing that is wrong and the remedy."""


PREDICTS_NAN = (
    "the model predicts NaN: its weights are damaged, or too large for the compute type; take"
    " another copy, or float32"
)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C as KeyboardInterrupt, also where a library has made an error of its own of it: an
    import that it hits raises ImportError, and JAX, where it compares two cache keys, ValueError
    with the traceback in its text."""
    try:
        yield
    except Exception as error:
        if _comes_of_ctrl_c(error):
            raise KeyboardInterrupt from error
        raise


def _comes_of_ctrl_c(error: BaseException | None) -> bool:
    """Whether a KeyboardInterrupt is the error, or its cause, or what was handled when it came."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt) or "KeyboardInterrupt" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def held_interrupts() -> Iterator[Callable[[], None]]:
    """Holds a Ctrl-C back until the function that it yields is called, or the context ends, and
    raises KeyboardInterrupt there; the second Ctrl-C raises at once.

    Python itself raises wherever it happens to be, which may be inside a finaliser, where it drops
    the exception, or inside a library that makes another error of it, as JAX does.
    """
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or not _in_main_thread():
        yield check  # somebody else's to handle
        return
    signal.signal(signal.SIGINT, press)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
    check()


@contextlib.contextmanager
def within_memory(remedy: str) -> Iterator[None]:
    """Turns an allocation that fails, Python's or JAX's, into one line."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # JAX's errors are RuntimeErrors
        reason = str(error).splitlines()[0] if str(error) else "MemoryError"
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in reason:
            raise UserError(f"not enough memory ({reason[:120]}); {remedy}") from error
        raise


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def lost_output(error: OSError, program: str) -> None:
    """The last word of a program whose output or files have gone, or are not for it: a full disk, a
    folder removed, no permission."""
    what = error.filename or "the output"
    barred = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    needed = "you may read it, or write there" if barred else "it is there and has room"
    remedy = f"see that {needed}, and start again"
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
