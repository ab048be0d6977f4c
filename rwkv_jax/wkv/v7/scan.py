"""RWKV-7's WKV as it is defined: one token after another."""

import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array, Bool, Float
from rwkv_jax.wkv.tokens import in_place, read


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

    def token(state: Array, inputs: tuple) -> tuple[Array, Array]:
        x, starts = inputs
        if starts is not None:
            state = jnp.where(starts[:, None, None, None], jnp.zeros_like(state), state)
        y, state = step(*x, state=state)
        return state, y

    if r.shape[1] == 1:
        starts = None if reset is None else reset[:, 0]
        state, y = token(state, (tuple(x[:, 0] for x in (r, log_w, k, v, a, b)), starts))
        return y[:, None], state
    time_first = tuple(jnp.moveaxis(x, 1, 0) for x in (r, log_w, k, v, a, b))
    starts = None if reset is None else reset.T
    state, y = lax.scan(token, state, (time_first, starts))
    return jnp.moveaxis(y, 0, 1), state


def forward(
    r: Float[Array, "b t h k"],
    log_w: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    a: Float[Array, "b t h k"],
    b: Float[Array, "b t h k"],
    state: Float[Array, "b h v k"],
    reset: Bool[Array, "b t"] | None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h v k"]]:
    """The same with nothing kept for a gradient, nor copied: for where none is taken."""

    def token(state: Array, x: tuple, starts: Array | None) -> tuple[Array, Array]:
        if starts is not None:
            state = jnp.where(starts[:, None, None, None], jnp.zeros_like(state), state)
        return step(*x, state=state)

    return in_place(token, (r, log_w, k, v, a, b), state, reset, jnp.zeros_like(v))
