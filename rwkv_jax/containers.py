"""Containers of arrays (or of specs, shapes, labels): flax's frozen dataclasses, which are pytrees.

Beyond flax's, `jax.export` serialises programs that take or return them, and their `repr` has
shapes, not numbers.
"""

import contextlib
import json
from collections.abc import Mapping
from typing import Any, TypeVar, dataclass_transform

from flax import struct
from jax import export

Class = TypeVar("Class", bound=type)


def static() -> Any:
    """A field that is part of the tree's structure, not one of its leaves."""
    return struct.field(pytree_node=False)


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def container(cls: Class) -> Class:
    """Makes a class a container. `x.replace(name=value)` copies one with other fields."""
    if "__repr__" not in vars(cls):
        cls.__repr__ = lambda self: _call(self, vars(self))  # pyright: ignore
    made = struct.dataclass(cls, repr=False)
    with contextlib.suppress(ValueError):  # the module is reloaded, and the name is taken
        export.register_pytree_node_serialization(
            made,
            serialized_name=f"{made.__module__}.{made.__qualname__}",
            serialize_auxdata=lambda static: json.dumps(list(static)).encode(),
            deserialize_auxdata=lambda data: tuple(json.loads(data)),
        )
    return made


def short(x: Any) -> str:
    """`float32[2, 64]` for an array, and `repr` for what is no container of arrays."""
    if hasattr(x, "_asdict"):  # a named tuple
        return _call(x, x._asdict())
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype}{list(x.shape)}"
    return f"({len(x)} x {short(x[0])})" if isinstance(x, tuple) and x else repr(x)


def _call(x: Any, fields: Mapping[str, Any]) -> str:
    return f"{type(x).__name__}({', '.join(f'{k}={short(v)}' for k, v in fields.items())})"
