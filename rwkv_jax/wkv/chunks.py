"""What the chunked forms of all versions share: cutting time, numbering documents, sums as
products."""

from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from jax import lax

from rwkv_jax.typing import Array, Bool, Float, Int

dot = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
transpose = jnp.matrix_transpose


def fit(size: int, time: int) -> int:
    """Tokens a chunk for so many: `size`, or the power of two below it that holds them all."""
    return min(size, 1 << (time - 1).bit_length())


def pad(x: Float[Array, "b t h n"], size: int) -> Float[Array, "b padded h n"]:
    """Fill the last chunk up with zeros: decay 1, nothing removed, nothing written."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))


def take(x: Float[Array, "b padded h n"], i: Int[Array, ""], size: int) -> Float[Array, "b h C n"]:
    """Chunk `i`."""
    return lax.dynamic_slice_in_dim(x, i * size, size, axis=1).swapaxes(1, 2)


def put(
    into: Float[Array, "b padded h n"], x: Float[Array, "b h C n"], i: Int[Array, ""]
) -> Float[Array, "b padded h n"]:
    """`into` with `x` as its chunk `i`: the inverse of `take`."""
    return lax.dynamic_update_slice_in_dim(into, x.swapaxes(1, 2), i * x.shape[2], axis=1)


Inputs = TypeVar("Inputs", bound=tuple)
"""A named tuple of arrays [b, t, h, n]."""


def in_chunks(
    size: int, x: Inputs, reset: Bool[Array, "b t"] | None
) -> tuple[Inputs, tuple[Array, "DocumentIds | None"]]:
    """The inputs padded to whole chunks, and what a scan over those reads: their numbers, their
    documents."""
    padded = type(x)(*(pad(array, size) for array in x))
    return padded, (jnp.arange(padded[0].shape[1] // size), document_ids(reset, size))


class DocumentIds(NamedTuple):
    """Which document the tokens of every chunk belong to."""

    before: Int[Array, "chunks b 1"]
    """Of the token before the chunk: the state's."""
    tokens: Int[Array, "chunks b C"]


def document_ids(reset: Bool[Array, "b t"] | None, size: int) -> DocumentIds | None:
    """Documents numbered as they start; None if nothing resets. Padding starts no document."""
    if reset is None:
        return None
    b, t = reset.shape
    ids = jnp.pad(jnp.cumsum(reset.astype(jnp.int32), axis=1), ((0, 0), (0, -t % size)), "edge")
    ids = jnp.moveaxis(ids.reshape(b, -1, size), 1, 0)
    return DocumentIds(before=jnp.pad(ids[:-1, :, -1:], ((1, 0), (0, 0), (0, 0))), tokens=ids)


class Documents(NamedTuple):
    """Masks of rows of C tokens; [..., 1, C, C] or [..., 1, C, 1], the 1 for the heads. All but the
    first, a choice, are factors: 1 where it is so, else 0."""

    same: Array  # [C, C], bool: row and column are of one document
    sees_state: Array  # [C, 1]: rows of the document that the state belongs to
    reaches_end: Array  # [C, 1]: columns of the document that the chunk ends in
    carries_on: Array  # [1, 1]: no document starts in the chunk


def documents(ids: DocumentIds | None, dtype: Any) -> Documents | None:
    """The masks of a chunk, or of all."""
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
    """The [i, j] mask, only where token `i` and token `j` are of one document."""
    return mask if docs is None else jnp.broadcast_to(mask, docs.same.shape) & docs.same


def masked(mask: np.ndarray | Array, x: Float[Array, "*lanes i j"]) -> Float[Array, "*lanes i j"]:
    """`x` where the [i, j] mask holds, zero elsewhere, whatever `x` is there."""
    return jnp.where(jnp.broadcast_to(mask, x.shape), x, jnp.zeros((), x.dtype))


def summed(which: np.ndarray | Array, x: Float[Array, "*lanes j n"]) -> Float[Array, "*lanes i n"]:
    """Sums over rows, each over those `j` where `which` [i, j] holds: a product with ones, which
    takes less time than running sums or slices do."""
    ones = jnp.asarray(which, x.dtype)
    return dot(jnp.broadcast_to(ones, (*x.shape[:-2], *ones.shape[-2:])), x)


def cut(x: Float[Array, "b t h n"], size: int) -> Float[Array, "chunks b h C n"]:
    """All chunks at once."""
    b, _, h, n = x.shape
    return pad(x, size).reshape(b, -1, size, h, n).transpose(1, 0, 3, 2, 4)


def join(x: Float[Array, "chunks b h C n"], t: int) -> Float[Array, "b t h n"]:
    """The inverse of `cut`."""
    chunks, b, h, size, n = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(b, chunks * size, h, n)[:, :t]
