"""RWKV-5's and 6's WKV with the chunks' summaries joined by `lax.associative_scan`: log depth in
time.

A chunk is the map S -> P S + X, P a decay per key channel, and two in a row are one again:
(P2 P1, P2 X1 + X2).
"""

import jax
import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array, Bool, Float
from rwkv_jax.wkv.chunks import Documents, cut, document_ids, documents, fit, join, transpose
from rwkv_jax.wkv.v6 import algebra
from rwkv_jax.wkv.v6.algebra import Heads, Inputs

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
    size = fit(CHUNK, r.shape[1])
    x = Inputs(*(cut(array, size) for array in (r, log_w, k, v)))
    heads, state = Heads.of(u, initial), transpose(state)
    docs = documents(document_ids(reset, size), state.dtype)
    maps = lax.associative_scan(compose, jax.checkpoint(summarise)(x, heads, docs))
    after = act(state[None], maps)
    entering = jnp.concatenate([state[None], after[:-1]])
    y = jax.checkpoint(read)(x, heads, entering, docs)
    return join(y, r.shape[1]), transpose(after[-1])


def summarise(x: Inputs, heads: Heads, docs: Documents | None) -> tuple[Array, Array]:
    """P [.., k, 1] and X [.., k, v] of every chunk."""
    s = algebra.relate(x, heads, docs)
    nothing = jnp.zeros((*x.v.shape[:-2], x.k.shape[-1], x.v.shape[-1]), x.v.dtype)
    return s.total, algebra.forward(x, heads, s, nothing, docs)[1]


def compose(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    """`first`, then `second`."""
    return first[0] * second[0], act(first[1], second)


def act(state: Array, part: tuple[Array, Array]) -> Array:
    """The state after a chunk, or any part of the sequence: P S + X."""
    return state * part[0] + part[1]


def read(x: Inputs, heads: Heads, entering: Array, docs: Documents | None) -> Array:
    """`y` of every chunk, given the state that enters it."""
    return algebra.forward(x, heads, algebra.relate(x, heads, docs), entering, docs)[0]
