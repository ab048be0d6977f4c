"""Containers of arrays (or of specs, shapes, labels): frozen dataclasses that JAX takes as trees.

`jax.export` serialises programs that take or return them. Their `repr` has shapes, not numbers.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeVar, dataclass_transform

import jax
from jax import export

Class = TypeVar("Class", bound=type)


def static() -> Any:
    """A field that is part of the tree's structure, not one of its leaves."""
    return dataclasses.field(metadata={"static": True})


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def container(cls: Class) -> Class:
    """Makes a class a container. `x.replace(name=value)` copies one with other fields."""
    methods = {"__repr__": lambda self: _call(self, vars(self)), "replace": dataclasses.replace}
    for name, method in methods.items():
        if name not in vars(cls):
            setattr(cls, name, method)
    made = dataclasses.dataclass(frozen=True, repr=False)(cls)
    jax.tree_util.register_dataclass(made)
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
