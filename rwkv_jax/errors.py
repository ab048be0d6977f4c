"""Errors that a user can cause and fix, each reported in one line."""

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """Bad input. The message is one line: it names the thing that is wrong and the remedy."""


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
