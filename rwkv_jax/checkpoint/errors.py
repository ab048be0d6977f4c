"""What goes wrong with files of weights, in words fit for one line of a terminal."""

from rwkv_jax.errors import UserError


class WeightsError(UserError):
    """A file of weights that cannot be read or written."""


def shown(said: object) -> str:
    """What a file or a library says, for a message: escaped, cut short and without its full stop.

    A file's author chooses its names, line ends and control sequences included.
    """
    text = str(said)[:80].rstrip(". ")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
