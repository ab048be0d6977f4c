"""The forms of versions 5 to 7 by a kernel: any length, one token, XLA's passes in programs for
other devices, and XLA's derivatives of higher order."""

from functools import partial

import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array, Bool, Callable, Float
from rwkv_jax.wkv.chunks import transpose
from rwkv_jax.wkv.form import Form, Output, Starts, State, in_compute_dtype
from rwkv_jax.wkv.pallas import heads, one_token
from rwkv_jax.wkv.pallas.kernel import Kernel, passes, recurrence
from rwkv_jax.wkv.v6 import chunked as v6_chunked
from rwkv_jax.wkv.v6 import recurrence as v6
from rwkv_jax.wkv.v6.algebra import LOG_ZERO
from rwkv_jax.wkv.v7 import chunked as v7_chunked
from rwkv_jax.wkv.v7 import recurrence as v7


def _by_chunks(
    kernel: Kernel, named: bool, forward: Callable, backward: Callable, reference: Callable
) -> Callable[..., tuple[Output, State]]:
    xla = heads.xla_passes(kernel, forward, backward)
    return recurrence(kernel, named, partial(passes, kernel), xla, reference)


def wkv6(kernel: Kernel, named: bool) -> Form:
    """The form by the kernel; in programs for a CPU it is interpreted if it was `named`."""
    by_chunks = _by_chunks(kernel, named, _forward6, _backward6, _reference6)
    by_token = one_token.recurrence(one_token.WKV6, kernel.driver.platform, named)

    def form(x: v6.Inputs, state: State, reset: Starts) -> tuple[Output, State]:
        if one_token.applies(x):
            return one_token.run(by_token, x.tokens, (x.u,), state, reset, x.initial)
        y, after = heads.run(by_chunks, kernel.size, x.tokens, (x.u,), state, reset)
        if x.initial is None or reset is None:
            return y, after
        more, left = from_initial(x.tokens, reset, x.initial)
        return (y.astype(more.dtype) + more).astype(y.dtype), after + left

    return form


def from_initial(
    x: v6.Tokens, reset: Bool[Array, "b t"], initial: Float[Array, "h v k"]
) -> tuple[Output, State]:
    """What documents that start here add to y, and to the state after, by starting from `initial`
    instead of zero: the recurrence is linear in the state.

    Log decays since a document's start are summed by `lax.associative_scan`: differences of sums
    over the whole sequence would cancel.
    """

    def join(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        restarted, since = second
        return first[0] | restarted, jnp.where(restarted, since, first[1] + since)

    log_w = jnp.maximum(x.log_w.astype(initial.dtype), LOG_ZERO)
    starts = jnp.broadcast_to(reset[:, :, None, None], log_w.shape)
    # Shifted by a token: the state before token t is decayed by those from the start to t - 1.
    before = jnp.pad(log_w, ((0, 0), (1, 0), (0, 0), (0, 0)))
    fresh = jnp.pad(starts, ((0, 0), (0, 1), (0, 0), (0, 0)))
    restarted, since = lax.associative_scan(join, (fresh, jnp.where(fresh, 0, before)), axis=1)
    kept = jnp.where(restarted, jnp.exp(since), 0)
    reading = x.r.astype(initial.dtype) * kept[:, :-1]
    late = jnp.einsum("bthk,hvk->bthv", reading, initial, precision=lax.Precision.HIGHEST)
    return late, initial[None] * kept[:, -1, :, None]


def _forward6(x: v6.Tokens, shared: tuple, state: Array, reset: Array | None, size: int):
    (u,) = shared
    (y, after), entering = v6_chunked.forward(x, v6.Heads(u, None), transpose(state), reset, size)
    return (y, transpose(after)), entering


def _backward6(args: tuple, entering: Array, cotangents: tuple, size: int):
    x, (u,), state, reset = args
    dy, dafter = cotangents
    dx, dheads, dstate, _ = v6_chunked.backward(
        (x, v6.Heads(u, None), transpose(state), reset), entering, (dy, transpose(dafter)), size
    )
    return dx, (dheads.u,), transpose(dstate)


def _reference6(x: v6.Tokens, shared: tuple, state: Array, reset: Array | None):
    return in_compute_dtype(v6_chunked.wkv6)(v6.Inputs(*x, *shared), state, reset)


def wkv7(kernel: Kernel, named: bool) -> Form:
    """The form by the kernel; in programs for a CPU it is interpreted if it was `named`.

    Rows inside which documents start from a learnt state are XLA's, by chunks. What such documents
    read of it depends on what their tokens remove, so that it cannot be added to the kernel's y
    afterwards, as version 6's is.
    """
    by_chunks = _by_chunks(kernel, named, _forward7, _backward7, _reference7)
    by_token = one_token.recurrence(one_token.WKV7, kernel.driver.platform, named)

    def form(x: v7.Inputs, state: State, reset: Starts) -> tuple[Output, State]:
        if one_token.applies(x):
            return one_token.run(by_token, x.tokens, (), state, reset, x.initial)
        if x.initial is not None and reset is not None:
            return in_compute_dtype(v7_chunked.wkv7)(x, state, reset)
        return heads.run(by_chunks, kernel.size, x.tokens, (), state, reset)

    return form


def _forward7(x: v7.Tokens, shared: tuple, state: Array, reset: Array | None, size: int):
    return v7_chunked.forward(x, None, state, reset, size)


def _backward7(args: tuple, entering: Array, cotangents: tuple, size: int):
    x, _, state, reset = args
    args = (x, None, state, reset)
    dx, _, dstate, _ = v7_chunked.backward(args, entering, cotangents, size)
    return dx, (), dstate


def _reference7(x: v7.Tokens, shared: tuple, state: Array, reset: Array | None):
    return in_compute_dtype(v7_chunked.wkv7)(v7.Inputs(*x), state, reset)
