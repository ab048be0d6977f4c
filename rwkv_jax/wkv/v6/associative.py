"""The WKV of RWKV-5 and 6 with the chunks' summaries combined by `lax.associative_scan`: log depth
in time.

A chunk is the map S -> P S + X, with P a decay per key channel. Two maps compose to one:
(P2 P1, P2 X1 + X2).
"""

import jax
import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array
from rwkv_jax.wkv.chunks import (
    Documents,
    chunk_size,
    document_ids,
    documents,
    merge_chunks,
    split_chunks,
    transpose,
)
from rwkv_jax.wkv.form import Output, Starts, State
from rwkv_jax.wkv.v6 import algebra
from rwkv_jax.wkv.v6.recurrence import Heads, Inputs, Tokens

CHUNK = 16


def wkv6(x: Inputs, state: State, reset: Starts) -> tuple[Output, State]:
    """The form by an associative scan over chunks of 16 tokens; differentiated by JAX."""
    t = x.k.shape[1]
    size = chunk_size(CHUNK, t)
    chunks = Tokens(*(split_chunks(array, size) for array in x.tokens))
    heads, state = x.heads, transpose(state)
    docs = documents(document_ids(reset, size), state.dtype)
    maps = lax.associative_scan(compose, jax.checkpoint(summarise)(chunks, heads, docs))
    after = act(state[None], maps)
    entering = jnp.concatenate([state[None], after[:-1]])
    y = jax.checkpoint(read)(chunks, heads, entering, docs)
    return merge_chunks(y, t), transpose(after[-1])


def summarise(x: Tokens, heads: Heads, docs: Documents | None) -> tuple[Array, Array]:
    """P [.., k, 1] and X [.., k, v] of every chunk."""
    s = algebra.relate(x, heads, docs)
    nothing = jnp.zeros((*x.v.shape[:-2], x.k.shape[-1], x.v.shape[-1]), x.v.dtype)
    return s.total, algebra.forward(x, heads, s, nothing, docs)[1]


def compose(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    """The map `first`, then `second`."""
    return first[0] * second[0], act(first[1], second)


def act(state: Array, map_: tuple[Array, Array]) -> Array:
    """The state after a chunk, or any range of tokens: P S + X."""
    return state * map_[0] + map_[1]


def read(x: Tokens, heads: Heads, entering: Array, docs: Documents | None) -> Array:
    """`y` of every chunk, given the state that enters it."""
    return algebra.forward(x, heads, algebra.relate(x, heads, docs), entering, docs)[0]
