"""RWKV-4's WKV token by token, forward and backward: the parts of its chunked forms.

A sweep is over the tokens of one chunk, for any number of chunks at once. The forward sweep is the
definition. For the backward pass only the states that enter chunks are kept; it sweeps a chunk
forward again for the denominators, then back. With q_t = dy_t / denominator_t, and G_t the gradient
of (numerator, denominator) before token t,

    G_t  = (q_t, -q_t y_t) + w G_{t+1}              the same recurrence, run backwards
    dk_t = e^{k_t} <(v_t, 1), G_{t+1}> + e^{u+k_t} q_t (v_t - y_t)
    dv_t = e^{k_t} G_{t+1}[numerator] + e^{u+k_t} q_t
    du   = sum_t e^{u+k_t} q_t (v_t - y_t)
    d log w = sum_t f_t,   f_t = w <S_t, G_{t+1}>

where f_t, the flow through the state at step t, needs no state: <S_t, G_t> = f_t - e^{u+k_t} q_t
(v_t - y_t), because numerator - y * denominator is zero, and f_t = <S_{t+1}, G_{t+1}> - e^{k_t}
<(v_t, 1), G_{t+1}>. One scalar is carried. It is recomputed from the state at every chunk, so that
rounding errors do not accumulate.
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

    exponent: Array  # of the denominator
    q: Array  # dy / denominator, without e^-exponent
    current: Array  # e^{u+k} q: the part of dv that comes from the token's own y
    gap: Array  # v - y, not by subtraction: with a strong bonus y rounds to v


def step_again(
    log_w: Array, u: Array, state: Wkv4State, inputs: tuple[Tokens, Array]
) -> tuple[Wkv4State, Readings]:
    """The state after a token, and its reading; `inputs` are the token and dy."""
    token, dy = inputs
    state = meet(state, token)
    top, old, new = blend(state.max_exp, row(u, token.k) + token.k)
    inverse = 1 / (old * state.den + new)
    q = dy * inverse
    gap = old * (state.den * token.v - state.num) * inverse
    return advance(state, token, log_w), Readings(top, q, new * q, gap)


def readings(log_w: Array, u: Array, x: Tokens, dy: Array, entering: Wkv4State) -> Readings:
    """The readings, by a second forward sweep."""
    return lax.scan(partial(step_again, log_w, u), entering, (x, dy))[1]


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
    log_w: Array, carry: tuple[SweptBack, Array], inputs: tuple[Tokens, Array, Readings]
) -> tuple[tuple[SweptBack, Array], tuple[Array, Array]]:
    """One token: the carry before it, from that after it, and (dk, dv). Carried are the gradients,
    and the flow through the state; `inputs` are the token, its y and its reading."""
    (grad, dlog_w, du), flow = carry
    token, y, reading = inputs
    scale = jnp.exp(jnp.minimum(token.k + grad.max_exp, LARGEST_EXPONENT))
    stored = scale * (token.v * grad.num + grad.den)
    own = reading.current * reading.gap
    through = zero_where(flow - stored, token.starts)
    flow = zero_where(through - own, token.starts)
    dlog_w = dlog_w + zero_where(through, token.padding)
    before = SweptBack(retreat(grad, token, y, reading, log_w), dlog_w, du + own)
    return (before, flow), (stored + own, scale * grad.num + reading.current)


def sweep_back(
    log_w: Array, x: Tokens, y: Array, reading: Readings, end: Wkv4State, after: SweptBack
) -> tuple[SweptBack, tuple[Array, Array]]:
    """All tokens, backwards from the state `end` and its gradient in `after`: the carry before the
    first token, and (dk, dv) [C, *lanes, c]."""
    carry = (after, inner(end, after.grad))
    step = partial(step_back, log_w)
    (before, _), gradients = lax.scan(step, carry, (x, y, reading), reverse=True)
    return before, gradients


def inner(state: Wkv4State, grad: Wkv4State) -> Array:
    """<S, G>, the flow through the state."""
    exponent = jnp.minimum(state.max_exp + grad.max_exp, LARGEST_EXPONENT)
    return (state.num * grad.num + state.den * grad.den) * jnp.exp(exponent)


def zero_where(x: Array, where: Array | None) -> Array:
    """`x` with zeros where the mask holds."""
    return x if where is None else jnp.where(where, jnp.zeros_like(x), x)


def gradient_of_sums(dlast: Wkv4State, last: Wkv4State) -> Wkv4State:
    """The gradient of (numerator, denominator) after the last token, from that of the state, whose
    `max_exp` is only a scale."""
    return Wkv4State(dlast.num, dlast.den, -last.max_exp)


def gradient_of_state(grad: Wkv4State, state: Wkv4State) -> Wkv4State:
    """The gradient of the initial state, from that of its sums."""
    scale = jnp.exp(jnp.minimum(state.max_exp + grad.max_exp, LARGEST_EXPONENT))
    num, den = grad.num * scale, grad.den * scale
    return Wkv4State(num, den, num * state.num + den * state.den)
