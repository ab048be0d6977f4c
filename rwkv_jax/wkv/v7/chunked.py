"""RWKV-7's WKV by chunks: matrix products inside a chunk, the state handed from chunk to chunk.

The backward pass recomputes each chunk from its inputs and the state that entered it, so one state
a chunk is kept, not one a token. The algebra is in `chunk.py`.
"""

import jax
import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array, Bool, Float
from rwkv_jax.wkv.chunks import fit, in_chunks, pad, put, take
from rwkv_jax.wkv.gradient import outputs_of, with_gradient
from rwkv_jax.wkv.reverse import reverse_only
from rwkv_jax.wkv.v7 import algebra
from rwkv_jax.wkv.v7.algebra import Inputs

CHUNK = 32
FORWARD_MODE = "'scan' or 'associative'"
"""The forms that know forward-mode differentiation."""


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
    """`rwkv_jax.wkv.wkv7` by chunks of 32."""
    x, state = reverse_only("wkv7", (Inputs(r, log_w, k, v, a, b), state), FORWARD_MODE)
    return _over_chunks(x, state, reset)


def forward(
    x: Inputs,
    state: Float[Array, "b h v k"],
    reset: Bool[Array, "b t"] | None,
    size: int = CHUNK,
) -> tuple[tuple[Array, Array], Array]:
    """(`y`, the state after), and the states that enter the chunks of `size`."""
    size = fit(size, x.r.shape[1])
    padded, steps = in_chunks(size, x, reset)

    # Chunks are sliced from the time axis as they are needed: cutting all of them beforehand would
    # transpose and so copy every array.
    def body(carry: tuple[Array, Array], step: tuple) -> tuple[tuple, Array]:
        state, y = carry
        i, ids = step
        x = Inputs(*(take(array, i, size) for array in padded))
        docs = algebra.documents(ids, state.dtype)
        out, after = algebra.forward(x, algebra.relate(x, docs), state, docs)
        return (after, put(y, out, i)), state

    (after, y), entering = lax.scan(body, (state, jnp.zeros_like(padded.v)), steps)
    return (y[:, : x.v.shape[1]], after), entering


def backward(
    given: tuple[Inputs, Array, Array | None],
    entering: Float[Array, "chunks b h v k"],
    cotangents: tuple[Array, Array],
    size: int = CHUNK,
) -> tuple[Inputs, Array, None]:
    """Gradients of what `forward` was given, from those of `y` and the state after."""
    x, _, reset = given
    dy, dstate = cotangents
    size = fit(size, x.r.shape[1])
    padded, steps = in_chunks(size, x, reset)
    dy = pad(dy, size)

    def body(carry: tuple[Array, Inputs], step: tuple) -> tuple[tuple, None]:
        dstate, out = carry
        (i, ids), state = step
        x = Inputs(*(take(array, i, size) for array in padded))
        docs = algebra.documents(ids, state.dtype)
        scores = algebra.relate(x, docs)
        gradients, dstate = algebra.backward(x, scores, state, take(dy, i, size), dstate, docs)
        out = jax.tree.map(lambda into, x: put(into, x, i), out, gradients)
        return (dstate, out), None

    carry = (dstate, Inputs(*(jnp.zeros_like(array) for array in padded)))
    (dstate, gradients), _ = lax.scan(body, carry, (steps, entering), reverse=True)
    return Inputs(*(array[:, : x.v.shape[1]] for array in gradients)), dstate, None


_over_chunks = with_gradient(outputs_of(forward), forward, backward)
