"""Which axis of an array is parted over which axis of the mesh: the one place that knows both.

    mesh axis   parts                                                  what travels
    data        the batch                                              gradients
    fsdp        the batch; parameters, gradients and optimizer         parameters, layer by layer;
                                                                       gradients
    tensor      heads, the channel mix's hidden width, the vocabulary  a sum of the activations
                                                                       twice a layer
    sequence    time                                                   the state, the last token

The mesh has explicit axes: an array's type says how it is parted, types follow through a program as
shapes do, and what has to travel is written down where it does (`gather`, `rwkv_jax.nn.linear`).
Without a mesh nothing of this does anything.
"""

import contextlib
import math
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from rwkv_jax.remat import GATHERED
from rwkv_jax.typing import Array, Callable, PyTree

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "time": ("sequence",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "channels": ("tensor", "fsdp"),
}
"""Logical axis -> mesh axes. `channels` are those of heads in a parameter that has no `embed`, and
the columns of a table that is looked up."""

FSDP, SEQUENCE = "fsdp", "sequence"
"""The mesh axes over which parameters lie in parts, and are brought together to be used; and over
which time is parted."""


def spec(
    axes: tuple[str | None, ...], mesh: Mesh | AbstractMesh, shape: tuple[int, ...] | None = None
) -> PartitionSpec:
    """How an array with these logical axes is parted over the mesh; with its `shape`, an axis that
    its devices do not divide is whole on each."""
    parts = [tuple(m for m in RULES[axis] if m in mesh.axis_names) if axis else () for axis in axes]
    if shape:
        devices = [math.prod(mesh.shape[name] for name in part) for part in parts]
        divides = [size % count == 0 for size, count in zip(shape, devices, strict=True)]
        parts = [part if divided else () for part, divided in zip(parts, divides, strict=True)]
    return PartitionSpec(*(part[0] if len(part) == 1 else part or None for part in parts))


def gather(tree: PyTree, dtype: Any = None) -> PyTree:
    """Parameters as they are used: no longer parted over `fsdp`. With `dtype`, cast to it first, so
    that half as many bytes travel."""
    if FSDP not in jax.sharding.get_abstract_mesh().explicit_axes:
        return tree
    return jax.tree.map(partial(_gather, dtype=dtype), tree)


def _gather(x: Array, dtype: Any) -> Array:
    parts = [names_of(part) for part in jax.typeof(x).sharding.spec]
    if not any(FSDP in part for part in parts):
        return x
    kept = [tuple(name for name in part if name != FSDP) or None for part in parts]
    x = x if dtype is None else x.astype(dtype)
    return checkpoint_name(jax.reshard(x, PartitionSpec(*kept)), GATHERED)


def names_of(part: Any) -> tuple[str, ...]:
    """One entry of a partition spec as the mesh axes it names."""
    return (part,) if isinstance(part, str) else tuple(part or ())


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """The context in which a program is for this mesh; None: for one device."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def put_global(x: Any, place: NamedSharding) -> Array:
    """An array that every process has, parted over the devices of all."""
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, place, lambda part: host[part])


def time_axis() -> str | None:
    """The `mesh_axis` of models and operators: that of time, if the mesh in context has it."""
    return SEQUENCE if SEQUENCE in jax.sharding.get_abstract_mesh().axis_names else None


def reshard_like(x: Array, other: Any) -> Array:
    """`x` parted as the type of `other`, over explicit axes."""
    return jax.reshard(x, jax.typeof(other).sharding.spec) if is_explicit() else x


def shard_rows_like(tokens: Array, x: Array) -> Array:
    """`x` [layers, b, ...] with its rows parted as those of `tokens`."""
    rows = jax.typeof(tokens).sharding.spec[0]
    return jax.reshard(x, PartitionSpec(None, rows)) if is_explicit() else x


def shard_batch(state: PyTree) -> PyTree:
    """States [layers, b, ...] with their rows over the devices of the batch."""
    if not is_explicit():
        return state
    rows = spec((None, "batch"), jax.sharding.get_abstract_mesh())
    return jax.tree.map(lambda x: jax.reshard(x, rows), state)


def replicate(x: Array) -> Array:
    """`x` on every device."""
    return jax.reshard(x, PartitionSpec()) if is_explicit() else x


def is_explicit() -> bool:
    """Whether types say how arrays are parted."""
    return bool(jax.sharding.get_abstract_mesh().explicit_axes)


def is_manual(axis: str) -> bool:
    """Whether the caller runs inside a `jax.shard_map` over this axis, and sees its own part."""
    return axis in jax.sharding.get_abstract_mesh().manual_axes


def is_automatic(axis: str) -> bool:
    """Whether what is parted over this axis is neither the type's to say nor the caller's; also of
    an axis that there is not."""
    mesh = jax.sharding.get_abstract_mesh()
    return axis not in mesh.manual_axes and axis not in mesh.explicit_axes


def shard_time(x: Array, axis: str) -> Array:
    """`x` [b, t], its time parted over this explicit axis."""
    return jax.reshard(x, PartitionSpec(jax.typeof(x).sharding.spec[0], axis))


def over_devices(run: Callable, in_specs: tuple, out_specs: Any, *given: Array | None) -> Any:
    """`run(*given)` on every device of its part, over all explicit axes; arrays that are parted in
    another way are brought to their spec first."""
    mapped = jax.shard_map(
        run,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(jax.sharding.get_abstract_mesh().explicit_axes),
        check_vma=False,
    )
    return mapped(*map(jax.reshard, given, in_specs))


@cache
def named(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """The sharding of an array with these logical axes."""
    return NamedSharding(mesh, spec(axes, mesh))
