"""RWKV-4's WKV token by token over any lanes, forward and backward: what its forms are made of.

The forward sweep is the definition. The backward pass keeps no state but those that enter chunks,
and sweeps a chunk forward once more for the denominators, then back. With q_t = dy_t /
denominator_t and G_t the gradient of the (numerator, denominator) that token t meets,

    G_t  = (q_t, -q_t y_t) + w G_{t+1}              the same recurrence, run backwards
    dk_t = e^{k_t} <(v_t, 1), G_{t+1}> + e^{u+k_t} q_t (v_t - y_t)
    dv_t = e^{k_t} G_{t+1}[numerator] + e^{u+k_t} q_t
    du   = sum_t e^{u+k_t} q_t (v_t - y_t)
    d log w = sum_t f_t,   f_t = w <S_t, G_{t+1}>

where f_t, what flows through step t, needs no state: <S_t, G_t> = f_t - e^{u+k_t} q_t (v_t - y_t),
because numerator - y * denominator is zero, and f_t = <S_{t+1}, G_{t+1}> - e^{k_t} <(v_t, 1),
G_{t+1}>. One scalar is carried, restarted exactly at every chunk so that rounding does not pile up.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array, Bool, Float
from rwkv_jax.wkv.v4.recurrence import LOG_ZERO, Wkv4State, absorb, blend, forget, read

LARGEST_EXPONENT = 80.0
"""Products that cannot exceed e^80 are cut there: a float32 overflow would make 0 * inf of a masked
one."""


class Tokens(NamedTuple):
    """Tokens in the order in which they are swept, over any lanes: k, v [C, *lanes, c]; the masks
    [C, *lanes, 1] or None."""

    k: Array
    v: Array
    starts: Array | None
    padding: Array | None


def cut(x: Array, size: int, fill: float | bool = 0) -> Array:
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
    """Everything cut into chunks, [b, chunks, C, ...]; padding has the key of weight zero."""
    b, t, _ = k.shape
    starts = None if reset is None else cut(reset[:, :, None], size)
    if mask is None and t % size:
        mask = jnp.ones((b, t), bool)
    if mask is None:
        return Tokens(cut(k, size), cut(v, size), starts, None)
    k = jnp.where(mask[:, :, None], k, LOG_ZERO)
    return Tokens(cut(k, size, LOG_ZERO), cut(v, size), starts, cut(~mask[:, :, None], size, True))


def row(vector: Array, x: Float[Array, "*lanes c"]) -> Array:
    """A vector [c] shaped to act on the last axis of `x`; what has the shape of `x` is left so."""
    if vector.ndim == x.ndim:
        return vector
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def decay(log_w: Array, token: Tokens) -> Array:
    """log w of one step: that of the channels, and zero where the token is padding."""
    log_w = row(log_w, token.k)
    if token.padding is None:
        return log_w
    return jnp.where(token.padding, jnp.zeros_like(log_w), log_w)


def meet(state: Wkv4State, token: Tokens) -> Wkv4State:
    """The state as the token finds it."""
    return state if token.starts is None else forget(state, token.starts)


def advance(state: Wkv4State, token: Tokens, log_w: Array) -> Wkv4State:
    """The state after one step; `state` as the token found it."""
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
    """What the backward sweeps need of each token's reading; exponents kept apart to avoid
    overflow."""

    exponent: Array  # of the denominator
    q: Array  # dy / denominator, without e^-exponent
    current: Array  # e^{u+k} q: what the token's own v gets from it
    gap: Array  # v - y, not as a difference: where the bonus is strong, y rounds to v


def step_again(
    log_w: Array, u: Array, state: Wkv4State, inputs: tuple[Tokens, Array]
) -> tuple[Wkv4State, Readings]:
    """The state after a token, and what its reading was; `inputs` are the token and dy."""
    token, dy = inputs
    state = meet(state, token)
    top, old, new = blend(state.max_exp, row(u, token.k) + token.k)
    inverse = 1 / (old * state.den + new)
    q = dy * inverse
    gap = old * (state.den * token.v - state.num) * inverse
    return advance(state, token, log_w), Readings(top, q, new * q, gap)


def readings(log_w: Array, u: Array, x: Tokens, dy: Array, entering: Wkv4State) -> Readings:
    """The forward sweep again, for the denominators."""
    return lax.scan(partial(step_again, log_w, u), entering, (x, dy))[1]


def retreat(grad: Wkv4State, token: Tokens, y: Array, reading: Readings, log_w: Array) -> Wkv4State:
    """The gradient of the state before a step, from that of the state after it."""
    before = absorb(grad, decay(log_w, token), -reading.exponent, reading.q, -reading.q * y)
    return meet(before, token)


class SweptBack(NamedTuple):
    """What `sweep_back` carries from token to token, from the last to the first."""

    grad: Wkv4State  # of the state that the token met
    log_w: Array  # its gradient so far
    u: Array  # its gradient so far


def step_back(
    log_w: Array, carry: tuple[SweptBack, Array], inputs: tuple[Tokens, Array, Readings]
) -> tuple[tuple[SweptBack, Array], tuple[Array, Array]]:
    """From after a token to before it: what is carried on, with the flow through the state, and
    (dk, dv); `inputs` are the token, its y and its reading."""
    (grad, dlog_w, du), flow = carry
    token, y, reading = inputs
    scale = jnp.exp(jnp.minimum(token.k + grad.max_exp, LARGEST_EXPONENT))
    stored = scale * (token.v * grad.num + grad.den)
    own = reading.current * reading.gap
    through = erase(flow - stored, token.starts)
    flow = erase(through - own, token.starts)
    dlog_w = dlog_w + erase(through, token.padding)
    before = SweptBack(retreat(grad, token, y, reading, log_w), dlog_w, du + own)
    return (before, flow), (stored + own, scale * grad.num + reading.current)


def sweep_back(
    log_w: Array, x: Tokens, y: Array, reading: Readings, end: Wkv4State, after: SweptBack
) -> tuple[SweptBack, tuple[Array, Array]]:
    """Backwards over the tokens from the state `end` and its gradient: what is carried on, and
    (dk, dv) [C, *lanes, c]."""
    carry = (after, pair(end, after.grad))
    step = partial(step_back, log_w)
    (before, _), gradients = lax.scan(step, carry, (x, y, reading), reverse=True)
    return before, gradients


def pair(state: Wkv4State, grad: Wkv4State) -> Array:
    """<S, G>: how much of the loss flows through the state."""
    exponent = jnp.minimum(state.max_exp + grad.max_exp, LARGEST_EXPONENT)
    return (state.num * grad.num + state.den * grad.den) * jnp.exp(exponent)


def erase(x: Array, where: Array | None) -> Array:
    """`x` with zeros where the mask holds."""
    return x if where is None else jnp.where(where, jnp.zeros_like(x), x)


def arriving(dlast: Wkv4State, last: Wkv4State) -> Wkv4State:
    """The gradient of the final sums, from that of the final state: `max_exp` is a scale."""
    return Wkv4State(dlast.num, dlast.den, -last.max_exp)


def of_state(grad: Wkv4State, state: Wkv4State) -> Wkv4State:
    """The inverse of `arriving`, for the state that the first token was given."""
    scale = jnp.exp(jnp.minimum(state.max_exp + grad.max_exp, LARGEST_EXPONENT))
    num, den = grad.num * scale, grad.den * scale
    return Wkv4State(num, den, num * state.num + den * state.den)
