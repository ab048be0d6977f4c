"""What the kernels of RWKV-4 share: a few tokens at a time in registers, forward and backward, the
operator around a kernel, and XLA's form beside it.

Channels do not mix, so lanes are channels, and a program goes through time token by token. The
state that enters every few tokens is kept; the backward pass sweeps those forward again, holding
what they read, then back. The algebra is in `sweeps.py`.
"""

from functools import lru_cache, partial
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rwkv_jax.typing import Array, Callable, Int
from rwkv_jax.wkv import kernels
from rwkv_jax.wkv.form import in_compute_dtype
from rwkv_jax.wkv.v4 import chunked
from rwkv_jax.wkv.v4.recurrence import LOG_ZERO, Inputs, Wkv4State
from rwkv_jax.wkv.v4.sweeps import (
    SweptBack,
    Tokens,
    arriving,
    of_state,
    pair,
    step,
    step_again,
    step_back,
)

SIZE = 16
"""Tokens at a time."""
START, PADDING = 1, 2
"""Flags of tokens."""


class Kernel(NamedTuple):
    """The recurrence on one platform."""

    platform: str  # XLA's name
    lanes: int  # channels come in multiples of so many
    driver: ModuleType  # pallas_gpu or pallas_tpu


def token(k: Array, v: Array, flag: Array | None) -> Tokens:
    """A token's lanes in float32; `flag` is of their shape."""
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    if flag is None:
        return Tokens(k, v, None, None)
    padding = flag == PADDING
    return Tokens(jnp.where(padding, LOG_ZERO, k), v, flag == START, padding)


def forward(
    log_w: Array, u: Array, tokens: list[Tokens], state: Wkv4State
) -> tuple[list[Array], Wkv4State]:
    """Each token's y, and the state after the last."""
    out = []
    for x in tokens:
        state, y = step(log_w, u, state, x)
        out.append(y)
    return out, state


def backward(
    log_w: Array,
    u: Array,
    tokens: list[Tokens],
    dy: list[Array],
    state: Wkv4State,
    after: SweptBack,
) -> tuple[list[tuple[Array, Array]], SweptBack]:
    """Each token's (dk, dv), and what is carried on to the token before the first."""
    readings = []
    for x, d in zip(tokens, dy, strict=True):
        state, reading = step_again(log_w, u, state, (x, d))
        readings.append(reading)
    carry, out = (after, pair(state, after.grad)), []
    for x, reading in zip(reversed(tokens), reversed(readings), strict=True):
        carry, gradients = step_back(log_w, carry, (x, x.v - reading.gap, reading))
        out.append(gradients)
    return out[::-1], carry[0]


def refusal(kernel: Kernel, state: Wkv4State) -> str | None:
    """Why there is no kernel for such inputs: any of float64 makes the state so."""
    return "float64" if state.num.dtype == jnp.float64 else None


def operator(kernel: Kernel, named: bool) -> Callable:
    """`rwkv_jax.wkv.wkv4` by the kernel; on a CPU by XLA's form, unless it was asked for by
    name."""

    def wkv4(x: Inputs, state: Wkv4State, reset: Array | None) -> tuple[Array, Wkv4State]:
        kernels.check(kernel, "wkv4", named, refusal(kernel, state))
        log_w, k, v, u, mask = x
        t = k.shape[1]
        more = -t % SIZE
        if more:
            k, v = (jnp.pad(z, ((0, 0), (0, more), (0, 0))) for z in (k, v))
            mask = jnp.ones((k.shape[0], t), bool) if mask is None else mask
            reset, mask = (
                z if z is None else jnp.pad(z, ((0, 0), (0, more))) for z in (reset, mask)
            )
        y, after = recurrence(kernel, named)(log_w, k, v, u, state, reset, mask)
        return y[:, :t], after

    return wkv4


