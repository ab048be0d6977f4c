"""RWKV-4's WKV with the chunks' summaries joined by `lax.associative_scan`: log depth in time.

A chunk is the map "decay the state by e^d, then add (num, den) e^max_exp"; two maps in a row are
one again.
"""

import jax
import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array, Bool, Float
from rwkv_jax.wkv.v4.chunked import (
    Steps,
    advance,
    chunk_decay,
    combine,
    join,
    meet,
    steps,
    summaries,
)
from rwkv_jax.wkv.v4.scan import Wkv4State, read


def wkv4(
    log_w: Float[Array, " c"],
    k: Float[Array, "b t c"],
    v: Float[Array, "b t c"],
    u: Float[Array, " c"],
    state: Wkv4State,
    reset: Bool[Array, "b t"] | None,
) -> tuple[Float[Array, "b t c"], Wkv4State]:
    """`rwkv_jax.wkv.wkv4` by an associative scan over chunks of 64; differentiated by JAX."""
    x = steps(k, v, reset)
    decay, parts = chunk_decay(log_w, x), summaries(log_w, x)
    total, prefix = lax.associative_scan(compose, (decay, parts), axis=1)
    start = jax.tree.map(lambda s: s[:, None], state)
    after = combine(start, total, prefix)
    entering = jax.tree.map(lambda s, a: jnp.concatenate([s, a[:, :-1]], 1), start, after)

    @jax.checkpoint
    def step(state: Wkv4State, token: Steps) -> tuple[Wkv4State, Array]:
        state = meet(state, token.starts)
        y = read(state, u[None, None], token.k, token.v)
        return advance(state, token, log_w), y

    y = join(lax.scan(step, entering, x)[1], k.shape[1])
    return y, jax.tree.map(lambda s: s[:, -1], after)


def compose(
    first: tuple[Array, Wkv4State], second: tuple[Array, Wkv4State]
) -> tuple[Array, Wkv4State]:
    """`first`, then `second`."""
    return first[0] + second[0], combine(first[1], *second)
