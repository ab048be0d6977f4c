"""RWKV-5's and 6's WKV with the chunks' summaries joined by `lax.associative_scan`: log depth in
time.

A chunk is the map S -> S P + X, P a decay per key channel, and two in a row are one again:
(P1 P2, X1 P2 + X2).
"""

import jax
import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array, Bool, Float
from rwkv_jax.wkv.chunks import Documents, cut, document_ids, documents, join
from rwkv_jax.wkv.v6 import chunk
from rwkv_jax.wkv.v6.chunk import Heads, Inputs

CHUNK = 16


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
    """`rwkv_jax.wkv.wkv6` by an associative scan over chunks of 16; differentiated by JAX."""
    x = Inputs(*(cut(array, CHUNK) for array in (r, log_w, k, v)))
    heads = Heads(u, initial)
    docs = documents(document_ids(reset, CHUNK), state.dtype)
    maps = lax.associative_scan(compose, jax.checkpoint(summarise)(x, heads, docs))
    after = act(state[None], maps)
    entering = jnp.concatenate([state[None], after[:-1]])
    y = jax.checkpoint(read)(x, heads, entering, docs)
    return join(y, r.shape[1]), after[-1]


def summarise(x: Inputs, heads: Heads, docs: Documents | None) -> tuple[Array, Array]:
    """P [.., 1, k] and X [.., v, k] of every chunk."""
    s = chunk.relate(x, heads, docs)
    return s.total, chunk.written(x, heads, s, docs)


def compose(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    """`first`, then `second`."""
    return first[0] * second[0], act(first[1], second)


def act(state: Array, part: tuple[Array, Array]) -> Array:
    """The state after a chunk, or any part of the sequence: S P + X."""
    return state * part[0] + part[1]


def read(x: Inputs, heads: Heads, entering: Array, docs: Documents | None) -> Array:
    """`y` of every chunk, given the state that enters it."""
    return chunk.forward(x, heads, chunk.relate(x, heads, docs), entering, docs)[0]
