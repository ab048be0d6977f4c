"""RWKV-5's and 6's WKV by chunks: matrix products inside a chunk, the state handed from chunk to
chunk.

The backward pass recomputes each chunk from its inputs and the state that entered it, so one state
a chunk is kept, not one a token, and differentiates it by JAX: no exponent is positive there
either. The algebra is in `chunk.py`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rwkv_jax.remat import keep
from rwkv_jax.typing import Array, Bool, Float
from rwkv_jax.wkv.chunks import documents, in_chunks, pad, put, take
from rwkv_jax.wkv.reverse import reverse_only
from rwkv_jax.wkv.tokens import in_place
from rwkv_jax.wkv.v6 import chunk, scan
from rwkv_jax.wkv.v6.chunk import Heads, Inputs

CHUNK = 16
LARGEST_STATE = 2**18
"""Numbers, 1 MiB in float32. Token by token is 1.4 to 2.4 times as fast on a CPU as the chunks
below it, and a tenth slower above, where every token reads the state from memory."""


def wkv6(
    r: Float[Array, "b t h k"],
    log_w: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    u: Float[Array, "h k"],
    state: Float[Array, "b h v k"],
    reset: Bool[Array, "b t"] | None,
    initial: Float[Array, "h v k"] | None,
    *,
    by_token: bool = False,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h v k"]]:
    """`rwkv_jax.wkv.wkv6` by chunks; with `by_token`, on a CPU, where no gradient is taken and the
    state is small enough for its caches, token by token."""
    x, heads = Inputs(r, log_w, k, v), Heads(u, initial)
    x, heads, state = reverse_only("wkv6", (x, heads, state), "'scan' or 'associative'")
    by_token = by_token and state.size <= LARGEST_STATE
    outputs: Any = _over_chunks(CHUNK, by_token, x, heads, state, reset)
    return outputs


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _over_chunks(
    size: int, by_token: bool, x: Inputs, heads: Heads, state: Array, reset: Array | None
):
    def chunks() -> tuple[Array, Array]:
        return _forward(size, by_token, x, heads, state, reset)[0]

    if not by_token:
        return chunks()
    token = partial(scan.token, heads.u, heads.initial)
    tokens = partial(in_place, token, x, state, reset, jnp.zeros_like(x.v))
    return lax.platform_dependent(cpu=tokens, default=chunks)


def _chunk(ids: Any, x: Inputs, heads: Heads, state: Array) -> tuple[Array, Array]:
    docs = documents(ids, state.dtype)
    return chunk.forward(x, heads, chunk.relate(x, heads, docs), state, docs)


def _forward(size: int, by_token: bool, x: Inputs, heads: Heads, state: Array, reset: Array | None):
    padded, steps = in_chunks(size, x, reset)

    # Chunks are sliced from the time axis as they are needed: cutting all of them beforehand would
    # transpose and so copy every array.
    def body(carry: tuple[Array, Array], step: tuple) -> tuple[tuple, Array]:
        state, y = carry
        i, ids = step
        x = Inputs(*(take(array, i, size) for array in padded))
        out, after = _chunk(ids, x, heads, state)
        return (after, put(y, out, i)), state

    (after, y), entering = lax.scan(body, (state, jnp.zeros_like(padded.v)), steps)
    y, entering = keep(y[:, : x.v.shape[1]]), keep(entering)
    return (y, after), (x, heads, entering, reset)


def _backward(
    size: int, by_token: bool, kept: tuple, cotangents: tuple
) -> tuple[Inputs, Heads, Array, None]:
    x, heads, entering, reset = kept
    dy, dstate = cotangents
    padded, steps = in_chunks(size, x, reset)
    dy = pad(dy, size)

    def body(carry: tuple, step: tuple) -> tuple[tuple, None]:
        dstate, dheads, out = carry
        (i, ids), state = step
        x = Inputs(*(take(array, i, size) for array in padded))
        _, pull_back = jax.vjp(partial(_chunk, ids), x, heads, state)
        dx, more, dstate = pull_back((take(dy, i, size), dstate))
        out = jax.tree.map(lambda into, x: put(into, x, i), out, dx)
        return (dstate, jax.tree.map(jnp.add, dheads, more), out), None

    zeros = jax.tree.map(jnp.zeros_like, (heads, padded))
    (dstate, dheads, dx), _ = lax.scan(body, (dstate, *zeros), (steps, entering), reverse=True)
    return Inputs(*(array[:, : x.v.shape[1]] for array in dx)), dheads, dstate, None


_over_chunks.defvjp(_forward, _backward)
