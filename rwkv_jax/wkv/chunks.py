"""What the chunked forms share: splitting time into chunks, numbering documents, sums as matrix
products."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rwkv_jax.typing import Array, Callable, Float, Int, PyTree
from rwkv_jax.wkv.form import Starts

dot = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
transpose = jnp.matrix_transpose


def chunk_size(largest: int, time: int) -> int:
    """`largest`, or the smallest power of two that holds `time` tokens, if that is less."""
    return min(largest, 1 << (time - 1).bit_length())


def pad(x: Float[Array, "b t h n"], size: int) -> Float[Array, "b padded h n"]:
    """`x` with its last chunk filled up with zeros: decay 1, nothing removed, nothing written."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))


def get_chunk(
    x: Float[Array, "b padded h n"], i: Int[Array, ""], size: int
) -> Float[Array, "b h C n"]:
    """Chunk `i`."""
    return lax.dynamic_slice_in_dim(x, i * size, size, axis=1).swapaxes(1, 2)


def set_chunk(
    x: Float[Array, "b padded h n"], chunk: Float[Array, "b h C n"], i: Int[Array, ""]
) -> Float[Array, "b padded h n"]:
    """`x` with its chunk `i` replaced by `chunk`."""
    rows = chunk.swapaxes(1, 2)
    return lax.dynamic_update_slice_in_dim(x, rows, i * rows.shape[1], axis=1)


def split_chunks(x: Float[Array, "b t h n"], size: int) -> Float[Array, "chunks b h C n"]:
    """All chunks at once, the last one padded."""
    b, _, h, n = x.shape
    return pad(x, size).reshape(b, -1, size, h, n).transpose(1, 0, 3, 2, 4)


def merge_chunks(x: Float[Array, "chunks b h C n"], t: int) -> Float[Array, "b t h n"]:
    """The inverse of `split_chunks`, for `t` tokens."""
    chunks, b, h, size, n = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(b, chunks * size, h, n)[:, :t]


class DocumentIds(NamedTuple):
    """The number of each token's document within its row."""

    before: Int[Array, "chunks b 1"]  # of the token before the chunk, to which the state belongs
    tokens: Int[Array, "chunks b C"]


def document_ids(reset: Starts, size: int) -> DocumentIds | None:
    """Documents numbered by their starts; None without `reset`. Padding starts no document."""
    if reset is None:
        return None
    b, t = reset.shape
    ids = jnp.pad(jnp.cumsum(reset.astype(jnp.int32), axis=1), ((0, 0), (0, -t % size)), "edge")
    ids = jnp.moveaxis(ids.reshape(b, -1, size), 1, 0)
    return DocumentIds(before=jnp.pad(ids[:-1, :, -1:], ((1, 0), (0, 0), (0, 0))), tokens=ids)


class Documents(NamedTuple):
    """Masks of the C tokens of a chunk, [..., 1, C, C] or [..., 1, C, 1], the 1 for the heads.

    `same` is bool; the others are factors, 1 where the condition holds and 0 elsewhere.
    """

    same: Array  # [C, C]: row and column are of one document
    sees_state: Array  # [C, 1]: the row is of the document that the entering state belongs to
    reaches_end: Array  # [C, 1]: the column is of the document at the end of the chunk
    carries_on: Array  # [1, 1]: no document starts in the chunk


def documents(ids: DocumentIds | None, dtype: Any) -> Documents | None:
    """The masks of a chunk, or of all chunks."""
    if ids is None:
        return None
    last = ids.tokens[..., -1:]
    masks = Documents(
        same=ids.tokens[..., :, None] == ids.tokens[..., None, :],
        sees_state=(ids.tokens == ids.before)[..., None],
        reaches_end=(ids.tokens == last)[..., None],
        carries_on=(ids.before == last)[..., None],
    )
    same, *factors = (jnp.expand_dims(x, -3) for x in masks)
    return Documents(same, *(x.astype(dtype) for x in factors))


def within(mask: np.ndarray, docs: Documents | None) -> np.ndarray | Array:
    """The [i, j] mask, restricted to pairs of tokens of one document."""
    return mask if docs is None else jnp.broadcast_to(mask, docs.same.shape) & docs.same


