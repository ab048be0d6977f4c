"""RWKV-4's WKV as it is defined: one token after another, in log space."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rwkv_jax.typing import Array, Bool, Float
from rwkv_jax.wkv.form import Starts
from rwkv_jax.wkv.loops import loop_tokens, scan_tokens

LOG_ZERO = -1e38
"""Stands for log 0: survives additions in float32 without becoming -inf, whose differences are
NaN."""


class Inputs(NamedTuple):
    """The operator's inputs: log_w, u [c]; k, v [b, t, c]; mask [b, t], where tokens are valid."""

    log_w: Array
    k: Array
    v: Array
    u: Array
    mask: Array | None = None


class Wkv4State(NamedTuple):
    """Numerator and denominator as `num * exp(max_exp)` and `den * exp(max_exp)`; each [b, c]."""

    num: Array
    den: Array
    max_exp: Array

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: Any = jnp.float32) -> "Wkv4State":
        """The state before the first token of a document."""
        zeros = jnp.zeros(shape, dtype)
        return cls(zeros, zeros, jnp.full(shape, LOG_ZERO, dtype))


def blend(p: Array, q: Array) -> tuple[Array, Array, Array]:
    """`max(p, q)`, and the factors that rescale values with exponents p and q to it; by one
    exponential."""
    small = jnp.exp(-jnp.abs(p - q))
    one = jnp.ones_like(small)
    return jnp.maximum(p, q), jnp.where(p >= q, one, small), jnp.where(p >= q, small, one)


def absorb(state: Wkv4State, log_w: Array, exponent: Array, num: Array, den: Array) -> Wkv4State:
    """The state decayed once, plus (num, den) e^exponent."""
    top, keep, add = blend(state.max_exp + log_w, exponent)
    return Wkv4State(keep * state.num + add * num, keep * state.den + add * den, top)


def read(state: Wkv4State, u: Array, k: Array, v: Array) -> Array:
    """`y` of a token, given the state before it."""
    _, old, new = blend(state.max_exp, u + k)
    return (old * state.num + new * v) / (old * state.den + new)


def forget(state: Wkv4State, starts: Bool[Array, "..."]) -> Wkv4State:
    """The empty state where a document starts, `state` elsewhere."""
    zero = jnp.zeros_like(state.num)
    return Wkv4State(
        jnp.where(starts, zero, state.num),
        jnp.where(starts, zero, state.den),
        jnp.where(starts, zero + LOG_ZERO, state.max_exp),
    )


def step(
    log_w: Float[Array, " c"],
    k: Float[Array, "b c"],
    v: Float[Array, "b c"],
    u: Float[Array, " c"],
    state: Wkv4State,
) -> tuple[Float[Array, "b c"], Wkv4State]:
    """One token: `y` and the state after it."""
    y = read(state, u[None], k, v)
    return y, absorb(state, log_w[None], k, v, jnp.ones_like(v))


def token(
    log_w: Float[Array, " c"], u: Float[Array, " c"], state: Wkv4State, inputs: tuple
) -> tuple[Wkv4State, Float[Array, "b c"]]:
    """`step` as the body of a loop; `inputs` are k, v, where the token starts a document, and where
    it is valid (not padding)."""
    k, v, starts, valid = inputs
    if starts is not None:
        state = forget(state, starts[:, None])
    y, after = step(log_w, k, v, u, state)
    if valid is not None:
        after = jax.tree.map(lambda x, y: jnp.where(valid[:, None], x, y), after, state)
    return after, y


def scan(x: Inputs, state: Wkv4State, reset: Starts) -> tuple[Float[Array, "b t c"], Wkv4State]:
    """The form by `lax.scan`. Its gradient keeps every state: O(t) of them."""
    return scan_tokens(partial(token, x.log_w, x.u), (x.k, x.v, reset, x.mask), state)


def in_place(x: Inputs, state: Wkv4State, reset: Starts) -> tuple[Float[Array, "b t c"], Wkv4State]:
    """The form for a CPU where no gradient is taken; not for differentiation."""
    body = partial(token, x.log_w, x.u)
    return loop_tokens(body, (x.k, x.v, reset, x.mask), state, jnp.zeros_like(x.v))
