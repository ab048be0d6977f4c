"""Errors in files of weights, each in one line of a terminal."""

from rwkv_jax.errors import UserError


class WeightsError(UserError):
    """A file of weights that cannot be read or written."""


def shown(text: object) -> str:
    """A name or message from a file or a library, made fit for an error message: escaped, cut to 80
    characters and without its full stop.

    A file's author chooses its names, line ends and control sequences included.
    """
    cut = str(text)[:80].rstrip(". ")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)
