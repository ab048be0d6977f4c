"""RWKV-4's WKV by chunks in order: the definition, keeping for its gradient one state a chunk.

A chunk is swept forward again for its gradient, and back, before the one before it: what is alive
at a time is of one chunk. The algebra is in `sweeps.py`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array, Bool, Float
from rwkv_jax.wkv.chunks import fit
from rwkv_jax.wkv.gradient import with_gradient
from rwkv_jax.wkv.reverse import reverse_only
from rwkv_jax.wkv.tokens import in_place
from rwkv_jax.wkv.v4.recurrence import Wkv4State, token
from rwkv_jax.wkv.v4.sweeps import (
    SweptBack,
    Tokens,
    arriving,
    cut,
    of_state,
    readings,
    sweep,
    sweep_back,
    tokens,
)

CHUNK = 64


def wkv4(
    log_w: Float[Array, " c"],
    k: Float[Array, "b t c"],
    v: Float[Array, "b t c"],
    u: Float[Array, " c"],
    state: Wkv4State,
    reset: Bool[Array, "b t"] | None,
    mask: Bool[Array, "b t"] | None,
) -> tuple[Float[Array, "b t c"], Wkv4State]:
    """`rwkv_jax.wkv.wkv4` by chunks of 64."""
    log_w, k, v, u, state = reverse_only("wkv4", (log_w, k, v, u, state))
    return _over_chunks(log_w, k, v, u, state, reset, mask)


def without_gradient(
    log_w: Float[Array, " c"],
    k: Float[Array, "b t c"],
    v: Float[Array, "b t c"],
    u: Float[Array, " c"],
    state: Wkv4State,
    reset: Bool[Array, "b t"] | None,
    mask: Bool[Array, "b t"] | None,
) -> tuple[Float[Array, "b t c"], Wkv4State]:
    """`rwkv_jax.wkv.wkv4` token by token: there is nothing to keep. Not to be differentiated."""
    return in_place(partial(token, log_w, u), (k, v, reset, mask), state, jnp.zeros_like(v))


def in_order(x: Array) -> Array:
    """[b, chunks, C, c] -> [chunks, C, b, c]."""
    return x.transpose(1, 2, 0, 3)


def join(x: Float[Array, "chunks C b c"], t: int) -> Float[Array, "b t c"]:
    """The inverse of `cut` and `in_order`."""
    chunks, size, b, c = x.shape
    return x.transpose(2, 0, 1, 3).reshape(b, chunks * size, c)[:, :t]


def forward(log_w, k, v, u, state, reset, mask, size=CHUNK):
    """(`y`, the state after), and the states that enter the chunks of `size`."""
    size = fit(size, k.shape[1])
    x = jax.tree.map(in_order, tokens(k, v, reset, mask, size))

    def chunk(state: Wkv4State, x: Tokens) -> tuple[Wkv4State, tuple[Array, Wkv4State]]:
        after, y = sweep(log_w, u, x, state)
        return after, (y, state)

    last, (y, entering) = lax.scan(chunk, state, x)
    return (join(y, k.shape[1]), last), entering


def backward(given, kept, cotangents):
    """Gradients of what `forward` was given, from those of `y` and the state after."""
    log_w, k, v, u, state, reset, mask = given
    (y, last), entering = kept
    dy, dlast = cotangents
    size = fit(CHUNK, k.shape[1])
    x = jax.tree.map(in_order, tokens(k, v, reset, mask, size))
    y, dy = (in_order(cut(z, size)) for z in (y, dy))

    def chunk(carry: tuple[SweptBack, Wkv4State], inputs: tuple) -> tuple[tuple, tuple]:
        after, end = carry
        x, y, dy, entering = inputs
        reading = readings(log_w, u, x, dy, entering)
        before, gradients = sweep_back(log_w, x, y, reading, end, after)
        return (before, entering), gradients

    zeros = jnp.zeros_like(last.num)
    carry = (SweptBack(arriving(dlast, last), zeros, zeros), last)
    (before, _), gradients = lax.scan(chunk, carry, (x, y, dy, entering), reverse=True)
    dk, dv = map(partial(join, t=k.shape[1]), gradients)
    dlog_w, du = jnp.sum(before.log_w, 0), jnp.sum(before.u, 0)
    return dlog_w, dk, dv, du, of_state(before.grad, state), None, None


_over_chunks = with_gradient(without_gradient, forward, backward, keeps_outputs=True)
