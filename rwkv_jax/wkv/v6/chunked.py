"""RWKV-5's and 6's WKV by chunks: matrix products inside a chunk, the state handed from chunk to
chunk.

The backward pass recomputes each chunk from its inputs and the state that entered it, so one state
a chunk is kept, not one a token. The algebra is in `chunk.py`.
"""

import jax
import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array, Bool, Float
from rwkv_jax.wkv.chunks import documents, fit, in_chunks, pad, put, take, transpose
from rwkv_jax.wkv.gradient import outputs_of, with_gradient
from rwkv_jax.wkv.reverse import reverse_only
from rwkv_jax.wkv.v6 import algebra
from rwkv_jax.wkv.v6.algebra import Heads, Inputs

CHUNK = 32
FORWARD_MODE = "'scan' or 'associative'"
"""The forms that know forward-mode differentiation."""


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
    x, heads, state = reverse_only("wkv6", (x, heads, state), FORWARD_MODE)
    y, after = _over_chunks(x, heads, transpose(state), reset)
    return y, transpose(after)


def forward(
    x: Inputs,
    heads: Heads,
    state: Float[Array, "b h k v"],
    reset: Bool[Array, "b t"] | None,
    size: int = CHUNK,
) -> tuple[tuple[Array, Array], Array]:
    """(`y`, the state after), and the states that enter the chunks of `size`; all transposed
    (`chunk.py`)."""
    size = fit(size, x.r.shape[1])
    padded, steps = in_chunks(size, x, reset)

    # Chunks are sliced from the time axis as they are needed: cutting all of them beforehand would
    # transpose and so copy every array.
    def body(carry: tuple[Array, Array], step: tuple) -> tuple[tuple, Array]:
        state, y = carry
        i, ids = step
        x = Inputs(*(take(array, i, size) for array in padded))
        docs = documents(ids, state.dtype)
        out, after = algebra.forward(x, heads, algebra.relate(x, heads, docs), state, docs)
        return (after, put(y, out, i)), state

    (after, y), entering = lax.scan(body, (state, jnp.zeros_like(padded.v)), steps)
    return (y[:, : x.v.shape[1]], after), entering


def backward(
    given: tuple[Inputs, Heads, Array, Array | None],
    entering: Float[Array, "chunks b h k v"],
    cotangents: tuple[Array, Array],
    size: int = CHUNK,
) -> tuple[Inputs, Heads, Array, None]:
    """Gradients of what `forward` was given, from those of `y` and the state after."""
    x, heads, _, reset = given
    dy, dstate = cotangents
    size = fit(size, x.r.shape[1])
    padded, steps = in_chunks(size, x, reset)
    dy = pad(dy, size)

    def body(carry: tuple, step: tuple) -> tuple[tuple, None]:
        dstate, dheads, out = carry
        (i, ids), state = step
        x = Inputs(*(take(array, i, size) for array in padded))
        docs = documents(ids, state.dtype)
        scores = algebra.relate(x, heads, docs)
        dx, more, dstate = algebra.backward(
            x, heads, scores, state, take(dy, i, size), dstate, docs
        )
        out = jax.tree.map(lambda into, x: put(into, x, i), out, dx)
        return (dstate, jax.tree.map(jnp.add, dheads, more), out), None

    zeros = jax.tree.map(jnp.zeros_like, (heads, padded))
    (dstate, dheads, dx), _ = lax.scan(body, (dstate, *zeros), (steps, entering), reverse=True)
    return Inputs(*(array[:, : x.v.shape[1]] for array in dx)), dheads, dstate, None


_over_chunks = with_gradient(outputs_of(forward), forward, backward)
