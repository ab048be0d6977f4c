"""RWKV-7's WKV as it is defined: one token after another."""

import jax.numpy as jnp

from rwkv_jax.typing import Array, Bool, Float
from rwkv_jax.wkv.tokens import in_order, read


def step(
    r: Float[Array, "b h k"],
    log_w: Float[Array, "b h k"],
    k: Float[Array, "b h k"],
    v: Float[Array, "b h v"],
    a: Float[Array, "b h k"],
    b: Float[Array, "b h k"],
    state: Float[Array, "b h v k"],
) -> tuple[Float[Array, "b h v"], Float[Array, "b h v k"]]:
    """One token: `y` and the state after it. The removal `state @ a` reads the state before its
    decay."""
    removed = read(state, a)
    state = (
        state * jnp.exp(log_w)[:, :, None]
        + removed[..., None] * b[:, :, None]
        + v[..., None] * k[:, :, None]
    )
    return read(state, r), state


def token(state: Array, inputs: tuple) -> tuple[Array, Array]:
    """The state after a token and its `y`; `inputs` are (r, log_w, k, v, a, b), and whether a
    document starts."""
    x, starts = inputs
    if starts is not None:
        state = jnp.where(starts[:, None, None, None], jnp.zeros_like(state), state)
    y, state = step(*x, state=state)
    return state, y


def wkv7(
    r: Float[Array, "b t h k"],
    log_w: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    a: Float[Array, "b t h k"],
    b: Float[Array, "b t h k"],
    state: Float[Array, "b h v k"],
    reset: Bool[Array, "b t"] | None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h v k"]]:
    """`rwkv_jax.wkv.wkv7` by `lax.scan`. Its gradient keeps every state: O(t) of them."""
    return in_order(token, ((r, log_w, k, v, a, b), reset), state)
