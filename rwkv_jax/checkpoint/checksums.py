"""Checksums of arrays, so that a bit that flips on a disk is damage and not another model.

    sum over i of bits(x[i]) (2 i + 1)   mod 2**32

where `bits` are those of an element and i is its place in the array. A single bit that differs
changes the sum, as its factor is odd. The order of the additions does not matter: a sharded array
has the checksum of a whole one, and no element leaves its device.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rwkv_jax.params import path_name
from rwkv_jax.typing import Array, PyTree, Shaped


def checksums(tree: PyTree) -> list[int]:
    """One of each array, in the order of the tree's leaves. With a mesh in context on which they
    are, a collective."""
    leaves = jax.tree.leaves(tree)
    return np.asarray(_sums(leaves)).tolist() if leaves else []


def changed(tree: PyTree, expected: list[int]) -> str:
    """The name of the first array whose checksum is not the expected one; empty if all are."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    found = checksums(tree)
    if len(found) != len(expected):
        return f"{len(found)} arrays, not {len(expected)}"
    return next((n for n, x, y in zip(names, found, expected, strict=True) if x != y), "")


@jax.jit
def _sums(leaves: list[Array]) -> Shaped[Array, " n"]:
    return jnp.stack([_sum(x) for x in leaves])


def _sum(x: Array) -> Shaped[Array, ""]:
    size = x.dtype.itemsize
    bits = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    if size <= 4 and bits.dtype != jnp.uint8:
        bits = lax.bitcast_convert_type(bits, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size])
    elif size > 4:
        bits = lax.bitcast_convert_type(bits, jnp.uint32)  # a last axis of two words
    bits = bits.astype(jnp.uint32)
    factor = jnp.ones_like(bits)
    for axis in range(bits.ndim):
        step = math.prod(bits.shape[axis + 1 :]) % 2**32
        factor += lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(2 * step % 2**32)
    return jnp.sum(bits * factor, dtype=jnp.uint32)
