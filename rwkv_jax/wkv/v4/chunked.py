"""RWKV-4's WKV by chunks: every chunk swept at once, in two sweeps of C steps instead of one of T.

Sweep 1 starts every chunk from the empty state and leaves its summary. The summaries are joined in
order, which gives the state that enters each chunk. Sweep 2 starts from those and emits y.

The backward pass keeps the states that enter chunks and nothing else of the recurrence. With
q_t = dy_t / denominator_t and G_t the gradient of the (numerator, denominator) that token t meets,

    G_t  = (q_t, -q_t y_t) + w G_{t+1}                              the same recurrence, run
    backwards dk_t = e^{k_t} <(v_t, 1), G_{t+1}> + e^{u+k_t} q_t (v_t - y_t)
    dv_t = e^{k_t} G_{t+1}[numerator] + e^{u+k_t} q_t
    du   = sum_t e^{u+k_t} q_t (v_t - y_t)
    d log w = sum_t f_t,   f_t = w <S_t, G_{t+1}>

where f_t, what flows through step t, needs no state: <S_t, G_t> = f_t - e^{u+k_t} q_t (v_t - y_t),
because numerator - y * denominator is zero, and f_t = <S_{t+1}, G_{t+1}> - e^{k_t} <(v_t, 1),
G_{t+1}>. One scalar is carried, restarted exactly at every chunk so that rounding does not pile up.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rwkv_jax.remat import keep
from rwkv_jax.typing import Array, Bool, Float
from rwkv_jax.wkv.v4.scan import LOG_ZERO, Wkv4State, absorb, blend, forget, read

CHUNK = 64
LARGEST_EXPONENT = 80.0
"""Products that cannot exceed e^80 are cut there: a float32 overflow would make 0 * inf of a masked
one."""


class Steps(NamedTuple):
    """Tokens as C steps over all chunks: k, v [C, b, chunks, c]; the masks [C, b, chunks, 1] or
    None."""

    k: Array
    v: Array
    starts: Array | None
    padding: Array | None


def wkv4(
    log_w: Float[Array, " c"],
    k: Float[Array, "b t c"],
    v: Float[Array, "b t c"],
    u: Float[Array, " c"],
    state: Wkv4State,
    reset: Bool[Array, "b t"] | None,
) -> tuple[Float[Array, "b t c"], Wkv4State]:
    """`rwkv_jax.wkv.wkv4` by chunks of 64."""
    y, after = _over_chunks(log_w, k, v, u, state, reset)
    return y, after


def cut(x: Array, fill: float | int = 0) -> Array:
    """[b, t, c] -> [C, b, chunks, c], the last chunk padded with `fill`."""
    b, t, c = x.shape
    x = jnp.pad(x, ((0, 0), (0, -t % CHUNK), (0, 0)), constant_values=fill)
    return jnp.moveaxis(x.reshape(b, -1, CHUNK, c), 2, 0)


def join(x: Array, t: int) -> Array:
    """The inverse of `cut`."""
    size, b, chunks, c = x.shape
    return jnp.moveaxis(x, 0, 2).reshape(b, chunks * size, c)[:, :t]


def steps(k: Array, v: Array, reset: Bool[Array, "b t"] | None) -> Steps:
    """The tokens cut into chunks. Padding has log 0 for its key and, in `decay_of`, no decay."""
    b, t, _ = k.shape
    starts = None if reset is None else cut(reset[:, :, None])
    padding = None
    if t % CHUNK:
        position = jnp.arange(t + -t % CHUNK)[None, :, None]
        padding = cut(jnp.broadcast_to(position >= t, (b, position.shape[1], 1)))
    return Steps(cut(k, LOG_ZERO), cut(v), starts, padding)


def decay_of(log_w: Array, padding: Array | None) -> Array:
    """log w of one step, [1, 1, c] or with zeros where the token is padding."""
    log_w = log_w[None, None, :]
    return log_w if padding is None else jnp.where(padding, jnp.zeros_like(log_w), log_w)


def meet(state: Wkv4State, starts: Array | None) -> Wkv4State:
    """The state as the token finds it."""
    return state if starts is None else forget(state, starts)


def advance(state: Wkv4State, token: Steps, log_w: Array) -> Wkv4State:
    """The state after one step of every chunk; `state` as the token found it."""
    decay = decay_of(log_w, token.padding)
    return absorb(state, decay, token.k, token.v, jnp.ones_like(token.v))


def combine(first: Wkv4State, decay: Array, second: Wkv4State) -> Wkv4State:
    """`first` decayed by e^decay, plus `second`."""
    top, old, new = blend(first.max_exp + decay, second.max_exp)
    return Wkv4State(old * first.num + new * second.num, old * first.den + new * second.den, top)


def chunk_decay(log_w: Array, x: Steps) -> Array:
    """The log decay over each whole chunk [b, chunks, c]; log 0 where a document starts inside."""
    _, b, chunks, c = x.k.shape
    length = jnp.full((b, chunks, 1), x.k.shape[0], log_w.dtype)
    if x.padding is not None:
        length = length - jnp.sum(x.padding, axis=0, dtype=log_w.dtype)
    decay = length * log_w[None, None, :]
    if x.starts is not None:
        decay = jnp.where(jnp.any(x.starts, axis=0), jnp.full_like(decay, LOG_ZERO), decay)
    return jnp.broadcast_to(decay, (b, chunks, c))


def summaries(log_w: Array, x: Steps) -> Wkv4State:
    """What each chunk adds to a state that enters it, [b, chunks, c]: sweep 1."""

    def step(state: Wkv4State, token: Steps) -> tuple[Wkv4State, None]:
        return advance(meet(state, token.starts), token, log_w), None

    return lax.scan(step, Wkv4State.empty(x.k.shape[1:], x.k.dtype), x)[0]


def in_order(
    decay: Array, parts: Wkv4State, state: Wkv4State, reverse: bool = False
) -> tuple[Wkv4State, Wkv4State]:
    """The state that enters each chunk [b, chunks, c], and the one that leaves the last."""

    def step(state: Wkv4State, chunk: tuple[Array, Wkv4State]) -> tuple[Wkv4State, Wkv4State]:
        return combine(state, *chunk), state

    chunks_first = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (decay, parts))
    last, entering = lax.scan(step, state, chunks_first, reverse=reverse)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), entering), last


@jax.custom_vjp
def _over_chunks(log_w, k, v, u, state, reset):
    return _forward(log_w, k, v, u, state, reset)[0]


def _forward(log_w, k, v, u, state, reset):
    x = steps(k, v, reset)
    entering, last = in_order(chunk_decay(log_w, x), summaries(log_w, x), state)

    def step(state: Wkv4State, token: Steps) -> tuple[Wkv4State, Array]:
        state = meet(state, token.starts)
        y = read(state, u[None, None], token.k, token.v)
        return advance(state, token, log_w), y

    y = join(lax.scan(step, entering, x)[1], k.shape[1])
    y, entering, last = keep((y, entering, last))
    return (y, last), (log_w, k, v, u, state, reset, y, entering, last)


class Readings(NamedTuple):
    """What the backward sweeps need of each token's reading; exponents kept apart to avoid
    overflow."""

    exponent: Array  # of the denominator
    q: Array  # dy / denominator, without e^-exponent
    share: Array  # e^{u+k}, relative to e^exponent
    gap: Array  # v - y, not as a difference: where the bonus is strong, y rounds to v


def readings(log_w: Array, u: Array, x: Steps, dy: Array, entering: Wkv4State) -> Readings:
    """The forward sweep again, for the denominators."""

    def step(state: Wkv4State, inputs: tuple[Steps, Array]) -> tuple[Wkv4State, Readings]:
        token, dy = inputs
        state = meet(state, token.starts)
        top, old, new = blend(state.max_exp, u[None, None] + token.k)
        inverse = 1 / (old * state.den + new)
        gap = old * (state.den * token.v - state.num) * inverse
        reading = Readings(top, dy * inverse, new, gap)
        return advance(state, token, log_w), reading

    return lax.scan(step, entering, (x, dy))[1]


def retreat(grad: Wkv4State, token: Steps, y: Array, reading: Readings, log_w: Array) -> Wkv4State:
    """The gradient of the state before a step, from that of the state after it."""
    decay = decay_of(log_w, token.padding)
    before = absorb(grad, decay, -reading.exponent, reading.q, -reading.q * y)
    return meet(before, token.starts)


def pair(state: Wkv4State, grad: Wkv4State) -> Array:
    """<S, G>: how much of the loss flows through the state."""
    exponent = jnp.minimum(state.max_exp + grad.max_exp, LARGEST_EXPONENT)
    return (state.num * grad.num + state.den * grad.den) * jnp.exp(exponent)


def _backward(kept, cotangents):
    log_w, k, v, u, state, reset, y, entering, last = kept
    dy, dlast = cotangents
    x = steps(k, v, reset)
    y = cut(y)
    reading = readings(log_w, u, x, cut(dy), entering)

    def summarise(grad: Wkv4State, inputs: tuple) -> tuple[Wkv4State, None]:
        token, y, reading = inputs
        return retreat(grad, token, y, reading, log_w), None

    empty = Wkv4State.empty(x.k.shape[1:], k.dtype)
    parts, _ = lax.scan(summarise, empty, (x, y, reading), reverse=True)
    arriving = Wkv4State(dlast.num, dlast.den, -last.max_exp)
    leaving, dstate = in_order(chunk_decay(log_w, x), parts, arriving, reverse=True)
    ends = jax.tree.map(lambda e, s: jnp.concatenate([e[:, 1:], s[:, None]], 1), entering, last)

    def step(carry: tuple, inputs: tuple) -> tuple[tuple, tuple]:
        grad, flow, dlog_w = carry
        token, y, reading = inputs
        scale = jnp.exp(jnp.minimum(token.k + grad.max_exp, LARGEST_EXPONENT))
        stored = scale * (token.v * grad.num + grad.den)
        current = reading.share * reading.q * reading.gap
        dv = scale * grad.num + reading.share * reading.q
        through = flow - stored
        if token.starts is not None:
            through = jnp.where(token.starts, jnp.zeros_like(through), through)
        if token.padding is None:
            dlog_w = dlog_w + through
        else:
            dlog_w = dlog_w + jnp.where(token.padding, jnp.zeros_like(through), through)
        flow = through - current
        if token.starts is not None:
            flow = jnp.where(token.starts, jnp.zeros_like(flow), flow)
        return (retreat(grad, token, y, reading, log_w), flow, dlog_w), (
            stored + current,
            dv,
            current,
        )

    carry = (leaving, pair(ends, leaving), jnp.zeros_like(empty.num))
    (_, _, dlog_w), (dk, dv, du) = lax.scan(step, carry, (x, y, reading), reverse=True)
    scale = jnp.exp(jnp.minimum(state.max_exp + dstate.max_exp, LARGEST_EXPONENT))
    dnum, dden = dstate.num * scale, dstate.den * scale
    dmax_exp = dnum * state.num + dden * state.den
    t = k.shape[1]
    return (
        jnp.sum(dlog_w, (0, 1)),
        join(dk, t),
        join(dv, t),
        jnp.sum(du, (0, 1, 2)),
        Wkv4State(dnum, dden, dmax_exp),
        None,
    )


_over_chunks.defvjp(_forward, _backward)
