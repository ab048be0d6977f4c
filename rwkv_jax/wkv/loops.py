"""Loops over tokens."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array, Callable, Float, Int, PyTree, Shaped

State = TypeVar("State")


def scan_tokens(
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


def loop_tokens(
    token: Callable, inputs: PyTree, state: State, y: Float[Array, "b t ..."]
) -> tuple[Float[Array, "b t ..."], State]:
    """What `scan_tokens` computes, without transposing or keeping any array: tokens are read from
    `inputs` in place and each `y` overwrites its part of the buffer `y`.

    Not for differentiation: the gradient of each step would be as long as the sequence.
    """

    def body(t: Array, carry: tuple[State, Array]) -> tuple[State, Array]:
        state, y = carry
        state, out = token(state, jax.tree.map(lambda x: get_token(x, t), inputs))
        return state, lax.dynamic_update_index_in_dim(y, out, t, axis=1)

    state, y = lax.fori_loop(0, y.shape[1], body, (state, y))
    return y, state


def get_token(x: Shaped[Array, "b t ..."], t: Int[Array, ""] | int) -> Shaped[Array, "b ..."]:
    """Token `t`."""
    return lax.dynamic_index_in_dim(x, t, axis=1, keepdims=False)


def read_state(state: Float[Array, "b h v k"], key: Float[Array, "b h k"]) -> Float[Array, "b h v"]:
    """`state @ key`, as a matrix product: XLA's CPU backend takes six times as long for a sum."""
    return jnp.einsum("bhvk,bhk->bhv", state, key, precision=lax.Precision.HIGHEST)
