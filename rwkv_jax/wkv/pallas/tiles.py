"""The vocabulary of the kernels' algebra: 2-D tiles, and the few operations that every Pallas
backend lowers (products, iota, where, exp, sums along an axis).

A tile has a row for each token of a chunk, and a lane for each channel. Where one head's channels
do not fill the lanes of a register, several heads share a tile. Their channels lie side by side,
their tokens one below the other,

    [x1  0]     rows: tokens of head 1, tokens of head 2
    [ 0 x2]     lanes: channels of head 1, channels of head 2

and a state is block diagonal. The algebra is then that of one head: rows of two heads are as
independent as rows of two documents.
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
    parts: int = 0
    """The number of bfloat16 terms that `sums` splits its operand into, on units that multiply
    nothing else: ones are exact in bfloat16, so this is half the passes of a float32 product. 0: no
    split."""

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
        ones = jnp.where(which, 1.0, 0.0)
        if not self.parts:
            return self.exact_nn(ones, x)
        total, term = None, Precision("bfloat16", lax.Precision.DEFAULT)
        for _ in range(self.parts):
            rounded = x.astype(jnp.bfloat16).astype(jnp.float32)
            part = _dot(ones, rounded, 1, 0, term)
            total, x = part if total is None else total + part, x - rounded
        assert total is not None
        return total

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

    sees_state: Array  # [R, 1]: rows of the document that the entering state belongs to
    reaches_end: Array  # [R, 1]: rows of the document that the chunk ends in
    carries_on: Array  # [1, 1]: no document starts in the chunk


class Rows(NamedTuple):
    """Which head, token and document the R rows of a tile belong to."""

    size: int  # C tokens
    heads: int  # R / C
    token: Array  # [R, R]: the row's token
    other: Array  # [R, R]: the column's token
    same_head: Array | None  # [R, R]: row and column are of one head; None if there is only one
    same: Array | None  # [R, R]: of one head and one document; None if there is only one of each
    starts: Starts | None  # None if no document starts

    @property
    def before(self) -> Array:
        """[R, R]: the column's token comes before the row's."""
        return self.within(self.token > self.other)

    @property
    def upto(self) -> Array:
        """[R, R]: the column's token comes before the row's, or is the same."""
        return self.within(self.token >= self.other)

    def within(self, which: Array) -> Array:
        """`which`, only where row and column are of one head and document."""
        return which if self.same is None else which & self.same

    def at(self, token: int) -> Array:
        """[R, 1]: the rows of one token."""
        return self.tokens == token

    @property
    def tokens(self) -> Array:
        """[R, 1]: each row's token."""
        row = lax.broadcasted_iota(jnp.int32, (self.size * self.heads, 1), 0)
        return row if self.heads == 1 else row % self.size


def rows(size: int, heads: int, counts: Float[Array, "1 R"] | None) -> Rows:
    """The rows of a chunk of `size` tokens of `heads` heads. `counts` are how many documents have
    started in the chunk, up to and including each row's token."""
    count = size * heads
    row = lax.broadcasted_iota(jnp.int32, (count, count), 0)
    column = lax.broadcasted_iota(jnp.int32, (count, count), 1)
    same_head = None
    if heads > 1:
        same_head = row // size == column // size
        token, other = row % size, column % size
    else:
        token, other = row, column
    if counts is None:
        return Rows(size, heads, token, other, same_head, same_head, None)
    last = jnp.max(counts, axis=1, keepdims=True)
    mine = jnp.sum(jnp.where(row == column, counts, 0.0), axis=1, keepdims=True)
    together = mine == counts
    starts = Starts(
        sees_state=jnp.where(mine == 0, 1.0, 0.0),
        reaches_end=jnp.where(mine == last, 1.0, 0.0),
        carries_on=jnp.where(last == 0, 1.0, 0.0),
    )
    same = together if same_head is None else same_head & together
    return Rows(size, heads, token, other, same_head, same, starts)


def split_heads(x: Float[Array, "C W"], heads: int) -> Float[Array, "R W"]:
    """Heads that lie side by side, one below the other."""
    if heads == 1:
        return x
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1) // (x.shape[1] // heads)
    return jnp.concatenate([jnp.where(lane == head, x, 0.0) for head in range(heads)], 0)


def merge_heads(x: Float[Array, "R W"], heads: int) -> Float[Array, "C W"]:
    """The inverse of `split_heads`; it ignores a row's values in other heads' lanes."""
    if heads == 1:
        return x
    size = x.shape[0] // heads
    lane = lax.broadcasted_iota(jnp.int32, (size, x.shape[1]), 1) // (x.shape[1] // heads)
    out = x[:size]
    for head in range(1, heads):
        out = jnp.where(lane == head, x[head * size : (head + 1) * size], out)
    return out


def sum_rows(x: Float[Array, "R W"]) -> Float[Array, "1 W"]:
    return jnp.sum(x, axis=0, keepdims=True)


def sum_lanes(x: Float[Array, "R W"]) -> Float[Array, "R 1"]:
    return jnp.sum(x, axis=1, keepdims=True)
