"""Errors in files of weights, each in one line of a terminal."""

from rwkv_jax.errors import UserError


class WeightsError(UserError):
    """A file of weights that cannot be read or written."""


ZERO = (
    "part of a DeepSpeed checkpoint; run zero_to_fp32.py, which lies in its folder (python"
    " zero_to_fp32.py . model.pth), and give the file that it makes"
)


def shown(text: object) -> str:
    """A name or message from a file or a library, made fit for an error message: escaped, cut to 80
    characters and without its full stop.

    A file's author chooses its names, line ends and control sequences included.
    """
    return escaped(str(text)[:80].rstrip(". "))


def escaped(text: str) -> str:
    """A text in one line: what is not printable is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
