"""The vocabulary of the TPU kernels' algebra: heads side by side in the lanes of a register.

A tile has a row for each of a chunk's C tokens and a lane for each channel, the heads of 128 lanes
side by side as in the model's own layout: [x1 | x2]. Element-wise work then wastes no lane. One
product serves all heads if the operand that the matrix unit holds as its weights has a block of
rows for each head, with zeros in the lanes of the others:

    spread(x) = [x1  0]      scores   x spread(y)^T       = [x1 y1^T | x2 y2^T]   [C, heads C]
                [ 0 x2]      their use  [s1 | s2] spread(y) = [s1 y1 | s2 y2]     [C, W]

States lie side by side, too, [v, k1 | k2], and x spread(S)^T = [x1 S1^T | x2 S2^T]. A sum over
tokens, x^T y, has what belongs together on its diagonal; `merge` takes it from there.

A program computes several chunks that do not wait for each other, of other heads, rows or times:
its chains. The compiler looks only so far ahead for instructions to fill a wait, so the algebra is
written in stages, each of them for every chain before the next (`each`).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array, Callable

LANES, SUBLANES = 128, 8
"""Of a register of 32-bit numbers."""


def each(stage: Callable[..., Any], *chains: list) -> list:
    """`stage` of every chain, given a list for each of its arguments."""
    return [stage(*args) for args in zip(*chains, strict=True)]


def in_order(times: int, *chains: list) -> list[tuple[list, ...]]:
    """The chains of each of so many times, which come one time after the other."""
    count = len(chains[0]) // times
    return [tuple(z[i * count : (i + 1) * count] for z in chains) for i in range(times)]


class Tile(NamedTuple):
    """The shape of a tile, and the operands of products on it."""

    size: int  # C, tokens a chunk
    heads: int  # side by side
    width: int  # W, lanes
    dtype: Any  # of operands: bfloat16, which a TPU multiplies, or float32, in six passes of it

    @property
    def columns(self) -> int:
        """Of scores: the tokens of every head, in whole registers."""
        return max(LANES, self.heads * self.size)

    @partial(jax.jit, static_argnums=(0, 2, 3))  # traced once for all chains
    def spread(self, x: Array, start: int = 0, rows: int | None = None) -> Array:
        """[R, W] -> [heads R, W], a block of rows for each head (at least 128 rows, with zeros).

        Blocks may have more `rows` than x, whose own then begin at `start`, among zeros.
        """
        rows = rows or x.shape[0]
        words = _words(x.astype(self.dtype))
        height = x.shape[0] // words.shape[0]  # rows of a word
        after = rows - start - x.shape[0]

        def zeros(rows: int) -> list[Array]:
            return [jnp.zeros((rows // height, self.width), jnp.int32)] if rows > 0 else []

        blocks = []
        for mine in self._by_head(words):
            blocks += [*zeros(start), mine, *zeros(after)]
        blocks += zeros(LANES - rows * self.heads)
        return _numbers(jnp.concatenate(blocks, 0), self.dtype)

    def _by_head(self, words: Array) -> list[Array]:
        """Words with zeros in the lanes of all heads but one, for each."""
        if self.heads == 1:
            return [words]
        # By bits, as selects are several operations to trace and lower.
        head = self._head(words.shape)
        if self.heads == 2:
            second = lax.neg(head)
            return [words & ~second, words & second]
        return [words & -(head == i).astype(jnp.int32) for i in range(self.heads)]

    def _head(self, shape: tuple[int, ...]) -> Array:
        """The head of each lane."""
        return group(iota(shape, 1), self.width // self.heads)

    def merge(self, x: Array, rows: int) -> Array:
        """The inverse of `spread`: what is in a head's `rows` and lanes [rows, W]."""
        head, out = self._head((rows, self.width)), x[:rows]
        for i in range(1, self.heads):
            out = jnp.where(head == i, x[i * rows : (i + 1) * rows], out)
        return out

    def nn(self, x: Array, y: Array) -> Array:
        """x y"""
        return dot(x.astype(self.dtype), y.astype(self.dtype), 1, 0)

    def nt(self, x: Array, y: Array) -> Array:
        """x y^T"""
        return dot(x.astype(self.dtype), y.astype(self.dtype), 1, 1)

    def tn(self, x: Array, y: Array) -> Array:
        """x^T y"""
        return dot(x.astype(self.dtype), y.astype(self.dtype), 0, 0)

    def sums(self, which: Array, x: Array) -> Array:
        """Sums over the tokens of x [C, W] by weights [R, 2C], which come twice, once for each of
        two bfloat16 terms of x (2^-17); with a third for float32."""
        which = which.astype(jnp.bfloat16)
        high, low = split(x)
        total = dot(which, jnp.concatenate([high, low], 0), 1, 0)
        if self.dtype == jnp.float32:
            rest = x - wide(high) - wide(low)
            total = total + dot(which[:, : self.size], rest.astype(jnp.bfloat16), 1, 0)
        return total


