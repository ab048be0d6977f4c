"""The algebra of one chunk of RWKV-7's WKV, forward and backward.

The chunk has C tokens (rows = time) and is entered with state S [v, k]. With g the cumulative log
decay, m half of its last value and u_t = S_{t-1} a_t the removed vectors:

    left  = [a e^{g - log w - m}; r e^{g - m}]   [2C, k]        right = [b; k] e^{m - g}   [2C, k]
    A     = left right^T, causal (strictly in the a rows)       Sm = S e^m
    U     = (I - A_ab)^-1 (left_a Sm^T + A_ak V)
    Y     = left_r Sm^T + [A_rb A_rk] [U; V]
    S'    = (Sm + [U; V]^T right) e^{g_C - m}

Centring on m keeps every exponent within half of the chunk's decay, so that the products neither
overflow nor lose precision; the upper triangle, which may be huge, is masked, never multiplied. The
triangular inverse is by exact block doubling: the usual product (I + L)(I + L^2)(I + L^4)... forms
powers of L that grow like binomials when a key repeats, and is wrong by 100 % in float32 at C = 32.

If a document starts inside the chunk, masks apply to A where documents differ, to the rows that may
not see S, to the columns that may not reach S', and to S itself. g and m are taken over each
document's own tokens, so that nothing of one document depends on another, not even its rounding.
State-tuned models start the document from `initial`, I: its rows read (left e^m) I^T, and S' keeps
I e^{g_C} of the last document, with the m and g of their own document.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from rwkv_jax.typing import Array, Float
from rwkv_jax.wkv import chunks
from rwkv_jax.wkv.chunks import DocumentIds, Documents, dot, masked, summed, transpose, within
from rwkv_jax.wkv.v7.recurrence import Tokens


class Scores(NamedTuple):
    """The state-independent part of a chunk."""

    left_scale: Array  # [2C, k]
    right_scale: Array  # [C, k]
    left: Array  # [2C, k]
    right: Array  # [2C, k]
    scores: Array  # A, masked [2C, 2C]
    inverse: Array  # (I - A_ab)^-1 [C, C]
    middle: Array  # m [1, k], or of each token's document [C, k]
    enter: Array  # e^m [1, k]
    leave: Array  # e^{g_C - m} [1, k]


def documents(ids: DocumentIds | None, dtype: jnp.dtype) -> Documents | None:
    """The masks of a chunk, or of all chunks, for its 2C rows (a; r) and columns (b; k)."""
    if ids is None:
        return None
    twice = jnp.concatenate([ids.tokens, ids.tokens], axis=-1)
    return chunks.documents(ids._replace(tokens=twice), dtype)


def causal(size: int) -> np.ndarray:
    """[2C, 2C]: the columns (b; k) that each row (a; r) sees: those of earlier tokens, and the r
    rows that of their own token, too."""
    row, column = np.arange(size)[:, None], np.arange(size)[None, :]
    before, upto = row > column, row >= column
    return np.block([[before, before], [upto, upto]])


def unit_inverse(lower: Float[Array, "*lanes C C"]) -> Float[Array, "*lanes C C"]:
    """(I - lower)^-1 of a strictly lower triangle, C a power of two, by block doubling.

    [[T1, 0], [T2 L21 T1, T2]] inverts [[I - L11, 0], [-L21, I - L22]] exactly, so that every entry
    that is formed is one of the result.
    """
    size = lower.shape[-1]
    row, column = np.arange(size)[:, None], np.arange(size)[None, :]
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
    block = 1
    while block < size:
        below = (row // block % 2 == 1) & (row // block == column // block + 1)
        link = masked(below, lower)
        inverse = inverse + (link if block == 1 else dot(dot(inverse, link), inverse))
        block *= 2
    return inverse


def relate(x: Tokens, docs: Documents | None) -> Scores:
    """The state-independent part of a chunk."""
    size = x.r.shape[-2]
    rows = token_rows(docs, size)
    g = summed(within(np.tri(size, dtype=bool), rows), x.log_w)
    total = g[..., -1:, :] if rows is None else summed(rows.same, x.log_w)
    # Only rounding depends on m: its gradient is zero and need not be computed.
    m = lax.stop_gradient(total / 2)
    left_scale = jnp.exp(jnp.concatenate([g - x.log_w - m, g - m], -2))
    right_scale = jnp.exp(m - g)
    left = jnp.concatenate([x.a, x.r], -2) * left_scale
    right = jnp.concatenate([x.b * right_scale, x.k * right_scale], -2)
    scores = masked(within(causal(size), docs), dot(left, transpose(right)))
    inverse = unit_inverse(scores[..., :size, :size])
    return Scores(
        left_scale,
        right_scale,
        left,
        right,
        scores,
        inverse,
        m,
        jnp.exp(m[..., :1, :]),
        jnp.exp(g[..., -1:, :] - m[..., -1:, :]),
    )


def token_rows(docs: Documents | None, size: int) -> Documents | None:
    """The masks of the C tokens, from those of 2C rows."""
    if docs is None:
        return None
    return docs._replace(
        same=docs.same[..., :size, :size],
        sees_state=docs.sees_state[..., :size, :],
        reaches_end=docs.reaches_end[..., :size, :],
    )


def late(s: Scores, docs: Documents) -> Float[Array, "*lanes rows k"]:
    """What the left rows of documents that start in the chunk are multiplied with to read `initial`
    [2C, k]: e^m; 0 for other rows."""
    return jnp.exp(jnp.concatenate([s.middle, s.middle], -2)) * (1 - docs.sees_state)


def kept(s: Scores, docs: Documents) -> Float[Array, "*lanes 1 k"]:
    """What `initial` is multiplied with to stand for S e^m: e^m of the last document; 0 if it did
    not start in the chunk."""
    return jnp.exp(s.middle[..., -1:, :]) * (1 - docs.carries_on)


def by_lane(initial: Array | None, docs: Documents | None, like: Array) -> Array | None:
    """`initial` for each of the lanes of `like`; None if no document can start from it."""
    if initial is None or docs is None:
        return None
    return jnp.broadcast_to(initial, (*like.shape[:-2], *initial.shape[-2:]))


def written(
    x: Tokens, s: Scores, sm: Array, docs: Documents | None, initial: Array | None
) -> tuple[Array, Array]:
    """[U; V], which the right columns carry, and what the left rows read from the state; both
    [2C, v]."""
    size = x.v.shape[-2]
    reading = dot(s.left, transpose(sm))
    if docs is not None:
        reading = reading * docs.sees_state
        if initial is not None:
            reading = reading + dot(s.left * late(s, docs), transpose(initial))
    removed = dot(s.inverse, reading[..., :size, :] + dot(s.scores[..., :size, size:], x.v))
    return jnp.concatenate([removed, x.v], -2), reading


def forward(
    x: Tokens,
    initial: Float[Array, "h v k"] | None,
    s: Scores,
    state: Array,
    docs: Documents | None,
) -> tuple[Array, Array]:
    """The chunk's `y` [C, v] and the state after it."""
    size = x.v.shape[-2]
    sm, right, initial = state * s.enter, s.right, by_lane(initial, docs, x.v)
    uv, reading = written(x, s, sm, docs, initial)
    y = reading[..., size:, :] + dot(s.scores[..., size:, :], uv)
    if docs is not None:
        sm, right = sm * docs.carries_on, right * docs.reaches_end
        if initial is not None:
            sm = sm + initial * kept(s, docs)
    return y, (sm + dot(transpose(uv), right)) * s.leave


