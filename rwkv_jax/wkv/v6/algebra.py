"""The algebra of one chunk of the WKV of RWKV-5 and 6, forward and backward.

The chunk has C tokens (rows = time) and is entered with state S [k, v]: transposed, because
products are faster if their left factor is not. Token t reads what tokens s < t wrote, decayed by
all tokens between them; with lw the log decays,

    A[t, s] = sum_n r_t k_s exp(sum_{s < i < t} lw_i)        A[t, t] = sum_n r_t u k_t
    Y  = (r exp(sum_{i < t} lw_i)) S + A V
    S' = exp(sum_i lw_i)^T S + (k exp(sum_{i > s} lw_i))^T V

A is a matrix product only if the exponential splits into a factor of t and one of s. A split at the
chunk's start or middle makes one factor grow as the other shrinks, and overflows for decays that
trained models have. So the chunk is halved recursively into a binary tree, and each pair (t, s) is
split at the middle of the node that separates it, t in its second half and s in its first:

    exp(sum_{s < i < t} lw_i) = exp(sum_{middle <= i < t} lw_i) exp(sum_{s < i < middle} lw_i)

Going up from single tokens, the halves of one level are the nodes of the level below, and r and k
are decayed further, each by the decay over the other half:

    second halves   r decayed since the middle; next, since the node's start: times the first's
    first halves    k decayed up to the middle; next, up to the node's end:   times the second's

At the top r reads the entering state and k writes the next. All factors are in [0, 1]: nothing
overflows, whatever the decay, and underflow gives exact zeros. The gradient goes down the tree
again. Each r, k and decay gets the flow r dr or k dk through its own exponent alone, never a
difference of longer sums, so that gradients are exact for strong decays.

If a document starts inside the chunk, masks apply to A where documents differ, to the rows that may
not see S, to the columns that may not reach S', and to S itself. State-tuned models start the
document from `initial`, which its rows read through the decays since its start.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax.typing import Array, Float
from rwkv_jax.wkv.chunks import Documents, dot, masked, summed, transpose, within
from rwkv_jax.wkv.v6.recurrence import Heads, Tokens

LOG_ZERO = -1e30
"""Stands for log 0, whose product with a mask's zeros would be NaN."""


class Level(NamedTuple):
    """Nodes of two halves of C' tokens each."""

    reading: Array  # r of the second halves, decayed since the middle [nodes, C', k]
    writing: Array  # k of the first halves, decayed up to the middle [nodes, C', k]
    first: Array  # the decay over the first half [nodes, k]
    second: Array  # the decay over the second half [nodes, k]


class Scores(NamedTuple):
    """The state-independent part of a chunk."""

    levels: list[Level]  # from pairs of tokens up to the whole chunk
    scores: Array  # A, masked [C, C]
    reading: Array  # what rows read the state with [C, k]
    writing: Array  # what columns write to it with [C, k]
    total: Array  # the decay over the chunk [k, 1]


def halves(x: Float[Array, "*lanes C n"], size: int) -> tuple[Array, Array]:
    """The first and the second halves, of `size` tokens, of every node: [nodes, size, n] each."""
    x = x.reshape(*x.shape[:-2], -1, 2, size, x.shape[-1])
    return x[..., 0, :, :], x[..., 1, :, :]


def whole(
    first: Float[Array, "*lanes nodes size n"], second: Float[Array, "*lanes nodes size n"]
) -> Float[Array, "*lanes C n"]:
    """The inverse of `halves`."""
    x = jnp.stack([first, second], -3)
    return x.reshape(*x.shape[:-4], -1, x.shape[-1])


def over_columns(x: Float[Array, "*lanes C n"]) -> Float[Array, "*lanes C 1"]:
    """Sums over n, as a matrix product like all sums here: ten times as fast on XLA's CPU
    backend."""
    return jnp.tensordot(x, jnp.ones((x.shape[-1], 1), x.dtype), 1, precision="highest")


def over_rows(x: Float[Array, "*lanes C n"]) -> Float[Array, "*lanes 1 n"]:
    """Sums over C."""
    return x if x.shape[-2] == 1 else summed(np.ones((1, x.shape[-2])), x)


def climb(x: Tokens) -> tuple[list[Level], Array, Array, Array]:
    """The levels, and the top's r decayed since the chunk's start [C, k], k decayed up to its end
    [C, k], and the decay over it [1, k]."""
    reading, writing, decays = x.r, x.k, node_decays(x.log_w)
    levels, size = [], 1
    for decay in decays[:-1]:
        (r1, r2), (k1, k2) = halves(reading, size), halves(writing, size)
        first, second = (d[..., 0, :] for d in halves(decay, 1))
        levels.append(Level(r2, k1, first, second))
        reading = whole(r1, r2 * first[..., None, :])
        writing = whole(k1 * second[..., None, :], k2)
        size = 2 * size
    return levels, reading, writing, decays[-1]