@lru_cache
def recurrence(kernel: Kernel, named: bool) -> Callable:
    """The operator for whole chunks, with its gradient."""

    def pick(run: Callable, form: Callable) -> Callable:
        return kernels.on_platform(kernel.platform, named, run, form)

    return kernels.differentiable(
        "wkv4",
        pick(partial(_forward, kernel, False), _reference),
        pick(partial(_forward, kernel, True), _forward_elsewhere),
        pick(partial(_backward, kernel), _backward_elsewhere),
        _reference,
    )


def _reference(log_w, k, v, u, state, reset, mask):
    return in_compute_dtype(chunked.wkv4)(Inputs(log_w, k, v, u, mask), state, reset)


def _forward_elsewhere(log_w, k, v, u, state, reset, mask):
    form = partial(chunked.forward, size=SIZE)
    x = (z.astype(jnp.float32) for z in (log_w, k, v, u))
    (y, last), entering = form(Inputs(*x, mask), state, reset)
    return (y.astype(v.dtype), last), (entering, last)


def _backward_elsewhere(given, kept, cotangents):
    *x, reset, mask = given
    gradients = jax.vjp(lambda *x: _reference(*x, reset, mask), *x)[1](cotangents)
    return *gradients, None, None


def _forward(kernel, keep, interpret, log_w, k, v, u, state, reset, mask):
    """(`y`, the state after), and, to `keep`, the states that enter the chunks and the last."""
    fixed, dims = _fixed(log_w, k, v, u, reset, mask)

    def call(*given: Array) -> tuple[Array, ...]:
        fixed, state = given[:-3], Wkv4State(*given[-3:])
        return kernel.driver.forward(keep, interpret, *_filled(fixed), state)

    results = ["bth", *["bh"] * 3, *["cbh"] * 3 * keep]
    run = kernels.per_row(
        call, [*dims, *["bh"] * 3], results, lambda c: kernel.lanes, platform=kernel.platform
    )
    y, *states = run(*fixed, *state)
    last = Wkv4State(*states[:3])
    return ((y, last), (Wkv4State(*states[3:]), last)) if keep else (y, last)


def _backward(kernel, interpret, given, kept, cotangents):
    """Gradients of what `_forward` was given."""
    log_w, k, v, u, state, reset, mask = given
    entering, last = kept
    dy, dlast = cotangents
    fixed, dims = _fixed(log_w, k, v, u, reset, mask)

    def call(*given: Array) -> tuple[Array, ...]:
        *fixed, dy = given[:-6]
        states = Wkv4State(*given[-6:-3]), Wkv4State(*given[-3:])
        return kernel.driver.backward(interpret, *_filled(fixed), dy, *states)

    results = ["bth", "bth", *["bh"] * 5]
    dims = [*dims, "bth", *["cbh"] * 3, *["bh"] * 3]
    run = kernels.per_row(call, dims, results, lambda c: kernel.lanes, platform=kernel.platform)
    dk, dv, dlog_w, du, *grad = run(*fixed, dy, *entering, *arriving(dlast, last))
    dlog_w, du = jnp.sum(dlog_w, 0).astype(log_w.dtype), jnp.sum(du, 0).astype(u.dtype)
    return dlog_w, dk, dv, du, of_state(Wkv4State(*grad), state), None, None


def _fixed(log_w, k, v, u, reset, mask) -> tuple[list[Array], list[str]]:
    """What both passes read, and its dimensions: k, v, log_w and u by row, the tokens' flags."""
    flags: list[Int[Array, "b t"]] = []
    if reset is not None or mask is not None:
        flag = jnp.zeros(k.shape[:2], jnp.int32)
        flag = flag if reset is None else jnp.where(reset, START, flag)
        flags = [flag if mask is None else jnp.where(mask, flag, PADDING)]
    rows = [jnp.broadcast_to(z.astype(jnp.float32), (k.shape[0], *z.shape)) for z in (log_w, u)]
    return [k, v, *rows, *flags], ["bth", "bth", "bh", "bh", *["bt"] * len(flags)]


def _filled(fixed: tuple[Array, ...] | list[Array]) -> tuple[Array | None, ...]:
    """With None for flags where there are none."""
    return tuple(fixed) if len(fixed) == 5 else (*fixed, None)