def backward(
    x: Tokens,
    initial: Float[Array, "h v k"] | None,
    s: Scores,
    state: Float[Array, "b h v k"],
    dy: Float[Array, "b h C v"],
    dstate: Float[Array, "b h v k"],
    docs: Documents | None,
) -> tuple[Tokens, Float[Array, "h v k"] | None, Float[Array, "b h v k"]]:
    """Gradients of the chunk's inputs, of `initial` and of the state that entered it, from those of
    `y` and the state after.

    The decay's gradient is a conservation law: log w_t gets whatever flows through step t, that is,
    what enters the chunk's exponents at or after t. It restarts at every chunk, so that rounding
    errors do not accumulate.
    """
    size = x.v.shape[-2]
    sm, learnt = state * s.enter, by_lane(initial, docs, x.v)
    uv, _ = written(x, s, sm, docs, learnt)
    right = s.right if docs is None else s.right * docs.reaches_end
    dend = dstate * s.leave
    duv = dot(right, transpose(dend)) + dot(transpose(s.scores[..., size:, :]), dy)
    z = dot(transpose(s.inverse), duv[..., :size, :])
    dv = duv[..., size:, :] + dot(transpose(s.scores[..., :size, size:]), z)
    zdy = jnp.concatenate([z, dy], -2)
    dscores = masked(within(causal(size), docs), dot(zdy, transpose(uv)))
    dright_end = dot(uv, dend)
    dkept = dend
    if docs is not None:
        dright_end = dright_end * docs.reaches_end
        dkept = dend * docs.carries_on
    dreading = zdy if docs is None else zdy * docs.sees_state
    dleft = dot(dscores, s.right) + dot(dreading, sm)
    dright = dot(transpose(dscores), s.left) + dright_end
    dsm = dkept + dot(transpose(dreading), s.left)

    flow_end = jnp.sum(sm * dkept, -2, keepdims=True) + jnp.sum(
        s.right * dright_end, -2, keepdims=True
    )
    dinitial = None if initial is None else jnp.zeros_like(initial)
    if docs is not None and learnt is not None:
        reading, left_over = late(s, docs), kept(s, docs)
        dleft = dleft + dot(zdy, learnt) * reading
        flow_end = flow_end + jnp.sum(learnt * dend, -2, keepdims=True) * left_over
        dinitial = jnp.sum(dot(transpose(zdy), s.left * reading) + dend * left_over, 0)
    flow_left, flow_right = dleft * s.left, dright * s.right
    # The exponent of an a row is taken before token t's decay, that of all others after it.
    from_t = np.tri(size, dtype=bool).T
    after_t = np.tri(size, k=-1, dtype=bool).T
    rows = token_rows(docs, size)
    if docs is not None and rows is not None:
        flow_end = flow_end * rows.reaches_end
        docs = docs._replace(same=docs.same[..., :size, :])
    dlog_w = summed(within(np.hstack([after_t, from_t]), docs), flow_left)
    dlog_w = dlog_w - summed(within(np.hstack([from_t, from_t]), docs), flow_right) + flow_end
    dleft = dleft * s.left_scale
    gradients = Tokens(
        r=dleft[..., size:, :],
        log_w=dlog_w,
        k=dright[..., size:, :] * s.right_scale,
        v=dv,
        a=dleft[..., :size, :],
        b=dright[..., :size, :] * s.right_scale,
    )
    return gradients, dinitial, dsm * s.enter
