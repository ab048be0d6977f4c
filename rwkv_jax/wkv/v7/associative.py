"""RWKV-7's WKV with the chunks' summaries combined by `lax.associative_scan`: log depth in time.

A chunk is the map S -> S M + X. Two maps compose to one: (M1 M2, X1 M2 + X2). With chunks of one
token this is the textbook token-level scan, which stores a matrix a token and is 20 to 80 times
slower.
"""

import jax
import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array, Float
from rwkv_jax.wkv.chunks import (
    Documents,
    chunk_size,
    document_ids,
    dot,
    merge_chunks,
    split_chunks,
    transpose,
)
from rwkv_jax.wkv.form import Output, Starts, State
from rwkv_jax.wkv.v7 import algebra
from rwkv_jax.wkv.v7.recurrence import Inputs, Tokens

CHUNK = 32


def wkv7(x: Inputs, state: State, reset: Starts) -> tuple[Output, State]:
    """The form by an associative scan over chunks of 32 tokens; differentiated by JAX."""
    t = x.k.shape[1]
    size = chunk_size(CHUNK, t)
    chunks = Tokens(*(split_chunks(array, size) for array in x.tokens))
    docs = algebra.documents(document_ids(reset, size), state.dtype)
    maps = lax.associative_scan(compose, jax.checkpoint(summarise)(chunks, x.initial, docs))
    after = act(state[None], maps)
    entering = jnp.concatenate([state[None], after[:-1]])
    y = jax.checkpoint(read)(chunks, x.initial, entering, docs)
    return merge_chunks(y, t), after[-1]


def summarise(
    x: Tokens, initial: Float[Array, "h v k"] | None, docs: Documents | None
) -> tuple[Array, Array]:
    """M [.., k, k] and X [.., v, k] of every chunk."""
    s = algebra.relate(x, docs)
    size = x.r.shape[-2]
    left, right = s.left[..., :size, :], s.right
    n = left.shape[-1]
    stay = jnp.broadcast_to(jnp.eye(n, dtype=left.dtype), (*left.shape[:-2], n, n))
    if docs is not None:
        left = left * docs.sees_state[..., :size, :]
        right = right * docs.reaches_end
        stay = stay * docs.carries_on
    removing, adding = right[..., :size, :], right[..., size:, :]
    kept = stay + dot(transpose(dot(s.inverse, left)), removing)
    reading = dot(s.scores[..., :size, size:], x.v)
    learnt = algebra.by_lane(initial, docs, x.v)
    if docs is not None and learnt is not None:
        late = s.left * algebra.late(s, docs)
        reading = reading + dot(late[..., :size, :], transpose(learnt))
    removed = dot(s.inverse, reading)
    added = dot(transpose(removed), removing) + dot(transpose(x.v), adding)
    if docs is not None and learnt is not None:
        added = added + learnt * algebra.kept(s, docs)
    return transpose(s.enter) * kept * s.leave, added * s.leave


def compose(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    """The map `first`, then `second`."""
    return dot(first[0], second[0]), act(first[1], second)


def act(state: Array, map_: tuple[Array, Array]) -> Array:
    """The state after a chunk, or any range of tokens: S M + X."""
    return dot(state, map_[0]) + map_[1]


def read(
    x: Tokens, initial: Float[Array, "h v k"] | None, entering: Array, docs: Documents | None
) -> Array:
    """`y` of every chunk, given the state that enters it."""
    return algebra.forward(x, initial, algebra.relate(x, docs), entering, docs)[0]
