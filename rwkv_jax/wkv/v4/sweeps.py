"""RWKV-4's WKV token by token, forward and backward: the parts of its chunked forms.

A sweep is over the tokens of one chunk, for any number of chunks at once. The forward sweep is the
definition. For the backward pass only the states that enter chunks are kept; it sweeps a chunk
forward again for the states that tokens read, then back. With q_t = dy_t / denominator_t, and G_t
the gradient of (numerator, denominator) before token t,

    G_t  = (q_t, -q_t y_t) + w G_{t+1}              the same recurrence, run backwards
    dk_t = e^{k_t} <(v_t, 1), G_{t+1}> + e^{u+k_t} q_t (v_t - y_t)
    dv_t = e^{k_t} G_{t+1}[numerator] + e^{u+k_t} q_t
    du   = sum_t e^{u+k_t} q_t (v_t - y_t)
    d log w = sum_t w <S_t, G_{t+1}>

Each product of the last sum is also a difference of the other gradients: w <S_t, G_{t+1}> =
<S_t, G_t> + e^{u+k_t} q_t (v_t - y_t). Where w is small, that would be a difference of numbers that
are nearly equal.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array, Bool, Float
from rwkv_jax.wkv.v4.recurrence import LOG_ZERO, Wkv4State, absorb, blend, forget, read

LARGEST_EXPONENT = 80.0
"""Exponents of products that cannot exceed e^80 are clipped there: in float32 a masked product
would overflow, to 0 * inf."""


class Tokens(NamedTuple):
    """Tokens, in the order of the sweep: k, v [C, *lanes, c]; the masks [C, *lanes, 1] or None."""

    k: Array
    v: Array
    starts: Array | None
    padding: Array | None


def split_chunks(x: Array, size: int, fill: float | bool = 0) -> Array:
    """[b, t, c] -> [b, chunks, size, c], the last chunk padded with `fill`."""
    b, t, c = x.shape
    x = jnp.pad(x, ((0, 0), (0, -t % size), (0, 0)), constant_values=fill)
    return x.reshape(b, -1, size, c)


def tokens(
    k: Float[Array, "b t c"],
    v: Float[Array, "b t c"],
    reset: Bool[Array, "b t"] | None,
    mask: Bool[Array, "b t"] | None,
    size: int,
) -> Tokens:
    """Tokens in chunks, [b, chunks, C, ...]. Keys of padding are log 0: their weight is zero."""
    b, t, _ = k.shape
    starts = None if reset is None else split_chunks(reset[:, :, None], size)
    if mask is None and t % size:
        mask = jnp.ones((b, t), bool)
    if mask is None:
        return Tokens(split_chunks(k, size), split_chunks(v, size), starts, None)
    k = jnp.where(mask[:, :, None], k, LOG_ZERO)
    return Tokens(
        split_chunks(k, size, LOG_ZERO),
        split_chunks(v, size),
        starts,
        split_chunks(~mask[:, :, None], size, True),
    )


def row(vector: Array, x: Float[Array, "*lanes c"]) -> Array:
    """A vector [c] with leading axes of 1, to broadcast against `x`."""
    if vector.ndim == x.ndim:
        return vector
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def decay(log_w: Array, token: Tokens) -> Array:
    """log w of one step; zero where the token is padding."""
    log_w = row(log_w, token.k)
    if token.padding is None:
        return log_w
    return jnp.where(token.padding, jnp.zeros_like(log_w), log_w)


def meet(state: Wkv4State, token: Tokens) -> Wkv4State:
    """The state before the token: the empty one if it starts a document."""
    return state if token.starts is None else forget(state, token.starts)


def advance(state: Wkv4State, token: Tokens, log_w: Array) -> Wkv4State:
    """The state after the token; `state` is what `meet` returned."""
    return absorb(state, decay(log_w, token), token.k, token.v, jnp.ones_like(token.v))


def step(log_w: Array, u: Array, state: Wkv4State, token: Tokens) -> tuple[Wkv4State, Array]:
    """The state after a token, and its `y`."""
    state = meet(state, token)
    y = read(state, row(u, token.k), token.k, token.v)
    return advance(state, token, log_w), y


def sweep(log_w: Array, u: Array, x: Tokens, entering: Wkv4State) -> tuple[Wkv4State, Array]:
    """The state after the tokens, and `y` [C, *lanes, c]."""
    return lax.scan(partial(step, log_w, u), entering, x)


class Readings(NamedTuple):
    """What the backward sweeps need of how each token read the state; exponents are separate, to
    avoid overflow."""

    state: Wkv4State  # before the token
    exponent: Array  # of the denominator
    q: Array  # dy / denominator, without e^-exponent
    current: Array  # e^{u+k} q: the part of dv that comes from the token's own y
    gap: Array  # v - y, not by subtraction: with a strong bonus y rounds to v


def read_again(u: Array, state: Wkv4State, token: Tokens, dy: Array) -> Readings:
    """How a token read `state`, which is what `meet` returned."""
    top, old, new = blend(state.max_exp, row(u, token.k) + token.k)
    inverse = 1 / (old * state.den + new)
    q = dy * inverse
    gap = old * (state.den * token.v - state.num) * inverse
    return Readings(state, top, q, new * q, gap)


def readings(log_w: Array, u: Array, x: Tokens, dy: Array, entering: Wkv4State) -> Readings:
    """The readings, by a second forward sweep."""

    def step(state: Wkv4State, token: Tokens) -> tuple[Wkv4State, Wkv4State]:
        state = meet(state, token)
        return advance(state, token, log_w), state

    return read_again(u, lax.scan(step, entering, x)[1], x, dy)


def retreat(grad: Wkv4State, token: Tokens, y: Array, reading: Readings, log_w: Array) -> Wkv4State:
    """The gradient of the state before a step, from that of the state after it."""
    before = absorb(grad, decay(log_w, token), -reading.exponent, reading.q, -reading.q * y)
    return meet(before, token)


class SweptBack(NamedTuple):
    """What `sweep_back` carries from the last token to the first: gradients."""

    grad: Wkv4State  # of the state before the token
    log_w: Array  # summed so far
    u: Array  # summed so far


def step_back(
    log_w: Array, carry: SweptBack, inputs: tuple[Tokens, Array, Readings]
) -> tuple[SweptBack, tuple[Array, Array]]:
    """One token: the gradients before it, from those after it, and (dk, dv); `inputs` are the
    token, its y and its reading."""
    grad, dlog_w, du = carry
    token, y, reading = inputs
    scale = bounded_exp(token.k + grad.max_exp)
    own = reading.current * reading.gap
    dlog_w = dlog_w + zero_where(flow(reading.state, grad, log_w), token.padding)
    before = SweptBack(retreat(grad, token, y, reading, log_w), dlog_w, du + own)
    dk = scale * (token.v * grad.num + grad.den) + own
    return before, (dk, scale * grad.num + reading.current)


def sweep_back(
    log_w: Array, x: Tokens, y: Array, reading: Readings, after: SweptBack
) -> tuple[SweptBack, tuple[Array, Array]]:
    """All tokens, backwards: the gradients before the first, and (dk, dv) [C, *lanes, c]."""
    return lax.scan(partial(step_back, log_w), after, (x, y, reading), reverse=True)


def flow(state: Wkv4State, grad: Wkv4State, log_w: Array) -> Array:
    """w <S, G>: what the decay passes on, of a state before a step and a gradient after it."""
    factor = bounded_exp(state.max_exp + grad.max_exp + row(log_w, state.num))
    return (state.num * grad.num + state.den * grad.den) * factor


def bounded_exp(x: Array) -> Array:
    """e^x, at most e^`LARGEST_EXPONENT`."""
    return jnp.exp(jnp.minimum(x, LARGEST_EXPONENT))


def zero_where(x: Array, where: Array | None) -> Array:
    """`x` with zeros where the mask holds."""
    return x if where is None else jnp.where(where, jnp.zeros_like(x), x)


def gradient_of_sums(dlast: Wkv4State, last: Wkv4State) -> Wkv4State:
    """The gradient of (numerator, denominator) after the last token, from that of the state, whose
    `max_exp` is only a scale."""
    return Wkv4State(dlast.num, dlast.den, -last.max_exp)


def gradient_of_state(grad: Wkv4State, state: Wkv4State) -> Wkv4State:
    """The gradient of the initial state, from that of its sums."""
    scale = bounded_exp(state.max_exp + grad.max_exp)
    num, den = grad.num * scale, grad.den * scale
    return Wkv4State(num, den, num * state.num + den * state.den)
