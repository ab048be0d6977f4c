"""The vocabulary of the GPU kernels' algebra: 2-D tiles, and the few operations that Pallas'
Triton backend lowers (products, iota, where, exp, sums along an axis).

A tile has a row for each token of a chunk, and a column for each channel of a head.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array, Float


class Precision(NamedTuple):
    """How a product is computed: the dtype that operands are cast to, if any, and XLA's name."""

    dtype: str | None
    algorithm: lax.Precision | lax.DotAlgorithmPreset


class Products(NamedTuple):
    """Products of tiles. All are summed in float32."""

    data: Precision
    """For tokens, scores and states."""
    exact: Precision
    """For sums of log decays and the inverse of a triangle, which must not be rounded."""

    def nn(self, x: Array, y: Array) -> Array:
        """x y"""
        return _dot(x, y, 1, 0, self.data)

    def nt(self, x: Array, y: Array) -> Array:
        """x y^T"""
        return _dot(x, y, 1, 1, self.data)

    def tn(self, x: Array, y: Array) -> Array:
        """x^T y"""
        return _dot(x, y, 0, 0, self.data)

    def exact_nn(self, x: Array, y: Array) -> Array:
        """x y, as exact as float32."""
        return _dot(x, y, 1, 0, self.exact)

    def exact_tn(self, x: Array, y: Array) -> Array:
        """x^T y, as exact as float32."""
        return _dot(x, y, 0, 0, self.exact)

    def exact_sums(self, which: Array, x: Array) -> Array:
        """Sums over the rows j of x for which `which` [i, j] holds, as exact as float32."""
        return self.exact_nn(jnp.where(which, 1.0, 0.0), x)

    def sums(self, which: Array, x: Array) -> Array:
        """The same sums in the precision of data."""
        return self.nn(jnp.where(which, 1.0, 0.0), x)


def _dot(x: Array, y: Array, x_axis: int, y_axis: int, precision: Precision) -> Array:
    if precision.dtype is not None:
        x, y = x.astype(precision.dtype), y.astype(precision.dtype)
    return lax.dot_general(
        x,
        y,
        (((x_axis,), (y_axis,)), ((), ())),
        precision=precision.algorithm,
        preferred_element_type=jnp.float32,
    )


class Starts(NamedTuple):
    """Factors, 1 or 0, for documents that start in the chunk."""

    sees_state: Array  # [C, 1]: rows of the document that the entering state belongs to
    reaches_end: Array  # [C, 1]: rows of the document that the chunk ends in
    carries_on: Array  # [1, 1]: no document starts in the chunk


class Rows(NamedTuple):
    """Which token and document the C rows of a tile belong to."""

    size: int  # C
    token: Array  # [C, C]: the row's token
    other: Array  # [C, C]: the column's token
    same: Array | None  # [C, C]: row and column are of one document; None if there is only one
    starts: Starts | None  # None if no document starts

    @property
    def before(self) -> Array:
        """[C, C]: the column's token comes before the row's."""
        return self.within(self.token > self.other)

    @property
    def upto(self) -> Array:
        """[C, C]: the column's token comes before the row's, or is the same."""
        return self.within(self.token >= self.other)

    def within(self, which: Array) -> Array:
        """`which`, only where row and column are of one document."""
        return which if self.same is None else which & self.same

    def at(self, token: int) -> Array:
        """[C, 1]: the row of one token."""
        return self.tokens == token

    @property
    def tokens(self) -> Array:
        """[C, 1]: each row's token."""
        return lax.broadcasted_iota(jnp.int32, (self.size, 1), 0)


def rows(size: int, counts: Float[Array, "1 C"] | None) -> Rows:
    """The rows of a chunk of `size` tokens. `counts` are how many documents have started in the
    chunk, up to and including each token."""
    token = lax.broadcasted_iota(jnp.int32, (size, size), 0)
    other = lax.broadcasted_iota(jnp.int32, (size, size), 1)
    if counts is None:
        return Rows(size, token, other, None, None)
    last = jnp.max(counts, axis=1, keepdims=True)
    mine = jnp.sum(jnp.where(token == other, counts, 0.0), axis=1, keepdims=True)
    starts = Starts(
        sees_state=jnp.where(mine == 0, 1.0, 0.0),
        reaches_end=jnp.where(mine == last, 1.0, 0.0),
        carries_on=jnp.where(last == 0, 1.0, 0.0),
    )
    return Rows(size, token, other, mine == counts, starts)


def sum_rows(x: Float[Array, "C n"]) -> Float[Array, "1 n"]:
    return jnp.sum(x, axis=0, keepdims=True)


def sum_lanes(x: Float[Array, "C n"]) -> Float[Array, "C 1"]:
    return jnp.sum(x, axis=1, keepdims=True)
