"""Logical-axis sharding: maps logical array axes to mesh axes, and shards computations by them.

    mesh axis   shards                                           what travels
    data        the batch                                        gradients
    fsdp        the batch; parameters, gradients and             parameters, layer by layer;
                optimizer state                                  gradients
    tensor      heads, the channel mix's hidden width, the       a sum of activations, twice a layer
                vocabulary
    sequence    time                                             WKV states, the last token's `x`

Meshes have explicit axes: an array's type says how it is sharded (`jax.typeof(x).sharding.spec`),
and types follow through a program as shapes do. Parameters are placed by their logical axes
(`RULES`, `spec`). Communication is written down where it happens: `gather` for parameters that
`fsdp` shards, `out_sharding` in `rwkv_jax.nn.linear`, and `mapped` where devices have to exchange
something that XLA cannot see.

`mapped` is the one way into `jax.shard_map`. It names axes by letters (`rwkv_jax.typing`), and
reads off the arrays' types which mesh axis shards which letter:

    axes = axes_of(("btc", "bc"), (x, last))            # {"b": "data"}, say
    mapped(token_shift, ("btc", "bc"), ("btc", "bc"), axes | {"t": "sequence"})(x, last)

Without a mesh every function here is a no-op.
"""

import contextlib
import math
from collections.abc import Mapping
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
"""Logical axis -> mesh axes. `channels` are those of heads in a parameter without an `embed` axis,
and the columns of an embedding table."""

FSDP, SEQUENCE = "fsdp", "sequence"
"""The mesh axes that shard parameters (gathered before use) and time."""

Axis = str | tuple[str, ...] | None
"""An entry of a `PartitionSpec`: the mesh axis, or axes, that shard an array axis."""


# Placement: parameters, states and batches on a mesh.


def spec(
    axes: tuple[str | None, ...], mesh: Mesh | AbstractMesh, shape: tuple[int, ...] | None = None
) -> PartitionSpec:
    """The `PartitionSpec` of an array with these logical axes; with its `shape`, an axis that the
    devices do not divide is replicated."""
    names = [tuple(m for m in RULES[axis] if m in mesh.axis_names) if axis else () for axis in axes]
    if shape:
        counts = [math.prod(mesh.shape[name] for name in part) for part in names]
        fits = [size % count == 0 for size, count in zip(shape, counts, strict=True)]
        names = [part if fit else () for part, fit in zip(names, fits, strict=True)]
    return PartitionSpec(*(part[0] if len(part) == 1 else part or None for part in names))


@cache
def named(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """The sharding of an array with these logical axes."""
    return NamedSharding(mesh, spec(axes, mesh))


def put_global(x: Any, place: NamedSharding) -> Array:
    """A global array, sharded as `place` says, from a host array that every process has."""
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, place, lambda index: host[index])


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """`jax.set_mesh`; nothing where there is no mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


# Within a program: what the types say, and changes of it.


def is_explicit(axis: str | None = None) -> bool:
    """Whether this axis of the mesh in context (None: any axis) is explicit, so that types say what
    it shards."""
    axes = jax.sharding.get_abstract_mesh().explicit_axes
    return axis in axes if axis else bool(axes)


def is_manual(axis: str) -> bool:
    """Whether the caller runs inside a `jax.shard_map` over this axis and sees its own shard."""
    return axis in jax.sharding.get_abstract_mesh().manual_axes


def check_axis(operator: str, axis: str, length: int) -> None:
    """Raises `ValueError` if there is no such mesh axis, or it does not divide the length."""
    mesh = jax.sharding.get_abstract_mesh()
    if axis not in mesh.axis_names:
        known = ", ".join(map(repr, mesh.axis_names))
        there = f"the mesh has {known}" if known else "no mesh is set; call jax.set_mesh(mesh)"
        raise ValueError(f"{operator}: no mesh axis {axis!r}: {there}")
    devices = mesh.shape[axis]
    if length % devices:
        below, above = length - length % devices, length + -length % devices
        nearest = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"{operator}: {length} tokens cannot be split evenly over the {devices} devices of"
            f" mesh axis {axis!r}; the nearest length that can is {nearest}"
        )


def time_axis() -> str | None:
    """The mesh axis that shards time, if the mesh in context has it: models' `mesh_axis`."""
    return SEQUENCE if SEQUENCE in jax.sharding.get_abstract_mesh().axis_names else None


def names_of(axis: Axis) -> tuple[str, ...]:
    """One entry of a `PartitionSpec` as a tuple of mesh axes."""
    return (axis,) if isinstance(axis, str) else tuple(axis or ())


