"""The kernels of RWKV-5 and 6: the algebra of one chunk on tiles (`tiles.py`), and the form around
it.

The algebra is that of `v6/algebra.py`, with masks for halves. A level's nodes have two halves of h
tokens. Going up, r and k are decayed over the other half too: r of the second half by the decay of
the first, k of the first by that of the second.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array, Bool, Float
from rwkv_jax.wkv.chunks import transpose
from rwkv_jax.wkv.form import Form, Output, Starts, State, in_compute_dtype
from rwkv_jax.wkv.pallas import heads, one_token
from rwkv_jax.wkv.pallas.kernel import Kernel, Tile, passes, recurrence
from rwkv_jax.wkv.pallas.tiles import Products, Rows, sum_lanes, sum_rows
from rwkv_jax.wkv.v6 import chunked
from rwkv_jax.wkv.v6.algebra import LOG_ZERO as XLA_LOG_ZERO
from rwkv_jax.wkv.v6.recurrence import Heads, Inputs, Tokens

LOG_ZERO = -1e3
"""Stands for the log of 0: any sum with it has 0 for its exponential, and no product makes NaN."""


class Level(NamedTuple):
    """Nodes of two halves of h tokens."""

    reading: Array  # r, decayed since the start of the token's half [R, k]
    writing: Array  # k, decayed up to the end of the token's half [R, k]
    decay: Array  # over the other half [R, k]
    pairs: Array  # a row of the second half and a column of the first [R, R]
    other: Array  # a row and the columns of the other half [R, R]
    second: Array  # rows of second halves [R, 1]


class Scores(NamedTuple):
    """The state-free part of a chunk."""

    levels: list[Level]  # from pairs of tokens up to the whole chunk
    scores: Array  # A, masked, without its diagonal [R, R]
    reading: Array  # r, decayed since the start of the chunk [R, k]
    writing: Array  # k, decayed up to its end [R, k]
    total: Array  # the decay over the chunk [1, k]


def relate(x: Tokens, rows: Rows, p: Products) -> Scores:
    log_w = jnp.maximum(x.log_w, LOG_ZERO)
    reading, writing, scores, levels, half = x.r, x.k, None, [], 1
    while half < rows.size:
        mine, theirs = rows.token // half, rows.other // half
        pairs = rows.within((mine % 2 == 1) & (mine == theirs + 1))
        # No mask of documents: the tokens of a pair that counts, and all between, are of one.
        other = mine + 1 - 2 * (mine % 2) == theirs
        if rows.same_head is not None:
            other = other & rows.same_head
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
) -> tuple[Float[Array, "R v"], Float[Array, "v k"]]:
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
    dy: Float[Array, "R v"],
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


TILE = Tile("wkv6", forward, backward, heads.segment_counts)


def form(kernel: Kernel, named: bool) -> Form:
    """The form by the kernel; in programs for a CPU it is interpreted if it was `named`."""
    platform = kernel.driver.platform
    xla = heads.xla_passes(kernel, _xla_forward, _xla_backward)
    by_chunks = recurrence(kernel, named, partial(passes, kernel), xla, _reference)
    by_token = one_token.recurrence(one_token.WKV6, platform, named)

    def wkv6(x: Inputs, state: State, reset: Starts) -> tuple[Output, State]:
        if one_token.applies(x):
            return one_token.run(by_token, x.tokens, (x.u,), state, reset, x.initial)
        y, after = heads.run(by_chunks, kernel.size, x.tokens, (x.u,), state, reset)
        if x.initial is None or reset is None:
            return y, after
        more, left = from_initial(x.tokens, reset, x.initial)
        return (y.astype(more.dtype) + more).astype(y.dtype), after + left

    return wkv6


def from_initial(
    x: Tokens, reset: Bool[Array, "b t"], initial: Float[Array, "h v k"]
) -> tuple[Output, State]:
    """What documents that start here add to y, and to the state after, by starting from `initial`
    instead of zero: the recurrence is linear in the state.

    Log decays since a document's start are summed by `lax.associative_scan`: differences of sums
    over the whole sequence would cancel.
    """

    def join(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        restarted, since = second
        return first[0] | restarted, jnp.where(restarted, since, first[1] + since)

    log_w = jnp.maximum(x.log_w.astype(initial.dtype), XLA_LOG_ZERO)
    starts = jnp.broadcast_to(reset[:, :, None, None], log_w.shape)
    # Shifted by a token: the state before token t is decayed by those from the start to t - 1.
    before = jnp.pad(log_w, ((0, 0), (1, 0), (0, 0), (0, 0)))
    fresh = jnp.pad(starts, ((0, 0), (0, 1), (0, 0), (0, 0)))
    restarted, since = lax.associative_scan(join, (fresh, jnp.where(fresh, 0, before)), axis=1)
    kept = jnp.where(restarted, jnp.exp(since), 0)
    reading = x.r.astype(initial.dtype) * kept[:, :-1]
    late = jnp.einsum("bthk,hvk->bthv", reading, initial, precision=lax.Precision.HIGHEST)
    return late, initial[None] * kept[:, -1, :, None]


def _xla_forward(x: Tokens, shared: tuple, state: Array, reset: Array | None, size: int):
    (u,) = shared
    (y, after), entering = chunked.forward(x, Heads(u, None), transpose(state), reset, size)
    return (y, transpose(after)), entering


def _xla_backward(args: tuple, entering: Array, cotangents: tuple, size: int):
    x, (u,), state, reset = args
    dy, dafter = cotangents
    dx, dheads, dstate, _ = chunked.backward(
        (x, Heads(u, None), transpose(state), reset), entering, (dy, transpose(dafter)), size
    )
    return dx, (dheads.u,), transpose(dstate)


def _reference(x: Tokens, shared: tuple, state: Array, reset: Array | None):
    return in_compute_dtype(chunked.wkv6)(Inputs(*x, *shared), state, reset)
