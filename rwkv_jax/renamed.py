"""Names that changed: the old one raises an `AttributeError` that gives the new one."""

from collections.abc import Callable, Mapping
from typing import NoReturn


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], NoReturn]:
    """The `__getattr__` of a module whose public names changed, old to new."""

    def missing(name: str) -> NoReturn:
        now = f"; it is now {names[name]}" if name in names else ""
        raise AttributeError(f"module {module!r} has no attribute {name!r}{now}")

    return missing
