"""What official models are sampled with, and what the names of their files say.

Sampling: `chat` is that of `API_DEMO_CHAT.py` in BlinkDL/ChatRWKV, `text` that of PyPI `rwkv`, the
others are those of the official evaluations of G1 models (2026), with and without a thought and for
calls of tools.

Names: `rwkv7-g1h-1.5b-20260710-ctx10240.pth` is architecture, training data, parameters, date and
context. Later letters are later data: since G1h the flower template is trained.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from rwkv_jax.errors import UserError
from rwkv_jax.sampling.settings import Sampling

PRESETS = {
    "text": Sampling(),
    "chat": Sampling(top_p=0.3, presence_penalty=0.5, frequency_penalty=0.5),
    "think": Sampling(0.96, 0.76, 32, 1.0, 0.1, 0.988),
    "answer": Sampling(1.0, 0.28, 32, 0.0, 0.0),
    "tool": Sampling(temperature=0.0, presence_penalty=0.0, frequency_penalty=0.0),
}
"""Their penalties, too, start from zero in each reply."""


def preset(name: str) -> Sampling:
    """The preset of that name. Raises `UserError`."""
    if name not in PRESETS:
        raise UserError(f"preset {name}: one of {', '.join(PRESETS)}")
    return PRESETS[name]


def sampling_of(given: Sampling | str | None) -> Sampling:
    """The settings given, by the name of a preset or as they are; without any, those of `text`.

    Raises `UserError`.
    """
    if isinstance(given, Sampling):
        return given
    if given is None or isinstance(given, str):
        return preset("text" if given is None else given)
    raise UserError(f"sampling {given!r:.60}: a Sampling, or one of {', '.join(PRESETS)}")


FLOWER_DATA, FLOWER_DATE = (1, "h"), "2026-07"
"""The data and the month from which on the flower template is trained."""


@dataclass(frozen=True)
class Release:
    """What the name of an official file says; empty where it says nothing.

    >>> print(release_of(Path("rwkv7-g1h-1.5b-20260710-ctx10240.pth")))
    G1h 1.5B of 2026-07-10
    """

    data: str = ""
    size: str = ""
    date: str = ""

    def __str__(self) -> str:
        of = f"of {self.date}" if self.date else ""
        return " ".join(filter(None, [self.data, self.size, of]))

    @property
    def template(self) -> str:
        """The name of the newest chat template that was trained; empty if that is not known."""
        if found := re.fullmatch(r"G(\d)([a-z]?)\d*", self.data):
            number, letter = int(found[1]), found[2]
            return "flower" if (number, letter) >= FLOWER_DATA else "g1"
        if self.data == "World":
            return "world"
        return "flower" if self.date >= FLOWER_DATE else ""


def release_of(path: Path) -> Release | None:
    """The release that a file or one of the folders around it is named after; None if none is."""
    for name in [path.name, *(folder.name for folder in path.parents)][:4]:
        name = name.lower()
        data = re.search(r"(?<![a-z0-9])(g\d[a-z]?\d*|world)(?![a-z0-9])", name)
        date = re.search(r"(?<!\d)(20\d\d)(0[1-9]|1[0-2])([0-3]\d)(?!\d)", name)
        if "rwkv" in name and (data or date):
            size = re.search(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)b(?![a-z0-9])", name)
            return Release(
                data[1].capitalize() if data else "",
                f"{size[1]}B" if size else "",
                "-".join(date.groups()) if date else "",
            )
    return None