def gather(tree: PyTree, dtype: Any = None) -> PyTree:
    """All-gather parameters over `fsdp`, for use. With `dtype`, cast first, so that half as many
    bytes travel."""
    if not is_explicit(FSDP):
        return tree
    return jax.tree.map(partial(_gather, dtype=dtype), tree)


def _gather(x: Array, dtype: Any) -> Array:
    axes = [names_of(axis) for axis in jax.typeof(x).sharding.spec]
    if not any(FSDP in names for names in axes):
        return x
    kept = [tuple(name for name in names if name != FSDP) or None for names in axes]
    x = x if dtype is None else x.astype(dtype)
    return checkpoint_name(jax.reshard(x, PartitionSpec(*kept)), GATHERED)


def reshard_like(x: Array, other: Any) -> Array:
    """`x` sharded as the type of `other` is."""
    return jax.reshard(x, jax.typeof(other).sharding.spec) if is_explicit() else x


def replicate(x: Array) -> Array:
    """`x` in full on every device."""
    return jax.reshard(x, PartitionSpec()) if is_explicit() else x


def shard_rows_alike(tokens: Array, blocks: PyTree) -> tuple[Array, PyTree]:
    """Tokens [b, t] and a state's blocks ([layers, b, ...], or a tuple of layers [b, ...]) with
    their rows sharded alike: as those of the tokens or, if these are replicated, of the state."""
    if not is_explicit():
        return tokens, blocks
    dims = "b" if isinstance(blocks, tuple) else "lb"
    rows = axes_of(("bt", dims), (tokens, blocks)).get("b")
    shard = partial(_shard_dim, dim=dims.index("b"), axis=rows)
    return _shard_dim(tokens, 0, rows), jax.tree.map(shard, blocks)


def shard_batch(states: PyTree) -> PyTree:
    """States [layers, b, ...] with their rows sharded by the rule for the batch."""
    if not is_explicit():
        return states
    rows = spec(("batch",), jax.sharding.get_abstract_mesh())[0]
    return jax.tree.map(lambda x: jax.reshard(x, PartitionSpec(None, rows)), states)


def shard_time(x: Array, axis: str) -> Array:
    """`x` [b, t] with its time sharded over an explicit mesh axis."""
    return _shard_dim(x, 1, axis)


def _shard_dim(x: Array, dim: int, axis: Axis) -> Array:
    place = list(jax.typeof(x).sharding.spec)
    place[dim] = axis
    return jax.reshard(x, PartitionSpec(*place))


# Computations of one device: `shard_map` by the letters of axes.


def axes_of(letters: PyTree, arrays: PyTree) -> dict[str, Axis]:
    """Which explicit mesh axes shard each letter, read off the arrays' types.

    `letters` is a prefix of the tree `arrays`: a string for each array (or tree of arrays), one
    letter an axis. Letters that nothing shards are left out; where arrays differ, the first wins.
    """
    found: dict[str, Axis] = {}

    def read(dims: str, tree: PyTree) -> None:
        for x in jax.tree.leaves(tree):
            axes = zip(dims, jax.typeof(x).sharding.spec, strict=False)
            found.update({d: axis for d, axis in axes if names_of(axis) and d not in found})

    jax.tree.map(read, letters, arrays)
    return found


def mapped(
    run: Callable, in_axes: PyTree, out_axes: PyTree, axes: Mapping[str, Axis]
) -> Callable[..., Any]:
    """`run` on each device, with that device's shards as arguments.

    `in_axes` and `out_axes` are prefixes of the arguments and results, trees of strings with one
    letter an axis ("" for a scalar). `axes` says which mesh axes shard a letter; a letter it lacks
    is replicated. Arguments that are sharded otherwise over explicit axes are resharded first.
    """
    explicit = set(jax.sharding.get_abstract_mesh().explicit_axes)

    def of(dims: str) -> PartitionSpec:
        return PartitionSpec(*(axes.get(letter) for letter in dims))

    in_specs, out_specs = jax.tree.map(of, in_axes), jax.tree.map(of, out_axes)
    on_shards = jax.shard_map(
        run,
        in_specs=in_specs,
        out_specs=out_specs,
        # All explicit axes: outside of `jit`, JAX maps over all of them or none.
        axis_names=explicit | {name for axis in axes.values() for name in names_of(axis)},
        check_vma=False,
    )

    def reshard(place: PartitionSpec, tree: PyTree) -> PyTree:
        own = PartitionSpec(*(axis if set(names_of(axis)) <= explicit else None for axis in place))
        return jax.tree.map(lambda x: jax.reshard(x, own), tree)

    def resharded(*args: Any) -> Any:
        return on_shards(*jax.tree.map(reshard, in_specs, args))

    return resharded if explicit else on_shards
