"""RWKV-7's WKV as it is defined: one token after another."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array, Float
from rwkv_jax.wkv.chunks import dot, transpose
from rwkv_jax.wkv.form import Output, Starts, State
from rwkv_jax.wkv.loops import get_token, read_state, scan_tokens


class Tokens(NamedTuple):
    """What each token has of its own, [b, t, h, n] each; of one chunk, [..., C, n]."""

    r: Array
    log_w: Array
    k: Array
    v: Array
    a: Array
    b: Array


class Inputs(NamedTuple):
    """The operator's inputs: [b, t, h, n]; initial [h, v, k], None for zero."""

    r: Array
    log_w: Array
    k: Array
    v: Array
    a: Array
    b: Array
    initial: Array | None = None

    @property
    def tokens(self) -> Tokens:
        return Tokens(*self[:6])


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
    removed = read_state(state, a)
    state = (
        state * jnp.exp(log_w)[:, :, None]
        + removed[..., None] * b[:, :, None]
        + v[..., None] * k[:, :, None]
    )
    return read_state(state, r), state


def scan(x: Inputs, state: State, reset: Starts) -> tuple[Output, State]:
    """The form by `lax.scan`. Its gradient keeps every state: O(t) of them."""

    def token(state: Array, inputs: tuple) -> tuple[Array, Array]:
        now, starts = inputs
        if starts is not None:
            fresh = jnp.zeros_like(state) if x.initial is None else x.initial[None]
            state = jnp.where(starts[:, None, None, None], fresh, state)
        y, state = step(*now, state=state)
        return state, y

    return scan_tokens(token, (x.tokens, reset), state)


def in_place(
    x: Tokens, initial: Float[Array, "h v k"] | None, state: State, reset: Starts
) -> tuple[Output, State]:
    """The form for a CPU where no gradient is taken; not for differentiation, as `loop_tokens`.

    `step` reads the state twice a token: for the removal before the update and for y after it. Here
    one product reads each state for both, y of this token and the removal of the next. No array is
    transposed or kept.
    """
    last = x.r.shape[1] - 1

    def restart(array: Array, fresh: Array | None, t: Array | int) -> Array:
        """`array`, with `fresh`, or zeros, where token `t` starts a document."""
        if reset is None:
            return array
        starts = get_token(reset, t).reshape(-1, *(1,) * (array.ndim - 1))
        return jnp.where(starts, jnp.zeros_like(array) if fresh is None else fresh, array)

    def restart_removed(removed: Array, t: Array | int) -> Array:
        return restart(removed, None if first is None else get_token(first, t), t)

    def token(t: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        state, removed, y = carry
        now, following = Tokens(*(get_token(array, t) for array in x)), jnp.minimum(t + 1, last)
        state = (
            restart(state, fresh, t) * jnp.exp(now.log_w)[..., None]
            + now.b[..., None] * removed[:, :, None]
            + now.k[..., None] * now.v[:, :, None]
        )
        out = dot(jnp.stack([now.r, get_token(x.a, following)], -2), state)
        y = lax.dynamic_update_index_in_dim(y, out[:, :, 0], t, axis=1)
        return state, restart_removed(out[:, :, 1], following), y

    # [k, v]: products are faster if their left factor is not transposed.
    state, fresh, first = transpose(state), None, None
    if initial is not None and reset is not None:
        fresh = transpose(initial)[None]
        # What each token removes if it starts a document.
        first = jnp.einsum("hvk,bthk->bthv", initial, x.a, precision=lax.Precision.HIGHEST)
    removed = restart_removed(dot(get_token(x.a, 0)[:, :, None], state)[:, :, 0], 0)
    state, _, y = lax.fori_loop(0, last + 1, token, (state, removed, jnp.zeros_like(x.v)))
    return y, transpose(state)
