"""What `scan` of versions 5 to 7 share."""

import jax
import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array, Bool, Callable, Float


def read(state: Float[Array, "b h v k"], key: Float[Array, "b h k"]) -> Float[Array, "b h v"]:
    """`state @ key`, as a product: a sum takes XLA's CPU backend six times as long."""
    return jnp.einsum("bhvk,bhk->bhv", state, key, precision=lax.Precision.HIGHEST)


def in_order(
    token: Callable,
    inputs: tuple[Array, ...],
    state: Float[Array, "b h v k"],
    reset: Bool[Array, "b t"] | None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h v k"]]:
    """`state, y = token(state, inputs of one token, starts)` over all tokens by `lax.scan`."""
    over = (inputs, reset)
    if inputs[0].shape[1] == 1:
        state, y = token(state, *jax.tree.map(lambda x: x[:, 0], over))
        return y[:, None], state
    time_first = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), over)
    state, y = lax.scan(lambda state, x: token(state, *x), state, time_first)
    return jnp.moveaxis(y, 0, 1), state
