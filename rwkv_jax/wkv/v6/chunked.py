"""RWKV-5's and 6's WKV by chunks: matrix products inside a chunk, the state handed from chunk to
chunk.

The backward pass recomputes each chunk from its inputs and the state that entered it, so one state
a chunk is kept, not one a token. The algebra is in `chunk.py`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from rwkv_jax.remat import keep
from rwkv_jax.typing import Array, Bool, Float
from rwkv_jax.wkv.chunks import documents, in_chunks, pad, put, take, transpose
from rwkv_jax.wkv.reverse import reverse_only
from rwkv_jax.wkv.v6 import chunk
from rwkv_jax.wkv.v6.chunk import Heads, Inputs

CHUNK = 32


def wkv6(
    r: Float[Array, "b t h k"],
    log_w: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    u: Float[Array, "h k"],
    state: Float[Array, "b h v k"],
    reset: Bool[Array, "b t"] | None,
    initial: Float[Array, "h v k"] | None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h v k"]]:
    """`rwkv_jax.wkv.wkv6` by chunks of 32."""
    x, heads = Inputs(r, log_w, k, v), Heads.of(u, initial)
    x, heads, state = reverse_only("wkv6", (x, heads, state), "'scan' or 'associative'")
    y, after = _over_chunks(CHUNK, x, heads, transpose(state), reset)
    return y, transpose(after)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over_chunks(size: int, x: Inputs, heads: Heads, state: Array, reset: Array | None):
    return _forward(size, x, heads, state, reset)[0]


def _forward(size: int, x: Inputs, heads: Heads, state: Array, reset: Array | None):
    padded, steps = in_chunks(size, x, reset)

    # Chunks are sliced from the time axis as they are needed: cutting all of them beforehand would
    # transpose and so copy every array.
    def body(carry: tuple[Array, Array], step: tuple) -> tuple[tuple, Array]:
        state, y = carry
        i, ids = step
        x = Inputs(*(take(array, i, size) for array in padded))
        docs = documents(ids, state.dtype)
        out, after = chunk.forward(x, heads, chunk.relate(x, heads, docs), state, docs)
        return (after, put(y, out, i)), state

    (after, y), entering = lax.scan(body, (state, jnp.zeros_like(padded.v)), steps)
    y, entering = keep(y[:, : x.v.shape[1]]), keep(entering)
    return (y, after), (x, heads, entering, reset)


def _backward(size: int, kept: tuple, cotangents: tuple) -> tuple[Inputs, Heads, Array, None]:
    x, heads, entering, reset = kept
    dy, dstate = cotangents
    padded, steps = in_chunks(size, x, reset)
    dy = pad(dy, size)

    def body(carry: tuple, step: tuple) -> tuple[tuple, None]:
        dstate, dheads, out = carry
        (i, ids), state = step
        x = Inputs(*(take(array, i, size) for array in padded))
        docs = documents(ids, state.dtype)
        scores = chunk.relate(x, heads, docs)
        dx, more, dstate = chunk.backward(
            x, heads, scores, state, take(dy, i, size), dstate, docs
        )
        out = jax.tree.map(lambda into, x: put(into, x, i), out, dx)
        return (dstate, jax.tree.map(jnp.add, dheads, more), out), None

    zeros = jax.tree.map(jnp.zeros_like, (heads, padded))
    (dstate, dheads, dx), _ = lax.scan(body, (dstate, *zeros), (steps, entering), reverse=True)
    return Inputs(*(array[:, : x.v.shape[1]] for array in dx)), dheads, dstate, None


_over_chunks.defvjp(_forward, _backward)
