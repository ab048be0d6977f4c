"""Errors that a user can cause and fix, and remarks, each reported in one line."""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HERE = str(Path(__file__).parent) + os.sep


class UserError(ValueError):
    """Bad input. The message is one line: it names the thing that is wrong and the remedy."""


class Remark(UserWarning):
    """A warning for the user, in one line as a `UserError`; the work continues."""


def remark(text: str) -> None:
    """Warns with a `Remark`, at the line of the caller's own that called the library."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_code.co_filename.startswith(_HERE):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, Remark, stacklevel=level)


@contextlib.contextmanager
def printed_remarks(prog: str) -> Iterator[None]:
    """Prints each `Remark` on stderr as a command's line; other warnings are shown as usual."""
    # Without `catch_warnings`: filters that are set meanwhile stay.
    warnings.simplefilter("always", Remark)
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if issubclass(category, Remark):
            print(f"{prog}: {message}", file=sys.stderr)
        else:
            shown(message, category, *place)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown


PREDICTS_NAN = (
    "the model predicts NaN: its weights are damaged, or too large for the compute type; take"
    " another copy, or float32"
)


@contextlib.contextmanager
def within_memory(remedy: str) -> Iterator[None]:
    """Turns a failed allocation, Python's or JAX's, into a `UserError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # JAX's errors are RuntimeErrors
        reason = str(error).splitlines()[0] if str(error) else "MemoryError"
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in reason:
            raise UserError(f"not enough memory ({reason[:120]}); {remedy}") from error
        raise
