"""What the kernels of RWKV-5 and 6 share: the operator around one, and XLA's form beside it."""

import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array, Bool, Float
from rwkv_jax.wkv import kernels, one_token
from rwkv_jax.wkv.chunks import transpose
from rwkv_jax.wkv.kernels import Form, Kernel
from rwkv_jax.wkv.v6 import chunked
from rwkv_jax.wkv.v6.algebra import LOG_ZERO
from rwkv_jax.wkv.v6.recurrence import Heads, Inputs, Tokens


def operator(kernel: Kernel, named: bool):
    """`rwkv_jax.wkv.wkv6` by the kernel; on a CPU by XLA's form, unless it was asked for by
    name."""

    def wkv6(x: Inputs, state: Array, reset: Array | None) -> tuple[Array, Array]:
        u, initial, x = x.u, x.initial, x.tokens
        kernels.check(kernel, "wkv6", named, kernels.refusal(kernel, x, state))
        if x.r.shape[1] == 1 and x.v.shape == x.r.shape:
            kind = one_token.WKV6
            return one_token.run(kind, kernel.platform, named, x, (u,), state, reset, initial)
        y, after = kernels.run(kernel, named, x, (u,), state, reset)
        if initial is None or reset is None:
            return y, after
        late, left = from_initial(x, reset, initial)
        return (y.astype(late.dtype) + late).astype(y.dtype), after + left

    return wkv6


def from_initial(
    x: Tokens, reset: Bool[Array, "b t"], initial: Float[Array, "h v k"]
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h v k"]]:
    """What tokens of documents that start here read of the state that these start from, and what is
    left of it at the end.

    The recurrence is linear in the state, so this adds to that of documents that start from zero.
    Decays since a document's start are summed by `lax.associative_scan`: as differences of sums
    over the whole sequence they would lose what they need.
    """

    def join(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        begun, since = second
        return first[0] | begun, jnp.where(begun, since, first[1] + since)

    log_w = jnp.maximum(x.log_w.astype(initial.dtype), LOG_ZERO)
    starts = jnp.broadcast_to(reset[:, :, None, None], log_w.shape)
    # The token before: what token t meets is decayed by those from the start to t - 1.
    before = jnp.pad(log_w, ((0, 0), (1, 0), (0, 0), (0, 0)))
    fresh = jnp.pad(starts, ((0, 0), (0, 1), (0, 0), (0, 0)))
    begun, since = lax.associative_scan(join, (fresh, jnp.where(fresh, 0, before)), axis=1)
    kept = jnp.where(begun, jnp.exp(since), 0)
    reading = x.r.astype(initial.dtype) * kept[:, :-1]
    late = jnp.einsum("bthk,hvk->bthv", reading, initial, precision=lax.Precision.HIGHEST)
    return late, initial[None] * kept[:, -1, :, None]


def _forward(kernel: Kernel, x: Tokens, shared: tuple, state: Array, reset: Array | None):
    heads = Heads(shared[0].astype(state.dtype), None)
    (y, after), entering = chunked.forward(
        kernels.wide(x), heads, transpose(state), reset, kernel.size
    )
    return (y.astype(x.v.dtype), transpose(after)), kernels.kept(kernel, x, entering)


def _primal(kernel: Kernel, x: Tokens, shared: tuple, state: Array, reset: Array | None):
    return _forward(kernel, x, shared, state, reset)[0]


def _backward(kernel: Kernel, given: tuple, kept: Array, cotangents: tuple):
    x, shared, state, reset = given
    dy, dstate = cotangents
    heads = Heads(shared[0].astype(state.dtype), None)
    dx, dheads, dstate, _ = chunked.backward(
        (kernels.wide(x), heads, transpose(state), reset),
        kernels.entering(kernel, x, kept),
        (dy.astype(state.dtype), transpose(dstate)),
        kernel.size,
    )
    dshared = (dheads.u.astype(shared[0].dtype),)
    return kernels.narrow(dx, x), dshared, transpose(dstate), None


def _reference(x: Tokens, shared: tuple, state: Array, reset: Array | None):
    u = shared[0].astype(state.dtype)
    y, after = chunked.wkv6(Inputs(*kernels.wide(x), u), state, reset)
    return y.astype(x.v.dtype), after


FORM = Form(_primal, _forward, _backward, _reference)
