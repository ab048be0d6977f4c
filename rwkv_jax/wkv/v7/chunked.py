"""RWKV-7's WKV by chunks: matrix products inside a chunk, the state handed from chunk to chunk.

The backward pass recomputes each chunk from its inputs and the state that entered it, so one state
a chunk is kept, not one a token. The algebra is in `chunk.py`.
"""

from functools import partial
from typing import Any

import jax
from jax import lax

from rwkv_jax.typing import Array, Bool, Float
from rwkv_jax.wkv.v7 import chunk
from rwkv_jax.wkv.v7.chunk import Documents, Inputs

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
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h v k"]]:
    """`rwkv_jax.wkv.wkv7` by chunks."""
    outputs: Any = _over_chunks(CHUNK, Inputs(r, log_w, k, v, a, b), state, reset)
    return outputs


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over_chunks(size: int, x: Inputs, state: Array, reset: Array | None) -> tuple[Array, Array]:
    return _forward(size, x, state, reset)[0]


def _forward(size: int, x: Inputs, state: Array, reset: Array | None) -> tuple[tuple, tuple]:
    docs = chunk.documents(reset, size, state.dtype)

    def body(state: Array, inputs: tuple[Inputs, Documents | None]) -> tuple[Array, tuple]:
        x, docs = inputs
        y, after = chunk.forward(x, chunk.relate(x, docs), state, docs)
        return after, (y, state)

    cut = Inputs(*(chunk.cut(array, size) for array in x))
    after, (y, entering) = lax.scan(body, state, (cut, docs))
    return (chunk.join(y, x.r.shape[1]), after), (x, entering, reset)


def _backward(size: int, kept: tuple, cotangents: tuple) -> tuple[Inputs, Array, None]:
    x, entering, reset = kept
    dy, dstate = cotangents
    docs = chunk.documents(reset, size, dstate.dtype)

    def body(dstate: Array, inputs: tuple) -> tuple[Array, Inputs]:
        x, docs, state, dy = inputs
        gradients, dstate = chunk.backward(x, chunk.relate(x, docs), state, dy, dstate, docs)
        return dstate, gradients

    cut = Inputs(*(chunk.cut(array, size) for array in x))
    inputs = (cut, docs, entering, chunk.cut(dy, size))
    dstate, gradients = lax.scan(body, dstate, inputs, reverse=True)
    return Inputs(*(chunk.join(array, dy.shape[1]) for array in gradients)), dstate, None


_over_chunks.defvjp(_forward, _backward)
