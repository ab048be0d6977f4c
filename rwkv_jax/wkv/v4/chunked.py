"""RWKV-4's WKV by chunks in order: the definition, keeping one state a chunk for its gradient.

The backward pass takes the chunks from the last to the first. It sweeps each forward again and then
back, so that only one chunk's intermediates are alive at a time. The algebra is in `sweeps.py`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array, Float, Shaped
from rwkv_jax.wkv.chunks import chunk_size
from rwkv_jax.wkv.form import Starts
from rwkv_jax.wkv.gradient import with_gradient
from rwkv_jax.wkv.v4 import sweeps
from rwkv_jax.wkv.v4.recurrence import Inputs, Wkv4State, in_place
from rwkv_jax.wkv.v4.sweeps import SweptBack, Tokens

CHUNK = 64


def chunks_first(x: Shaped[Array, "b chunks C c"]) -> Shaped[Array, "chunks C b c"]:
    return x.transpose(1, 2, 0, 3)


def merge_chunks(x: Float[Array, "chunks C b c"], t: int) -> Float[Array, "b t c"]:
    """The inverse of `split_chunks` and `chunks_first`, for `t` tokens."""
    chunks, size, b, c = x.shape
    return x.transpose(2, 0, 1, 3).reshape(b, chunks * size, c)[:, :t]


def forward(
    x: Inputs, state: Wkv4State, reset: Starts, size: int = CHUNK
) -> tuple[tuple[Array, Wkv4State], Wkv4State]:
    """(`y`, the state after), and the states that enter the chunks of `size` tokens."""
    t = x.k.shape[1]
    chunks = jax.tree.map(chunks_first, sweeps.tokens(x.k, x.v, reset, x.mask, chunk_size(size, t)))

    def chunk(state: Wkv4State, tokens: Tokens) -> tuple[Wkv4State, tuple[Array, Wkv4State]]:
        after, y = sweeps.sweep(x.log_w, x.u, tokens, state)
        return after, (y, state)

    last, (y, entering) = lax.scan(chunk, state, chunks)
    return (merge_chunks(y, t), last), entering


def backward(
    args: tuple[Inputs, Wkv4State, Array | None],
    residuals: tuple[tuple[Array, Wkv4State], Wkv4State],
    cotangents: tuple[Array, Wkv4State],
) -> tuple[Inputs, Wkv4State, None]:
    """Gradients of the arguments of `forward`, from those of `y` and the state after."""
    x, state, reset = args
    (y, last), entering = residuals
    dy, dlast = cotangents
    t = x.k.shape[1]
    size = chunk_size(CHUNK, t)
    chunks = jax.tree.map(chunks_first, sweeps.tokens(x.k, x.v, reset, x.mask, size))
    y, dy = (chunks_first(sweeps.split_chunks(z, size)) for z in (y, dy))

    def chunk(after: SweptBack, inputs: tuple) -> tuple[SweptBack, tuple[Array, Array]]:
        tokens, y, dy, entering = inputs
        reading = sweeps.readings(x.log_w, x.u, tokens, dy, entering)
        return sweeps.sweep_back(x.log_w, tokens, y, reading, after)

    zeros = jnp.zeros_like(last.num)
    after = SweptBack(sweeps.gradient_of_sums(dlast, last), zeros, zeros)
    before, gradients = lax.scan(chunk, after, (chunks, y, dy, entering), reverse=True)
    dk, dv = map(partial(merge_chunks, t=t), gradients)
    dx = Inputs(jnp.sum(before.log_w, 0), dk, dv, jnp.sum(before.u, 0))
    return dx, sweeps.gradient_of_state(before.grad, state), None


wkv4 = with_gradient(in_place, forward, backward, keeps_outputs=True)
"""The form by chunks of 64 tokens."""