def _words(x: Array) -> Array:
    """As 32-bit integers: rows of bfloat16 two by two."""
    # Imported here: only programs for TPUs, and tests, need it.
    from jax.experimental.pallas import tpu

    return tpu.bitcast(x, jnp.int32)


def _numbers(words: Array, dtype: Any) -> Array:
    """The inverse of `_words`."""
    from jax.experimental.pallas import tpu

    return tpu.bitcast(words, dtype)


def dot(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """A product of operands of one dtype, summed in float32."""
    return lax.dot_general(
        x,
        y,
        (((x_axis,), (y_axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def split(x: Array) -> tuple[Array, Array]:
    """Two bfloat16 terms, whose sum is x to 2^-17."""
    high = x.astype(jnp.bfloat16)
    return high, (x - wide(high)).astype(jnp.bfloat16)


def wide(x: Array) -> Array:
    return x.astype(jnp.float32)


def store(ref: Any, x: Array) -> None:
    ref[...] = x.astype(ref.dtype)


def group(x: Array, size: int) -> Array:
    """x // size, of non-negative numbers and a power of two: JAX's own takes ten operations."""
    return x >> (size.bit_length() - 1)


def place(x: Array, size: int) -> Array:
    """x % size, likewise."""
    return x & (size - 1)


def iota(shape: tuple[int, ...], axis: int) -> Array:
    return lax.broadcasted_iota(jnp.int32, shape, axis)


class Documents(NamedTuple):
    """Which tokens of a chunk, and which states, are of one document: masks of rows, in float32, or
    None if no document starts anywhere."""

    same: Array | None  # [C, columns], bool: of the row and of the column
    sees_state: Array | None  # [C, 1]: the row is of the document of the entering state
    reaches_end: Array | None  # [C, 1]: the row is of the document that the chunk ends in
    carries_on: Array | None  # [1, 1]: no document starts in the chunk

    @classmethod
    def of(cls, tile: Tile, counts: Array | None) -> "Documents":
        """`counts` [1, columns]: how many documents have started up to each token."""
        if counts is None:
            return cls(None, None, None, None)
        row, column = (iota((tile.size, tile.columns), axis) for axis in (0, 1))
        mine = jnp.sum(jnp.where(row == column, counts, 0.0), 1, keepdims=True)
        last = jnp.max(counts, 1, keepdims=True)
        one = lambda which: jnp.where(which, 1.0, 0.0)  # noqa: E731
        return cls(mine == counts, one(mine == 0), one(mine == last), one(last == 0))

    def within(self, which: Array) -> Array:
        return which if self.same is None else which & self.same[:, : which.shape[1]]

    def seeing(self, x: Array) -> Array:
        """What rows read from the state (rows of [C, W], once or several times)."""
        return _by_rows(x, self.sees_state)

    def reaching(self, x: Array) -> Array:
        """What rows write to the state."""
        return _by_rows(x, self.reaches_end)

    def carried(self, x: Array) -> Array:
        """What the chunk keeps of the state."""
        return x if self.carries_on is None else x * self.carries_on


def _by_rows(x: Array, factors: Array | None) -> Array:
    if factors is None:
        return x
    return x * jnp.concatenate([factors.astype(x.dtype)] * (x.shape[0] // factors.shape[0]), 0)


def causal(tile: Tile, docs: Documents, compare: Callable[[Array, Array], Array]) -> Array:
    """[C, columns]: whether a row's token and a column's are of one document and compare so."""
    row, column = (iota((tile.size, tile.columns), axis) for axis in (0, 1))
    return docs.within(compare(row, place(column, tile.size)))
