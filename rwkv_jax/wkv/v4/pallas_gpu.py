"""RWKV-4's WKV as a kernel for NVIDIA GPUs, by Pallas' Triton backend: a program a row and 128
channels, or as many as divide theirs."""

import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from rwkv_jax.typing import Array
from rwkv_jax.wkv import triton
from rwkv_jax.wkv.v4 import kernel
from rwkv_jax.wkv.v4.kernel import SIZE, Kernel, operator, token
from rwkv_jax.wkv.v4.recurrence import Wkv4State
from rwkv_jax.wkv.v4.sweeps import SweptBack


def forward(
    keep: bool,
    interpret: bool,
    k: Array,
    v: Array,
    log_w: Array,
    u: Array,
    flags: Array | None,
    state: Wkv4State,
) -> tuple[Array, ...]:
    """(y, the state after), and where `keep` the states that enter the chunks [chunks, b, c]."""
    b, t, c = k.shape
    channels, row, kept, flag = _specs(t, c)
    inputs = [k, v, log_w, u, *state, *([] if flags is None else [flags])]
    specs = [channels] * 2 + [row] * 5 + [flag] * (flags is not None)
    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype)]
    shapes += [jax.ShapeDtypeStruct((b, c), jnp.float32)] * 3
    shapes += [jax.ShapeDtypeStruct((t // SIZE, b, c), jnp.float32)] * 3 * keep
    out_specs = [channels] + [row] * 3 + [kept] * 3 * keep
    body = partial(_forward, keep=keep, flagged=flags is not None)
    grid, warps = _grid(b, c), _warps(c)
    return triton.call(
        "wkv4_forward", body, grid, inputs, specs, out_specs, shapes, warps, interpret
    )


def _forward(*refs: Any, keep: bool, flagged: bool) -> None:
    k_ref, v_ref, log_w_ref, u_ref, *given = refs
    state_refs, given = given[:3], given[3:]
    flag_ref, *given = given if flagged else [None, *given]
    y_ref, after_refs, kept_refs = given[0], given[1:4], given[4:]
    log_w, u = log_w_ref[...], u_ref[...]

    def chunk(i: Array, state: Wkv4State) -> Wkv4State:
        for ref, x in zip(kept_refs, state, strict=keep):
            ref[i] = x
        tokens = [_token(k_ref, v_ref, flag_ref, i * SIZE + j) for j in range(SIZE)]
        out, state = kernel.forward(log_w, u, tokens, state)
        for j, y in enumerate(out):
            y_ref[i * SIZE + j] = y.astype(y_ref.dtype)
        return state

    start = Wkv4State(*(ref[...] for ref in state_refs))
    after = lax.fori_loop(0, y_ref.shape[0] // SIZE, chunk, start)
    for ref, x in zip(after_refs, after, strict=True):
        ref[...] = x


def backward(
    interpret: bool,
    k: Array,
    v: Array,
    log_w: Array,
    u: Array,
    flags: Array | None,
    dy: Array,
    entering: Wkv4State,
    grad: Wkv4State,
) -> tuple[Array, ...]:
    """Gradients of k and v, of log_w and u by row, and of the sums before the first token, from
    those of y and of the sums after the last."""
    b, t, c = k.shape
    channels, row, kept, flag = _specs(t, c)
    inputs = [k, v, log_w, u, dy, *entering, *grad, *([] if flags is None else [flags])]
    specs = [channels] * 2 + [row] * 2 + [channels] + [kept] * 3 + [row] * 3
    specs += [flag] * (flags is not None)
    shapes = [jax.ShapeDtypeStruct(z.shape, z.dtype) for z in (k, v)]
    shapes += [jax.ShapeDtypeStruct((b, c), jnp.float32)] * 5
    out_specs = [channels] * 2 + [row] * 5
    body = partial(_backward, flagged=flags is not None)
    grid, warps = _grid(b, c), _warps(c)
    return triton.call(
        "wkv4_backward", body, grid, inputs, specs, out_specs, shapes, warps, interpret
    )


def _backward(*refs: Any, flagged: bool) -> None:
    k_ref, v_ref, log_w_ref, u_ref, dy_ref, *given = refs
    entering_refs, grad_refs, given = given[:3], given[3:6], given[6:]
    flag_ref, *given = given if flagged else [None, *given]
    dk_ref, dv_ref, *out_refs = given
    log_w, u = log_w_ref[...], u_ref[...]
    chunks = dy_ref.shape[0] // SIZE

    def chunk(i: Array, after: SweptBack) -> SweptBack:
        i = chunks - 1 - i
        tokens = [_token(k_ref, v_ref, flag_ref, i * SIZE + j) for j in range(SIZE)]
        dy = [dy_ref[i * SIZE + j].astype(jnp.float32) for j in range(SIZE)]
        state = Wkv4State(*(ref[i] for ref in entering_refs))
        gradients, before = kernel.backward(log_w, u, tokens, dy, state, after)
        for j, (dk, dv) in enumerate(gradients):
            dk_ref[i * SIZE + j] = dk.astype(dk_ref.dtype)
            dv_ref[i * SIZE + j] = dv.astype(dv_ref.dtype)
        return before

    zero = jnp.zeros_like(log_w)
    after = SweptBack(Wkv4State(*(ref[...] for ref in grad_refs)), zero, zero)
    before = lax.fori_loop(0, chunks, chunk, after)
    for ref, x in zip(out_refs, (before.log_w, before.u, *before.grad), strict=True):
        ref[...] = x


def _token(k_ref: Any, v_ref: Any, flag_ref: Any, t: Array):
    k = k_ref[t]
    flag = None if flag_ref is None else jnp.broadcast_to(flag_ref[t], k.shape)
    return token(k, v_ref[t], flag)


def _width(c: int) -> int:
    """Channels a program: a power of two that divides them."""
    return min(128, c & -c)


def _warps(c: int) -> int:
    return max(1, _width(c) // 32)


def _grid(b: int, c: int) -> tuple[int, int]:
    return b, c // _width(c)


def _specs(t: int, c: int) -> tuple[pl.BlockSpec, ...]:
    """Of a program: its channels of all tokens, of a row, of the kept states; the tokens' flags."""
    width = _width(c)
    return (
        pl.BlockSpec((None, t, width), lambda b, i: (b, 0, i)),
        pl.BlockSpec((None, width), lambda b, i: (b, i)),
        pl.BlockSpec((t // SIZE, None, width), lambda b, i: (0, b, i)),
        pl.BlockSpec((None, t), lambda b, i: (b, 0)),
    )


KERNEL = Kernel("cuda", 32, sys.modules[__name__])

wkv4 = operator(KERNEL, named=True)
