"""The WKV of RWKV-5 and 6 as it is defined: one token after another."""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp

from rwkv_jax.typing import Array, Bool, Float
from rwkv_jax.wkv.chunks import transpose
from rwkv_jax.wkv.form import Output, Starts, State
from rwkv_jax.wkv.loops import loop_tokens, read_state, scan_tokens


class Tokens(NamedTuple):
    """What each token has of its own, [b, t, h, n] each; of one chunk, [..., C, n]."""

    r: Array
    log_w: Array
    k: Array
    v: Array


class Heads(NamedTuple):
    """What all tokens of a head share: the bonus [h, k], and the state [h, k, v] that documents
    start from, None for zero. The state is transposed, as in `algebra.py`."""

    u: Array
    initial: Array | None


class Inputs(NamedTuple):
    """The operator's inputs: [b, t, h, n]; u [h, k]; initial [h, v, k], None for zero."""

    r: Array
    log_w: Array
    k: Array
    v: Array
    u: Array
    initial: Array | None = None

    @property
    def tokens(self) -> Tokens:
        return Tokens(self.r, self.log_w, self.k, self.v)

    @property
    def heads(self) -> Heads:
        return Heads(self.u, None if self.initial is None else transpose(self.initial))


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
    y = read_state(state, r) + bonus * v
    return y, state * jnp.exp(log_w)[:, :, None] + v[..., None] * k[:, :, None]


def token(
    u: Float[Array, "h k"],
    initial: Float[Array, "h v k"] | None,
    state: Float[Array, "b h v k"],
    inputs: tuple[Tokens, Bool[Array, " b"] | None],
) -> tuple[Float[Array, "b h v k"], Float[Array, "b h v"]]:
    """`step` as the body of a loop; `inputs` are the token, and where it starts a document."""
    x, starts = inputs
    if starts is not None:
        fresh = jnp.zeros_like(state) if initial is None else initial[None]
        state = jnp.where(starts[:, None, None, None], fresh, state)
    y, state = step(*x, u=u, state=state)
    return state, y


def scan(x: Inputs, state: State, reset: Starts) -> tuple[Output, State]:
    """The form by `lax.scan`. Its gradient keeps every state: O(t) of them."""
    return scan_tokens(partial(token, x.u, x.initial), (x.tokens, reset), state)


def in_place(x: Inputs, state: State, reset: Starts) -> tuple[Output, State]:
    """The form for small heads on a CPU where no gradient is taken; not for differentiation."""
    body = partial(token, x.u, x.initial)
    return loop_tokens(body, (x.tokens, reset), state, jnp.zeros_like(x.v))