def node_decays(log_w: Float[Array, "*lanes C n"]) -> list[Array]:
    """The decay over every node, [nodes, n] a level, from single tokens up to the whole chunk.

    By sums of logs, not products of decays: where all decays are the same and nearly 1, so are
    their rounding errors, which would add up over all tokens that a state remembers.
    """
    log_w, size = jnp.maximum(log_w, LOG_ZERO), log_w.shape[-2]
    if size == 1:
        return [jnp.exp(log_w)]
    counts = [size >> level for level in range(1, size.bit_length())]
    nodes = np.concatenate([np.kron(np.eye(n), np.ones(size // n)) for n in counts])
    above = jnp.split(jnp.exp(summed(nodes, log_w)), np.cumsum(counts)[:-1], -2)
    return [jnp.exp(log_w), *above]


def relate(x: Tokens, heads: Heads, docs: Documents | None) -> Scores:
    """The state-independent part of a chunk."""
    levels, reading, writing, total = climb(x)
    u = jnp.broadcast_to(heads.u[:, None], x.r.shape)
    scores = over_columns(x.r * u * x.k)[..., None]
    for level in levels:
        one = level.reading.shape[-2] == 1
        across = (
            over_columns(level.reading * level.writing)
            if one
            else dot(level.reading, transpose(level.writing))
        )
        pairs = scores.reshape(*across.shape[:-2], 2, *across.shape[-2:])
        upper = jnp.concatenate([pairs[..., 0, :, :], jnp.zeros_like(across)], -1)
        lower = jnp.concatenate([across, pairs[..., 1, :, :]], -1)
        scores = jnp.concatenate([upper, lower], -2)
    scores = scores[..., 0, :, :]
    if docs is not None:
        scores = masked(docs.same, scores)
        reading, writing = reading * docs.sees_state, writing * docs.reaches_end
        total = total * docs.carries_on
    return Scores(levels, scores, reading, writing, transpose(total))


def forward(
    x: Tokens, heads: Heads, s: Scores, state: Array, docs: Documents | None
) -> tuple[Float[Array, "*lanes C v"], Float[Array, "*lanes k v"]]:
    """The chunk's `y` and the state after it."""
    y = dot(s.reading, state) + dot(s.scores, x.v)
    after = state * s.total + dot(transpose(s.writing), x.v)
    if docs is None or heads.initial is None:
        return y, after
    late, fresh = started(docs, x.r, x.log_w, heads.initial)
    return y + late, after + fresh


def started(
    docs: Documents, r: Array, log_w: Array, initial: Float[Array, "h k v"]
) -> tuple[Float[Array, "*lanes C v"], Float[Array, "*lanes k v"]]:
    """For documents that start in the chunk: what their rows read from `initial`, and what is left
    of it in the state after the chunk, if its last document started there."""
    log_w = jnp.maximum(log_w, LOG_ZERO)
    since = summed(within(np.tri(r.shape[-2], k=-1, dtype=bool), docs), log_w)
    reading = r * jnp.exp(since) * (1 - docs.sees_state)
    kept = jnp.exp(over_rows(log_w * docs.reaches_end)) * (1 - docs.carries_on)
    initial = jnp.broadcast_to(initial, (*kept.shape[:-2], *initial.shape[-2:]))
    return dot(reading, initial), initial * transpose(kept)


def backward(
    x: Tokens,
    heads: Heads,
    s: Scores,
    state: Float[Array, "b h k v"],
    dy: Float[Array, "b h C v"],
    dstate: Float[Array, "b h k v"],
    docs: Documents | None,
) -> tuple[Tokens, Heads, Float[Array, "b h k v"]]:
    """Gradients of the chunk's inputs, of `heads` and of the state that entered it, from those of
    `y` and the state after."""
    dv = dot(transpose(s.scores), dy) + dot(s.writing, dstate)
    dscores = dot(dy, transpose(x.v))
    dreading, dwriting = dot(dy, transpose(state)), dot(x.v, transpose(dstate))
    if docs is not None:
        dscores = masked(docs.same, dscores)
        dreading, dwriting = dreading * docs.sees_state, dwriting * docs.reaches_end

    # The gradient of the log decay over each node: what flows through a node flows through both
    # its halves.
    flow = transpose(over_columns(state * dstate) * s.total)
    blocks = dscores[..., None, :, :]
    for level in reversed(s.levels):
        size = level.reading.shape[-2]
        (dr1, dr2), (dk1, dk2) = halves(dreading, size), halves(dwriting, size)
        first, second = level.first[..., None, :], level.second[..., None, :]
        through = [over_rows(level.reading * dr2) * first, over_rows(level.writing * dk1) * second]
        flow = whole(*(flow[..., None, :] + half for half in through))
        across = blocks[..., size:, :size]
        if size == 1:
            dr2, dk1 = dr2 * first + across * level.writing, dk1 * second + across * level.reading
        else:
            dr2 = dr2 * first + dot(across, level.writing)
            dk1 = dk1 * second + dot(transpose(across), level.reading)
            blocks = jnp.stack([blocks[..., :size, :size], blocks[..., size:, size:]], -3)
            blocks = blocks.reshape(*across.shape[:-3], -1, size, size)
        dreading, dwriting = whole(dr1, dr2), whole(dk1, dk2)

    u = jnp.broadcast_to(heads.u[:, None], x.r.shape)
    own = over_columns(dy * x.v)
    du = jnp.einsum("bhct,bhck->hk", own, x.r * x.k, precision="highest")
    dr, dlog_w, dinitial = dreading + own * u * x.k, flow, None
    if heads.initial is not None:
        dinitial = jnp.zeros_like(heads.initial)
        if docs is not None:
            _, pull_back = jax.vjp(partial(started, docs), x.r, x.log_w, heads.initial)
            late_r, late_log_w, dinitial = pull_back((dy, dstate))
            dr, dlog_w = dr + late_r, dlog_w + late_log_w
    dx = Tokens(dr, dlog_w, dwriting + own * u * x.r, dv)
    return dx, Heads(du, dinitial), dstate * s.total + dot(transpose(s.reading), dy)
