"""RWKV-5's and 6's WKV as it is defined: one token after another."""

import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array, Bool, Float
from rwkv_jax.wkv.tokens import in_place, read


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

    def token(state: Array, inputs: tuple) -> tuple[Array, Array]:
        x, starts = inputs
        if starts is not None:
            fresh = jnp.zeros_like(state) if initial is None else initial[None]
            state = jnp.where(starts[:, None, None, None], fresh, state)
        y, state = step(*x, u=u, state=state)
        return state, y

    if r.shape[1] == 1:
        starts = None if reset is None else reset[:, 0]
        state, y = token(state, (tuple(x[:, 0] for x in (r, log_w, k, v)), starts))
        return y[:, None], state
    time_first = tuple(jnp.moveaxis(x, 1, 0) for x in (r, log_w, k, v))
    starts = None if reset is None else reset.T
    state, y = lax.scan(token, state, (time_first, starts))
    return jnp.moveaxis(y, 0, 1), state


def forward(
    r: Float[Array, "b t h k"],
    log_w: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    u: Float[Array, "h k"],
    state: Float[Array, "b h v k"],
    reset: Bool[Array, "b t"] | None,
    initial: Float[Array, "h v k"] | None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h v k"]]:
    """The same with nothing kept for a gradient, nor copied: for where none is taken."""

    def token(state: Array, x: tuple, starts: Array | None) -> tuple[Array, Array]:
        if starts is not None:
            fresh = jnp.zeros_like(state) if initial is None else initial[None]
            state = jnp.where(starts[:, None, None, None], fresh, state)
        return step(*x, u=u, state=state)

    return in_place(token, (r, log_w, k, v), state, reset, jnp.zeros_like(v))
