"""RWKV-5's and 6's WKV as it is defined: one token after another."""

from functools import partial

import jax.numpy as jnp

from rwkv_jax.typing import Array, Bool, Float
from rwkv_jax.wkv.tokens import in_order, read


def step(
    r: Float[Array, "b h k"],
    log_w: Float[Array, "b h k"],
    k: Float[Array, "b h k"],
    v: Float[Array, "b h v"],
    u: Float[Array, "h k"],
    state: Float[Array, "b h v k"],
) -> tuple[Float[Array, "b h v"], Float[Array, "b h v k"]]:
    """One token: `y`, read before the token is written, and the state after it."""
    bonus = jnp.sum(r * u[None] * k, axis=-1, keepdims=True)
    y = read(state, r) + bonus * v
    return y, state * jnp.exp(log_w)[:, :, None] + v[..., None] * k[:, :, None]


def token(
    u: Float[Array, "h k"], initial: Float[Array, "h v k"] | None, state: Array, inputs: tuple
) -> tuple[Array, Array]:
    """The state after a token and its `y`; `inputs` are (r, log_w, k, v), and whether a document
    starts."""
    x, starts = inputs
    if starts is not None:
        fresh = jnp.zeros_like(state) if initial is None else initial[None]
        state = jnp.where(starts[:, None, None, None], fresh, state)
    y, state = step(*x, u=u, state=state)
    return state, y


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
    """`rwkv_jax.wkv.wkv6` by `lax.scan`. Its gradient keeps every state: O(t) of them."""
    return in_order(partial(token, u, initial), ((r, log_w, k, v), reset), state)
