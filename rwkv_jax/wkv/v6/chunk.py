"""The algebra of one chunk of RWKV-5's and 6's WKV.

C tokens, rows = time, entered with state S [v, k]. Token t reads what s < t wrote, decayed by all
tokens between them; with lw the log decays,

    A[t, s] = sum_n r_t k_s exp(sum_{s < i < t} lw_i)        A[t, t] = sum_n r_t u k_t
    Y  = (r exp(sum_{i < t} lw_i)) S^T + A V
    S' = S exp(sum_i lw_i) + V^T (k exp(sum_{i > s} lw_i))

A is a matrix product only if the exponential splits into a factor of t and one of s. A split at the
chunk's start or middle makes one factor grow as the other shrinks, and overflows for decays that
trained models have. So the chunk is halved again and again, and each pair (t, s) is split at the
middle of the node that parts it, t in the right half and s in the left:

    exp(sum_{s < i < t} lw_i) = exp(sum_{middle <= i < t} lw_i) exp(sum_{s < i < middle} lw_i)

log2(C) products, one a level, and no exponent is ever positive, whatever the decay. Every sum is a
product of lw with a constant matrix of ones, never a difference of longer sums.

A document that starts inside the chunk masks A where document numbers differ, the rows that may not
see S, the columns that may not reach S', and S itself. State-tuned models start it from `initial`,
which its rows see through the decays since its start.
"""

from functools import cache
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from rwkv_jax.typing import Array, Float
from rwkv_jax.wkv.chunks import Documents, dot, masked, summed, transpose, within


class Inputs(NamedTuple):
    """A chunk's tokens, [..., C, n] each."""

    r: Array
    log_w: Array
    k: Array
    v: Array


class Heads(NamedTuple):
    """What all tokens share: the bonus [h, k], and the state [h, v, k] that documents start from,
    None for zero."""

    u: Array
    initial: Array | None


class Scores(NamedTuple):
    """What a chunk's tokens have to do with each other, whatever the state."""

    scores: Array  # A, masked [C, C]
    reading: Array  # what rows read the state with [C, k]
    writing: Array  # what columns write to it with [C, k]
    total: Array  # the decay over the chunk [1, k]


class Tree(NamedTuple):
    """The constants of halving a chunk: ones where a token's decay is counted, or a pair parted."""

    sums: np.ndarray  # [levels + 2, C, C]; the last two: all tokens before, all tokens after
    pairs: np.ndarray  # [levels, C, C]


@cache
def tree(size: int) -> Tree:
    """Of a chunk of `size` tokens, a power of two."""
    row, column = np.arange(size)[:, None], np.arange(size)[None, :]
    sums, pairs = [], []
    half = size // 2
    while half:
        middle = row // (2 * half) * (2 * half) + half
        right = row >= middle
        sums.append(
            np.where(right, (middle <= column) & (column < row), (row < column) & (column < middle))
        )
        pairs.append(right & (column // (2 * half) == row // (2 * half)) & (column < middle))
        half //= 2
    sums += [column < row, column > row]
    return Tree(np.stack(sums), np.stack(pairs))


def relate(x: Inputs, heads: Heads, docs: Documents | None) -> Scores:
    """The state-free part of a chunk."""
    size, constants = x.r.shape[-2], tree(x.r.shape[-2])
    exponents = summed(constants.sums.reshape(-1, size), x.log_w)
    factors = jnp.exp(exponents.reshape(*x.r.shape[:-2], -1, size, x.r.shape[-1]))
    levels, before, after = factors[..., :-2, :, :], factors[..., -2, :, :], factors[..., -1, :, :]
    parted = dot(x.r[..., None, :, :] * levels, transpose(x.k[..., None, :, :] * levels))
    pairs = jnp.broadcast_to(jnp.asarray(constants.pairs, x.r.dtype), parted.shape)
    u = jnp.broadcast_to(heads.u[:, None], x.r.shape)
    bonus = jnp.sum(x.r * u * x.k, axis=-1, keepdims=True)
    own = jnp.broadcast_to(jnp.eye(size, dtype=x.r.dtype), (*bonus.shape[:-2], size, size))
    scores = jnp.sum(parted * pairs, axis=-3) + bonus * own
    reading, writing = x.r * before, x.k * after
    total = jnp.exp(jnp.sum(x.log_w, axis=-2, keepdims=True))
    if docs is not None:
        scores = masked(docs.same, scores)
        reading, writing = reading * docs.sees_state, writing * docs.reaches_end
        total = total * docs.carries_on
    return Scores(scores, reading, writing, total)


def forward(
    x: Inputs, heads: Heads, s: Scores, state: Array, docs: Documents | None
) -> tuple[Float[Array, "*lanes C v"], Float[Array, "*lanes v k"]]:
    """The chunk's `y` and the state after it."""
    y = dot(s.reading, transpose(state)) + dot(s.scores, x.v)
    if docs is not None and heads.initial is not None:
        initial = jnp.broadcast_to(heads.initial, state.shape)
        y = y + dot(late_reading(x, docs), transpose(initial))
    return y, state * s.total + written(x, heads, s, docs)


def written(x: Inputs, heads: Heads, s: Scores, docs: Documents | None) -> Array:
    """What the chunk adds to the decayed state: its own tokens, and `initial` if its last document
    starts in it."""
    added = dot(transpose(x.v), s.writing)
    if docs is None or heads.initial is None:
        return added
    since = jnp.exp(jnp.sum(x.log_w * docs.reaches_end, axis=-2, keepdims=True))
    initial = jnp.broadcast_to(heads.initial, added.shape)
    return added + initial * since * (1 - docs.carries_on)


def late_reading(x: Inputs, docs: Documents) -> Array:
    """What the rows of documents that start in the chunk read `initial` with."""
    since = summed(within(np.tri(x.r.shape[-2], k=-1, dtype=bool), docs), x.log_w)
    return x.r * jnp.exp(since) * (1 - docs.sees_state)
