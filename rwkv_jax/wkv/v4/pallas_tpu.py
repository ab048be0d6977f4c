"""RWKV-4's WKV as a kernel for TPUs, by Pallas' Mosaic backend: a grid of rows, channels, and
chunks in order, the sums in VMEM from the first chunk to the last.

A token's channels fill whole registers: [b, t, c] is cut into [b, t, c / 128, 128].
"""

import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from rwkv_jax.typing import Array
from rwkv_jax.wkv import mosaic
from rwkv_jax.wkv.mosaic import LANES
from rwkv_jax.wkv.v4 import kernel
from rwkv_jax.wkv.v4.kernel import SIZE, Kernel, operator, token
from rwkv_jax.wkv.v4.recurrence import Wkv4State
from rwkv_jax.wkv.v4.sweeps import SweptBack

SUBLANES = 8


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
    """`pallas_gpu.forward`."""
    b, t, c = k.shape
    channels, row, kept, flag = _specs(c, lambda i: i)
    inputs = [*map(folded, (k, v, log_w, u, *state)), *_per_chunk(flags)]
    specs = [channels] * 2 + [row] * 5 + [flag] * (flags is not None)
    rows, states = folded(state.num).shape, (t // SIZE, *folded(state.num).shape)
    shapes = [jax.ShapeDtypeStruct(folded(v).shape, v.dtype)]
    shapes += [jax.ShapeDtypeStruct(rows, jnp.float32)] * 3
    shapes += [jax.ShapeDtypeStruct(states, jnp.float32)] * 3 * keep
    out_specs = [channels] + [row] * 3 + [kept] * 3 * keep
    body = partial(_forward, keep=keep, flagged=flags is not None)
    grid, carried = _grid(b, t, c), [(_rows(c), LANES)] * 3
    out = mosaic.call(
        "wkv4_forward", body, grid, inputs, specs, out_specs, shapes, carried, interpret
    )
    return tuple(x.reshape(*x.shape[:-2], c) for x in out)


def _forward(*refs: Any, keep: bool, flagged: bool) -> None:
    given, scratch = refs[:-3], refs[-3:]
    k_ref, v_ref, log_w_ref, u_ref, *given = given
    state_refs, given = given[:3], given[3:]
    flag_ref, *given = given if flagged else [None, *given]
    y_ref, after_refs, kept_refs = given[0], given[1:4], given[4:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        _store(scratch, [ref[...] for ref in state_refs])

    state = Wkv4State(*(ref[...] for ref in scratch))
    if keep:
        _store(kept_refs, state)
    tokens = [_token(k_ref, v_ref, flag_ref, j) for j in range(SIZE)]
    out, after = kernel.forward(log_w_ref[...], u_ref[...], tokens, state)
    for j, y in enumerate(out):
        y_ref[j] = y.astype(y_ref.dtype)
    _store(scratch, after)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        _store(after_refs, after)


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
    """`pallas_gpu.backward`."""
    b, t, c = k.shape
    chunks = t // SIZE
    channels, row, kept, flag = _specs(c, lambda i: chunks - 1 - i)
    inputs = [*map(folded, (k, v, log_w, u, dy, *entering, *grad)), *_per_chunk(flags)]
    specs = [channels] * 2 + [row] * 2 + [channels] + [kept] * 3 + [row] * 3
    specs += [flag] * (flags is not None)
    shapes = [jax.ShapeDtypeStruct(folded(z).shape, z.dtype) for z in (k, v)]
    shapes += [jax.ShapeDtypeStruct(folded(grad.num).shape, jnp.float32)] * 5
    out_specs = [channels] * 2 + [row] * 5
    body = partial(_backward, flagged=flags is not None)
    grid, carried = _grid(b, t, c), [(_rows(c), LANES)] * 5
    out = mosaic.call(
        "wkv4_backward", body, grid, inputs, specs, out_specs, shapes, carried, interpret
    )
    return tuple(x.reshape(*x.shape[:-2], c) for x in out)


def _backward(*refs: Any, flagged: bool) -> None:
    given, scratch = refs[:-5], refs[-5:]
    k_ref, v_ref, log_w_ref, u_ref, dy_ref, *given = given
    entering_refs, grad_refs, given = given[:3], given[3:6], given[6:]
    flag_ref, *given = given if flagged else [None, *given]
    dk_ref, dv_ref, *out_refs = given
    log_w, u = log_w_ref[...], u_ref[...]

    @pl.when(pl.program_id(2) == 0)
    def _():
        zero = jnp.zeros_like(log_w)
        _store(scratch, [zero, zero, *(ref[...] for ref in grad_refs)])

    dlog_w, du, *grad = (ref[...] for ref in scratch)
    tokens = [_token(k_ref, v_ref, flag_ref, j) for j in range(SIZE)]
    dy = [dy_ref[j].astype(jnp.float32) for j in range(SIZE)]
    state = Wkv4State(*(ref[...] for ref in entering_refs))
    after = SweptBack(Wkv4State(*grad), dlog_w, du)
    gradients, before = kernel.backward(log_w, u, tokens, dy, state, after)
    for j, (dk, dv) in enumerate(gradients):
        dk_ref[j] = dk.astype(dk_ref.dtype)
        dv_ref[j] = dv.astype(dv_ref.dtype)
    carried = [before.log_w, before.u, *before.grad]
    _store(scratch, carried)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        _store(out_refs, carried)


def _store(refs: Any, values: Any) -> None:
    for ref, x in zip(refs, values, strict=True):
        ref[...] = x


def _token(k_ref: Any, v_ref: Any, flag_ref: Any, j: int):
    k = k_ref[j]
    flag = None if flag_ref is None else jnp.full(k.shape, flag_ref[0, j], jnp.int32)
    return token(k, v_ref[j], flag)


def folded(x: Array) -> Array:
    """[..., c] -> [..., c / 128, 128]."""
    return x.reshape(*x.shape[:-1], -1, LANES)


def _per_chunk(flags: Array | None) -> list[Array]:
    """[b, t] -> [b, chunks, 1, C]."""
    return [] if flags is None else [flags.reshape(flags.shape[0], -1, 1, SIZE)]


def _rows(c: int) -> int:
    """Registers' rows a program: one full register, or all that there are."""
    count = c // LANES
    return count if count % SUBLANES else SUBLANES


def _specs(c: int, order: Any) -> tuple[pl.BlockSpec, ...]:
    """Of a program: its channels of a chunk, of a row, of a kept state; a chunk's flags."""
    from jax.experimental.pallas import tpu

    tile = (_rows(c), LANES)
    return (
        pl.BlockSpec((None, SIZE, *tile), lambda b, i, t: (b, order(t), i, 0)),
        pl.BlockSpec((None, *tile), lambda b, i, t: (b, i, 0)),
        pl.BlockSpec((None, None, *tile), lambda b, i, t: (order(t), b, i, 0)),
        pl.BlockSpec(
            (None, None, 1, SIZE),
            lambda b, i, t: (b, order(t), 0, 0),
            memory_space=tpu.SMEM,
        ),
    )


def _grid(b: int, t: int, c: int) -> tuple[int, int, int]:
    return b, c // LANES // _rows(c), t // SIZE


KERNEL = Kernel("tpu", LANES, sys.modules[__name__])

wkv4 = operator(KERNEL, named=True)
