"""The algebra of one chunk of RWKV-5's and 6's WKV, forward and backward.

C tokens, rows = time, entered with state S [k, v]: transposed, because products whose left factor
is not are faster. Token t reads what s < t wrote, decayed by all tokens between them; with lw the
log decays,

    A[t, s] = sum_n r_t k_s exp(sum_{s < i < t} lw_i)        A[t, t] = sum_n r_t u k_t
    Y  = (r exp(sum_{i < t} lw_i)) S + A V
    S' = exp(sum_i lw_i)^T S + (k exp(sum_{i > s} lw_i))^T V

A is a matrix product only if the exponential splits into a factor of t and one of s. A split at the
chunk's start or middle makes one factor grow as the other shrinks, and overflows for decays that
trained models have. So the chunk is halved again and again, and each pair (t, s) is split at the
middle of the node that parts it, t in the second half and s in the first:

    exp(sum_{s < i < t} lw_i) = exp(sum_{middle <= i < t} lw_i) exp(sum_{s < i < middle} lw_i)

Going up from single tokens, a level's halves are the level below's nodes, and what r and k are
decayed by grows by the decay over one half:

    second halves   r decayed since the middle; next, since the node's start: times the first's
    first halves    k decayed up to the middle; next, up to the node's end:   times the second's

At the top r and k are what reads the entering state and writes the next. All factors are in [0, 1]:
nothing overflows, whatever the decay, and what vanishes is zero. The gradient goes down again. Each
r, k and decay is met by the flow r dr or k dk through its exponent alone, never by a difference of
longer sums, so that strong decays have exact gradients.

A document that starts inside the chunk masks A where document numbers differ, the rows that may not
see S, the columns that may not reach S', and S itself. State-tuned models start it from `initial`,
which its rows see through the decays since its start.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax.typing import Array, Float
from rwkv_jax.wkv.chunks import Documents, dot, masked, summed, transpose, within

LOG_ZERO = -1e30
"""Stands for the log of 0, of which a product with ones would make NaN."""


class Inputs(NamedTuple):
    """A chunk's tokens, [..., C, n] each."""

    r: Array
    log_w: Array
    k: Array
    v: Array


class Heads(NamedTuple):
    """What all tokens share: the bonus [h, k], and the state [h, k, v] that documents start from,
    None for zero."""

    u: Array
    initial: Array | None

    @classmethod
    def of(cls, u: Float[Array, "h k"], initial: Float[Array, "h v k"] | None) -> "Heads":
        """From the operator's arguments, whose states are [v, k]."""
        return cls(u, None if initial is None else transpose(initial))


class Level(NamedTuple):
    """Nodes of two halves of C' tokens each."""

    reading: Array  # r of the second halves, decayed since the middle [nodes, C', k]
    writing: Array  # k of the first halves, decayed up to the middle [nodes, C', k]
    first: Array  # the decay over the first half [nodes, k]
    second: Array  # the decay over the second half [nodes, k]


class Scores(NamedTuple):
    """What a chunk's tokens have to do with each other, whatever the state."""

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
    """Sums over n; a product, as all sums here: XLA's CPU backend takes ten times as long over
    others."""
    return jnp.tensordot(x, jnp.ones((x.shape[-1], 1), x.dtype), 1, precision="highest")


def over_rows(x: Float[Array, "*lanes C n"]) -> Float[Array, "*lanes 1 n"]:
    """Sums over C."""
    return x if x.shape[-2] == 1 else summed(np.ones((1, x.shape[-2])), x)


def climb(x: Inputs) -> tuple[list[Level], Array, Array, Array]:
    """The levels, and what there is at the top: r and k, decayed since the chunk's start and up to
    its end [C, k], and the decay over it [1, k]."""
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

    Of sums, not products of decays: where all are the same and nearly 1, so are their roundings,
    which would add up over all that a state remembers.
    """
    log_w, size = jnp.maximum(log_w, LOG_ZERO), log_w.shape[-2]
    if size == 1:
        return [jnp.exp(log_w)]
    counts = [size >> level for level in range(1, size.bit_length())]
    nodes = np.concatenate([np.kron(np.eye(n), np.ones(size // n)) for n in counts])
    above = jnp.split(jnp.exp(summed(nodes, log_w)), np.cumsum(counts)[:-1], -2)
    return [jnp.exp(log_w), *above]


def relate(x: Inputs, heads: Heads, docs: Documents | None) -> Scores:
    """The state-free part of a chunk."""
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
    x: Inputs, heads: Heads, s: Scores, state: Array, docs: Documents | None
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
    """What rows of documents that start in the chunk read from `initial`, and what is left of it at
    the end, if the last one does."""
    log_w = jnp.maximum(log_w, LOG_ZERO)
    since = summed(within(np.tri(r.shape[-2], k=-1, dtype=bool), docs), log_w)
    reading = r * jnp.exp(since) * (1 - docs.sees_state)
    kept = jnp.exp(over_rows(log_w * docs.reaches_end)) * (1 - docs.carries_on)
    initial = jnp.broadcast_to(initial, (*kept.shape[:-2], *initial.shape[-2:]))
    return dot(reading, initial), initial * transpose(kept)


def backward(
    x: Inputs,
    heads: Heads,
    s: Scores,
    state: Float[Array, "b h k v"],
    dy: Float[Array, "b h C v"],
    dstate: Float[Array, "b h k v"],
    docs: Documents | None,
) -> tuple[Inputs, Heads, Float[Array, "b h k v"]]:
    """Gradients of the chunk's inputs, of the heads' and of the state that entered it, from those
    of `y` and the state after."""
    dv = dot(transpose(s.scores), dy) + dot(s.writing, dstate)
    dscores = dot(dy, transpose(x.v))
    dreading, dwriting = dot(dy, transpose(state)), dot(x.v, transpose(dstate))
    if docs is not None:
        dscores = masked(docs.same, dscores)
        dreading, dwriting = dreading * docs.sees_state, dwriting * docs.reaches_end

    # Of the log decay over each node; what flows through a node flows through both its halves.
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
    dx = Inputs(dr, dlog_w, dwriting + own * u * x.r, dv)
    return dx, Heads(du, dinitial), dstate * s.total + dot(transpose(s.reading), dy)
