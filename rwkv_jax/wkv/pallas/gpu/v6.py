"""RWKV-5 and 6 on GPUs: the algebra of one chunk on tiles (`tiles.py`).

The algebra is that of `v6/algebra.py`, with masks for halves. A level's nodes have two halves of h
tokens. Going up, r and k are decayed over the other half too: r of the second half by the decay of
the first, k of the first by that of the second.
"""

from typing import NamedTuple

import jax.numpy as jnp

from rwkv_jax.typing import Array, Float
from rwkv_jax.wkv.pallas import heads
from rwkv_jax.wkv.pallas.gpu.tiles import Products, Rows, sum_lanes, sum_rows
from rwkv_jax.wkv.pallas.kernel import Algebra
from rwkv_jax.wkv.v6.recurrence import Tokens

LOG_ZERO = -1e3
"""Stands for the log of 0: any sum with it has 0 for its exponential, and no product makes NaN."""


class Level(NamedTuple):
    """Nodes of two halves of h tokens."""

    reading: Array  # r, decayed since the start of the token's half [C, k]
    writing: Array  # k, decayed up to the end of the token's half [C, k]
    decay: Array  # over the other half [C, k]
    pairs: Array  # a row of the second half and a column of the first [C, C]
    other: Array  # a row and the columns of the other half [C, C]
    second: Array  # rows of second halves [C, 1]


class Scores(NamedTuple):
    """The state-free part of a chunk."""

    levels: list[Level]  # from pairs of tokens up to the whole chunk
    scores: Array  # A, masked, without its diagonal [C, C]
    reading: Array  # r, decayed since the start of the chunk [C, k]
    writing: Array  # k, decayed up to its end [C, k]
    total: Array  # the decay over the chunk [1, k]


def relate(x: Tokens, rows: Rows, p: Products) -> Scores:
    log_w = jnp.maximum(x.log_w, LOG_ZERO)
    reading, writing, scores, levels, half = x.r, x.k, None, [], 1
    while half < rows.size:
        mine, theirs = rows.token // half, rows.other // half
        pairs = rows.within((mine % 2 == 1) & (mine == theirs + 1))
        # No mask of documents: the tokens of a pair that counts, and all between, are of one.
        other = mine + 1 - 2 * (mine % 2) == theirs
        second = rows.tokens // half % 2 == 1
        decay = jnp.exp(p.exact_sums(other, log_w))
        across = jnp.where(pairs, p.nt(reading, writing), 0.0)
        scores = across if scores is None else scores + across
        levels.append(Level(reading, writing, decay, pairs, other, second))
        reading = jnp.where(second, reading * decay, reading)
        writing = jnp.where(second, writing, writing * decay)
        half *= 2
    assert scores is not None
    total = jnp.exp(sum_rows(log_w))
    return Scores(levels, scores, reading, writing, total)


def forward(
    x: Tokens, shared: tuple, state: Float[Array, "v k"], rows: Rows, p: Products
) -> tuple[Float[Array, "C v"], Float[Array, "v k"]]:
    """The chunk's `y` and the state after it; `shared` is the bonus u [1, k]."""
    (u,) = shared
    s = relate(x, rows, p)
    reading, writing, total = s.reading, s.writing, s.total
    if rows.starts is not None:
        reading, writing = reading * rows.starts.sees_state, writing * rows.starts.reaches_end
        total = total * rows.starts.carries_on
    y = p.nt(reading, state) + p.nn(s.scores, x.v) + sum_lanes(x.r * u * x.k) * x.v
    return y, state * total + p.tn(x.v, writing)


def backward(
    x: Tokens,
    shared: tuple,
    state: Float[Array, "v k"],
    dy: Float[Array, "C v"],
    dstate: Float[Array, "v k"],
    rows: Rows,
    p: Products,
) -> tuple[Tokens, tuple, Float[Array, "v k"]]:
    """Gradients of the chunk's inputs, of u and of the state that entered it."""
    (u,) = shared
    s = relate(x, rows, p)
    reading, writing, total = s.reading, s.writing, s.total
    dreading, dwriting = p.nn(dy, state), p.nn(x.v, dstate)
    if rows.starts is not None:
        dreading, dwriting = dreading * rows.starts.sees_state, dwriting * rows.starts.reaches_end
        reading, writing = reading * rows.starts.sees_state, writing * rows.starts.reaches_end
        total = total * rows.starts.carries_on
    own = sum_lanes(dy * x.v)
    dv = p.tn(s.scores, dy) + p.nt(writing, dstate) + sum_lanes(x.r * u * x.k) * dy
    dstate_before = dstate * total + p.tn(dy, reading)
    dscores = p.nt(dy, x.v)

    dlog_w = sum_rows(state * dstate) * total
    above_r, above_k = s.reading, s.writing
    for level in reversed(s.levels):
        flow = jnp.where(level.second, dreading * above_r, dwriting * above_k)
        dlog_w = dlog_w + p.sums(level.other, flow)
        dreading = jnp.where(level.second, dreading * level.decay, dreading)
        dwriting = jnp.where(level.second, dwriting, dwriting * level.decay)
        across = jnp.where(level.pairs, dscores, 0.0)
        dreading = dreading + p.nn(across, level.writing)
        dwriting = dwriting + p.tn(across, level.reading)
        above_r, above_k = level.reading, level.writing
    dx = Tokens(dreading + own * u * x.k, dlog_w, dwriting + own * u * x.r, dv)
    return dx, (sum_rows(own * x.r * x.k),), dstate_before


ALGEBRA = Algebra("wkv6", forward, backward, heads.segment_counts)
