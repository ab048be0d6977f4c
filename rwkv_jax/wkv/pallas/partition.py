"""Work that is independent for each row and head, on shards across devices and under `vmap`.

A kernel's program computes one row and one head (or one tile of heads). XLA cannot see that in a
custom call, so it is declared here: a mesh that shards rows or heads, explicitly or not, gives each
device a kernel of its own (`custom_partitioning`), and `vmap` adds rows.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, Sharding

from rwkv_jax.typing import Array, Callable, PyTree

Flat = Callable[..., tuple[Array, ...]]


def partitioned(
    call: Callable[[Any], Any],
    inputs: PyTree,
    letters: PyTree,
    out_letters: PyTree,
    multiple: Callable[[int], int],
    *,
    platform: str,
) -> Any:
    """`call(inputs)`, on each device's rows and heads.

    `letters` has a string for each array of `inputs`, or one for a subtree, with a letter for each
    dimension: b rows, h heads or channels, m heads of k numbers each; others are never sharded.
    `out_letters` has one for each output. The first input has b and h. A device's h heads are
    padded with zeros to a multiple of `multiple(h)` before `call` gets them.

    XLA for TPUs cannot partition custom calls: there the operator runs inside a `shard_map`
    (`needs_shard_map`).
    """
    arrays, tree = jax.tree.flatten(inputs)
    operands = jax.tree.leaves(jax.tree.broadcast(letters, inputs))
    results, out_tree = jax.tree.flatten(out_letters)

    def flat(*arrays: Array) -> tuple[Array, ...]:
        return tuple(jax.tree.leaves(call(tree.unflatten(arrays))))

    whole = _in_multiples(flat, operands, results, multiple)
    sharded = _sharded(whole, operands, results) if platform == "cuda" else whole

    @custom_vmap
    def run(*arrays: Array) -> tuple[Array, ...]:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.manual_axes and not auto_axes(mesh):
            # custom_partitioning assumes that some axis is left to partition over.
            return whole(*arrays)
        return tuple(sharded(*arrays))

    @run.def_vmap
    def _(size: int, batched: list[bool], *arrays: Array) -> tuple:
        folded = []
        for dims, is_batched, x in zip(operands, batched, arrays, strict=True):
            if not is_batched:
                x = jnp.broadcast_to(x[None], (size, *x.shape))
            row = dims.index("b")
            x = jnp.moveaxis(x, 0, row)
            folded.append(x.reshape(*x.shape[:row], -1, *x.shape[row + 2 :]))
        out = []
        for dims, x in zip(results, run(*folded), strict=True):
            row = dims.index("b")
            x = x.reshape(*x.shape[:row], size, -1, *x.shape[row + 1 :])
            out.append(jnp.moveaxis(x, row, 0))
        return tuple(out), (True,) * len(out)

    return out_tree.unflatten(run(*arrays))


def _in_multiples(
    call: Flat, operands: list[str], results: list[str], multiple: Callable[[int], int]
) -> Flat:
    """`call` with heads padded to the multiple that it needs."""

    def resized(x: Array, dims: str, old: int, new: int) -> Array:
        axis = max(dims.find("h"), dims.find("m"))
        if axis < 0:
            return x
        size = x.shape[axis] // old * new
        if new < old:
            return lax.slice_in_dim(x, 0, size, axis=axis)
        return jnp.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)])

    def run(*arrays: Array) -> tuple[Array, ...]:
        h = arrays[0].shape[operands[0].index("h")]
        padded = h + -h % multiple(h)
        if padded == h:
            return call(*arrays)
        given = (resized(x, dims, h, padded) for x, dims in zip(arrays, operands, strict=True))
        out = zip(call(*given), results, strict=True)
        return tuple(resized(x, dims, padded, h) for x, dims in out)

    return run


def _sharded(call: Flat, operands: list[str], results: list[str]) -> Flat:
    """`call` on each device's rows and heads, as the first operand's sharding has them."""

    def partition(mesh: Mesh, arguments: Any, outputs: Any) -> tuple:
        def shardings(each: list[str]) -> tuple[Sharding, ...]:
            return tuple(_like_first(arguments[0].sharding, operands[0], dims) for dims in each)

        return mesh, call, shardings(results), shardings(operands)

    rule = f"{', '.join(map(' '.join, operands))} -> {', '.join(map(' '.join, results))}"
    factors = dict.fromkeys(x for x in rule if x.isalpha())  # in the order that they appear in
    sharded = custom_partitioning(call)
    sharded.def_partition(
        partition=partition,
        sharding_rule=rule,
        need_replication_factors=tuple(x for x in factors if x not in "bh"),
        # Decoded shardings name mesh axes, which do not exist inside a shard_map, and exclude
        # shards of unequal size.
        decode_shardings=False,
    )
    return sharded


def _like_first(first: Any, first_dims: str, dims: str) -> Sharding:
    """The sharding of an array of `dims` that follows the rows and heads of the first operand.

    XLA describes a sharding by an array of devices, with an axis for each dimension and a last one
    for replicas.
    """
    form = first._to_xla_hlo_sharding(len(first_dims))
    if form.is_replicated():
        return first
    shards = form.tile_assignment_dimensions()
    devices = np.reshape(form.tile_assignment_devices(), shards)
    kept = [first_dims.index(x) for x in dims if x in "bh"]
    devices = devices.transpose(*kept, *(i for i in range(devices.ndim) if i not in kept))
    counts = [shards[first_dims.index(x)] if x in "bh" else 1 for x in dims]
    shape = ",".join(map(str, [*counts, devices.size // math.prod(counts)]))
    order = ",".join(map(str, devices.ravel()))
    form = type(form).from_string(f"{{devices=[{shape}]{order} last_tile_dim_replicate}}")
    # Devices in any order: XLA goes by their numbers.
    return type(first)(tuple(first.device_set), form)


def auto_axes(mesh: Any) -> list[str]:
    """The mesh axes of more than one device over which XLA partitions programs by itself."""
    return [axis for axis in mesh.auto_axes if mesh.shape[axis] > 1]
