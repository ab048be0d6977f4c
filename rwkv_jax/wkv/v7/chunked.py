"""RWKV-7's WKV by chunks: matrix products inside a chunk, the state handed from chunk to chunk.

The backward pass recomputes each chunk from its inputs and the state that entered it, so one state
a chunk is kept, not one a token. The algebra is in `chunk.py`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rwkv_jax.remat import keep
from rwkv_jax.typing import Array, Bool, Float
from rwkv_jax.wkv.chunks import in_chunks, pad, put, take
from rwkv_jax.wkv.reverse import reverse_only
from rwkv_jax.wkv.v7 import chunk, tokens
from rwkv_jax.wkv.v7.chunk import Inputs

CHUNK = 32


def wkv7(
    r: Float[Array, "b t h k"],
    log_w: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    a: Float[Array, "b t h k"],
    b: Float[Array, "b t h k"],
    state: Float[Array, "b h v k"],
    reset: Bool[Array, "b t"] | None,
    *,
    by_token: bool = False,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h v k"]]:
    """`rwkv_jax.wkv.wkv7` by chunks; with `by_token`, token by token on a CPU where no gradient is
    taken."""
    x = Inputs(r, log_w, k, v, a, b)
    x, state = reverse_only("wkv7", (x, state), "'scan' or 'associative'")
    outputs: Any = _over_chunks(CHUNK, by_token, x, state, reset)
    return outputs


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _over_chunks(size: int, by_token: bool, x: Inputs, state: Array, reset: Array | None):
    def chunks() -> tuple[Array, Array]:
        return _forward(size, by_token, x, state, reset)[0]

    if not by_token:
        return chunks()
    return lax.platform_dependent(cpu=partial(tokens.wkv7, x, state, reset), default=chunks)


def _forward(size: int, by_token: bool, x: Inputs, state: Array, reset: Array | None):
    padded, steps = in_chunks(size, x, reset)

    # Chunks are sliced from the time axis as they are needed: cutting all of them beforehand would
    # transpose and so copy every array.
    def body(carry: tuple[Array, Array], step: tuple) -> tuple[tuple, Array]:
        state, y = carry
        i, ids = step
        x = Inputs(*(take(array, i, size) for array in padded))
        docs = chunk.documents(ids, state.dtype)
        out, after = chunk.forward(x, chunk.relate(x, docs), state, docs)
        return (after, put(y, out, i)), state

    (after, y), entering = lax.scan(body, (state, jnp.zeros_like(padded.v)), steps)
    y, entering = keep(y[:, : x.v.shape[1]]), keep(entering)
    return (y, after), (x, entering, reset)


def _backward(
    size: int, by_token: bool, kept: tuple, cotangents: tuple
) -> tuple[Inputs, Array, None]:
    x, entering, reset = kept
    dy, dstate = cotangents
    padded, steps = in_chunks(size, x, reset)
    dy = pad(dy, size)

    def body(carry: tuple[Array, Inputs], step: tuple) -> tuple[tuple, None]:
        dstate, out = carry
        (i, ids), state = step
        x = Inputs(*(take(array, i, size) for array in padded))
        docs = chunk.documents(ids, state.dtype)
        scores = chunk.relate(x, docs)
        gradients, dstate = chunk.backward(x, scores, state, take(dy, i, size), dstate, docs)
        out = jax.tree.map(lambda into, x: put(into, x, i), out, gradients)
        return (dstate, out), None

    carry = (dstate, Inputs(*(jnp.zeros_like(array) for array in padded)))
    (dstate, gradients), _ = lax.scan(body, carry, (steps, entering), reverse=True)
    return Inputs(*(array[:, : x.v.shape[1]] for array in gradients)), dstate, None


_over_chunks.defvjp(_forward, _backward)
