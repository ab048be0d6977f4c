"""RWKV-7's WKV token by token, for a CPU where no gradient is taken.

The definition (`scan.py`) reads the state twice a token, for what is removed before the update and
for y after it. Both readings of one state are one product here: y of this token, and what the next
one removes. Tokens are read from the inputs where they lie, and y is written in place, so that no
array is transposed or kept.
"""

import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array, Bool, Float
from rwkv_jax.wkv.chunks import dot, transpose
from rwkv_jax.wkv.tokens import at
from rwkv_jax.wkv.v7.algebra import Inputs


def wkv7(
    x: Inputs, state: Float[Array, "b h v k"], reset: Bool[Array, "b t"] | None
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h v k"]]:
    """`rwkv_jax.wkv.wkv7`. Not to be differentiated: each step's gradient would be as long as the
    sequence."""
    last = x.r.shape[1] - 1

    def kept(array: Array, t: Array | int) -> Array:
        """`array`, with zeros where token `t` starts a document."""
        if reset is None:
            return array
        starts = at(reset, t).reshape(-1, *(1,) * (array.ndim - 1))
        return jnp.where(starts, jnp.zeros_like(array), array)

    def token(t: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        state, removed, y = carry
        now, following = Inputs(*(at(array, t) for array in x)), jnp.minimum(t + 1, last)
        state = (
            kept(state, t) * jnp.exp(now.log_w)[..., None]
            + now.b[..., None] * removed[:, :, None]
            + now.k[..., None] * now.v[:, :, None]
        )
        out = dot(jnp.stack([now.r, at(x.a, following)], -2), state)
        y = lax.dynamic_update_index_in_dim(y, out[:, :, 0], t, axis=1)
        return state, kept(out[:, :, 1], following), y

    # [k, v]: products whose left factor is not transposed are faster.
    state = transpose(state)
    removed = kept(dot(at(x.a, 0)[:, :, None], state)[:, :, 0], 0)
    state, _, y = lax.fori_loop(0, last + 1, token, (state, removed, jnp.zeros_like(x.v)))
    return y, transpose(state)
