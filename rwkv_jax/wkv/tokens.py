"""Loops over tokens, and what `scan` of versions 5 to 7 share."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array, Callable, Float, Int, PyTree, Shaped

State = TypeVar("State")


def read(state: Float[Array, "b h v k"], key: Float[Array, "b h k"]) -> Float[Array, "b h v"]:
    """`state @ key`, as a product: a sum takes XLA's CPU backend six times as long."""
    return jnp.einsum("bhvk,bhk->bhv", state, key, precision=lax.Precision.HIGHEST)


def in_order(
    token: Callable, inputs: PyTree, state: State
) -> tuple[Float[Array, "b t ..."], State]:
    """`state, y = token(state, inputs of one token)` over all tokens of `inputs`, a tree of arrays
    [b, t, ...], by `lax.scan`."""
    if jax.tree.leaves(inputs)[0].shape[1] == 1:
        state, y = token(state, jax.tree.map(lambda x: x[:, 0], inputs))
        return y[:, None], state
    time_first = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), inputs)
    state, y = lax.scan(token, state, time_first)
    return jnp.moveaxis(y, 0, 1), state


def in_place(
    token: Callable, inputs: PyTree, state: State, y: Float[Array, "b t ..."]
) -> tuple[Float[Array, "b t ..."], State]:
    """What `in_order` computes, for where no gradient is taken.

    Tokens are read where they lie and written into `y`, whose values do not matter: no array is
    transposed or kept. Not to be differentiated: each step's gradient would be as long as the
    sequence.
    """

    def body(t: Array, carry: tuple[State, Array]) -> tuple[State, Array]:
        state, y = carry
        state, out = token(state, jax.tree.map(lambda x: at(x, t), inputs))
        return state, lax.dynamic_update_index_in_dim(y, out, t, axis=1)

    state, y = lax.fori_loop(0, y.shape[1], body, (state, y))
    return y, state


def at(x: Shaped[Array, "b t ..."], t: Int[Array, ""] | int) -> Shaped[Array, "b ..."]:
    """Token `t`."""
    return lax.dynamic_index_in_dim(x, t, axis=1, keepdims=False)