def masked(mask: np.ndarray | Array, x: Float[Array, "*lanes i j"]) -> Float[Array, "*lanes i j"]:
    """`x` where the [i, j] mask holds, zero elsewhere, even where `x` is not finite."""
    return jnp.where(jnp.broadcast_to(mask, x.shape), x, jnp.zeros((), x.dtype))


def summed(which: np.ndarray | Array, x: Float[Array, "*lanes j n"]) -> Float[Array, "*lanes i n"]:
    """Sums over those rows `j` where `which` [i, j] holds, as a product with ones: faster than
    running sums or slices."""
    ones = jnp.asarray(which, x.dtype)
    return dot(jnp.broadcast_to(ones, (*x.shape[:-2], *ones.shape[-2:])), x)


Tokens = Any
"""A version's named tuple of arrays [b, t, h, n], `v` among them."""


def scan_chunks(
    chunk: Callable[[Tokens, DocumentIds | None, Array], tuple[Array, Array]],
    x: Tokens,
    state: Float[Array, "b h *matrix"],
    reset: Starts,
    size: int,
) -> tuple[tuple[Array, Array], Array]:
    """(`y`, the state after), and the states that enter the chunks of `size` tokens.

    `chunk(x, ids, state)` returns `y` of one chunk and the state after it.
    """
    padded, get, steps = _in_chunks(x, reset, chunk_size(size, x.v.shape[1]))

    def body(carry: tuple[Array, Array], step: tuple) -> tuple[tuple, Array]:
        state, y = carry
        i, ids = step
        out, after = chunk(get(i), ids, state)
        return (after, set_chunk(y, out, i)), state

    (after, y), entering = lax.scan(body, (state, jnp.zeros_like(padded.v)), steps)
    return (y[:, : x.v.shape[1]], after), entering


def scan_chunks_back(
    chunk: Callable[..., tuple[Tokens, PyTree, Array]],
    x: Tokens,
    shared: PyTree,
    reset: Starts,
    entering: Float[Array, "chunks b h *matrix"],
    cotangents: tuple[Array, Array],
    size: int,
) -> tuple[Tokens, PyTree, Array]:
    """Gradients of `x`, of what all chunks share and of the first state, from those of `y` and the
    state after.

    `chunk(x, ids, state, dy, dstate)` returns these gradients for one chunk, given the state that
    enters it.
    """
    size = chunk_size(size, x.v.shape[1])
    padded, get, steps = _in_chunks(x, reset, size)
    dy, dstate = pad(cotangents[0], size), cotangents[1]

    def body(carry: tuple, step: tuple) -> tuple[tuple, None]:
        dstate, dshared, dx = carry
        (i, ids), state = step
        new, more, dstate = chunk(get(i), ids, state, get_chunk(dy, i, size), dstate)
        dx = jax.tree.map(lambda x, chunk: set_chunk(x, chunk, i), dx, new)
        return (dstate, jax.tree.map(jnp.add, dshared, more), dx), None

    zeros = jax.tree.map(jnp.zeros_like, (shared, padded))
    (dstate, dshared, dx), _ = lax.scan(body, (dstate, *zeros), (steps, entering), reverse=True)
    return type(x)(*(array[:, : x.v.shape[1]] for array in dx)), dshared, dstate


def _in_chunks(
    x: Tokens, reset: Starts, size: int
) -> tuple[Tokens, Callable[[Array], Tokens], tuple[Array, DocumentIds | None]]:
    """`x` padded to whole chunks, a function that returns chunk `i` of it, and what a scan over the
    chunks iterates over: their indices and document ids."""
    padded = type(x)(*(pad(array, size) for array in x))

    # Chunks are sliced from the time axis one by one: splitting all of them beforehand would
    # transpose, and so copy, every array.
    def get(i: Array) -> Tokens:
        return type(x)(*(get_chunk(array, i, size) for array in padded))

    return padded, get, (jnp.arange(padded.v.shape[1] // size), document_ids(reset, size))
