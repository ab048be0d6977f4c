"""RWKV-4's kernels: a few tokens at a time in registers, forward and backward.

Channels do not mix, so lanes are channels, and a program goes through time token by token. The
state that enters every few tokens is kept; the backward pass sweeps those tokens forward again,
keeping their readings, then back. The algebra is that of `v4/sweeps.py`.

On a GPU a program has a row and 128 channels, or as many as divide theirs, and loops over chunks.
On a TPU the grid has rows, channels, and chunks in order, with the sums in VMEM from the first
chunk to the last; channels fill whole registers, [b, t, c] as [b, t, c / 128, 128].
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from rwkv_jax.typing import Array, Bool, Float, Int
from rwkv_jax.wkv.form import Form, Starts, in_compute_dtype
from rwkv_jax.wkv.pallas.gpu import driver as gpu
from rwkv_jax.wkv.pallas.heads import unsupported_dtype
from rwkv_jax.wkv.pallas.kernel import (
    Algebra,
    Backward,
    Driver,
    Forward,
    Gradients,
    Kernel,
    Outputs,
    Passes,
    pass_letters,
    passes,
    recurrence,
)
from rwkv_jax.wkv.pallas.launch import Axis, launch, map_letters
from rwkv_jax.wkv.pallas.tpu import driver as tpu
from rwkv_jax.wkv.pallas.tpu.lanes import LANES, SUBLANES
from rwkv_jax.wkv.v4 import chunked, sweeps
from rwkv_jax.wkv.v4.recurrence import LOG_ZERO, Inputs, Wkv4State
from rwkv_jax.wkv.v4.sweeps import SweptBack, Tokens

SIZE = 16
"""Tokens at a time."""
ROWS = 6 * SUBLANES
"""Rows of 128 channels a program on a TPU, at most."""
START, PADDING = 1, 2
"""Flags of tokens."""
LETTERS = pass_letters(tokens="bth", shared="bh", state="bh", entering="cbh", starts="bt")


def flags(
    masks: tuple[Starts, Bool[Array, "b t"] | None], size: int = SIZE
) -> Int[Array, "b t"] | None:
    """Where documents start and where tokens are valid, as flags of tokens."""
    reset, valid = masks
    given = [z for z in masks if z is not None]
    if not given:
        return None
    flag = jnp.zeros(given[0].shape, jnp.int32)
    flag = flag if reset is None else jnp.where(reset, START, flag)
    return flag if valid is None else jnp.where(valid, flag, PADDING)


def token(k: Array, v: Array, flag: Array | None) -> Tokens:
    """A token's lanes in float32; `flag` has their shape."""
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
        state, y = sweeps.step(log_w, u, state, x)
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
    """Each token's (dk, dv), and what is carried to the token before the first."""
    readings = []
    for x, d in zip(tokens, dy, strict=True):
        state = sweeps.meet(state, x)
        readings.append(sweeps.read_again(u, state, x, d))
        state = sweeps.advance(state, x, log_w)
    out = []
    for x, reading in zip(reversed(tokens), reversed(readings), strict=True):
        after, gradients = sweeps.step_back(log_w, after, (x, x.v - reading.gap, reading))
        out.append(gradients)
    return out[::-1], after


ALGEBRA = Algebra("wkv4", forward, backward, flags)


def read(refs: Any, *index: Any) -> Any:
    return jax.tree.map(lambda ref: ref[index or ...], refs)


def write(refs: Any, values: Any, *index: Any) -> None:
    for ref, x in zip(jax.tree.leaves(refs), jax.tree.leaves(values), strict=True):
        ref[index or ...] = x.astype(ref.dtype)


# On a GPU.


def _run_gpu(kernel: Kernel, name: str, inputs: Any, outputs: Any, interpret: bool) -> Any:
    letters, out_letters = LETTERS[name]
    channels = inputs.x.v.shape[2]
    width = min(128, channels & -channels)  # a power of two that divides them
    return launch(
        {"forward": _forward_gpu, "backward": _backward_gpu}[name],
        f"wkv4_{name}",
        (Axis({"b": None}), Axis({"h": width})),
        (inputs, letters),
        (outputs, out_letters),
        **gpu.options(max(1, width // 32), interpret),
    )


def _forward_gpu(inputs: Forward, out: Outputs) -> None:
    log_w, u = read(inputs.shared)

    def chunk(i: Array, state: Wkv4State) -> Wkv4State:
        if out.entering is not None:
            write(out.entering, state, i)
        tokens = [_token_gpu(inputs, i * SIZE + j) for j in range(SIZE)]
        ys, state = forward(log_w, u, tokens, state)
        for j, y in enumerate(ys):
            out.y[i * SIZE + j] = y.astype(out.y.dtype)
        return state

    write(out.after, lax.fori_loop(0, out.y.shape[0] // SIZE, chunk, read(inputs.state)))


def _backward_gpu(inputs: Backward, out: Gradients) -> None:
    log_w, u = read(inputs.shared)
    chunks = inputs.dy.shape[0] // SIZE

    def chunk(i: Array, after: SweptBack) -> SweptBack:
        i = chunks - 1 - i
        tokens = [_token_gpu(inputs, i * SIZE + j) for j in range(SIZE)]
        dy = [inputs.dy[i * SIZE + j].astype(jnp.float32) for j in range(SIZE)]
        gradients, before = backward(log_w, u, tokens, dy, read(inputs.entering, i), after)
        for j, (dk, dv) in enumerate(gradients):
            out.x.k[i * SIZE + j] = dk.astype(out.x.k.dtype)
            out.x.v[i * SIZE + j] = dv.astype(out.x.v.dtype)
        return before

    zero = jnp.zeros_like(log_w)
    before = lax.fori_loop(0, chunks, chunk, SweptBack(read(inputs.dstate), zero, zero))
    write((out.shared, out.state), (before.log_w, before.u, before.grad))


def _token_gpu(inputs: Forward | Backward, t: Array) -> Tokens:
    k, v = inputs.x.k[t], inputs.x.v
    flag = None if inputs.starts is None else jnp.broadcast_to(inputs.starts[t], k.shape)
    return token(k, v[t], flag)


# On a TPU.

_FOLDED = {"bth": "btrl", "bh": "brl", "cbh": "cbrl", "bt": "bc1s"}
"""The letters of folded arrays: registers' rows of lanes, and a chunk's flags."""


def _fold(dims: str, x: Array) -> Array:
    if dims == "bt":
        return x.reshape(x.shape[0], -1, 1, SIZE)
    return x.reshape(*x.shape[:-1], -1, LANES)


def _run_tpu(kernel: Kernel, name: str, inputs: Any, outputs: Any, interpret: bool) -> Any:
    # Imported here: only programs for TPUs, and tests, need it.
    from jax.experimental.pallas import tpu as mosaic

    letters, out_letters = LETTERS[name]
    fold = partial(map_letters, _fold)
    rows = inputs.x.v.shape[2] // LANES
    # Several registers, which do not wait for each other, or all there are.
    rows = max((n for n in range(SUBLANES, ROWS + 1, SUBLANES) if rows % n == 0), default=rows)
    carried = {"forward": 3, "backward": 5}[name]
    out = launch(
        {"forward": _forward_tpu, "backward": _backward_tpu}[name],
        f"wkv4_{name}",
        (
            Axis({"b": None}),
            Axis({"r": rows}),
            Axis({"t": SIZE, "c": None}, backwards=name == "backward"),
        ),
        (fold(letters, inputs), jax.tree.map(_FOLDED.get, letters)),
        (
            jax.eval_shape(partial(fold, out_letters), outputs),
            jax.tree.map(_FOLDED.get, out_letters),
        ),
        {"bc1s": mosaic.SMEM},
        **tpu.options(3, [(rows, LANES)] * carried, interpret),
    )
    return jax.tree.map(lambda x, like: x.reshape(like.shape), out, outputs)


def _forward_tpu(inputs: Forward, out: Outputs, *scratch: Any) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _():
        write(scratch, read(inputs.state))

    state = Wkv4State(*read(scratch))
    if out.entering is not None:
        write(out.entering, state)
    tokens = [_token_tpu(inputs, j) for j in range(SIZE)]
    log_w, u = read(inputs.shared)
    ys, after = forward(log_w, u, tokens, state)
    for j, y in enumerate(ys):
        write(out.y, y, j)
    write(scratch, after)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        write(out.after, after)


def _backward_tpu(inputs: Backward, out: Gradients, *scratch: Any) -> None:
    log_w, u = read(inputs.shared)

    @pl.when(pl.program_id(2) == 0)
    def _():
        zero = jnp.zeros_like(log_w)
        write(scratch, (zero, zero, read(inputs.dstate)))

    dlog_w, du, *grad = read(scratch)
    tokens = [_token_tpu(inputs, j) for j in range(SIZE)]
    dy = [inputs.dy[j].astype(jnp.float32) for j in range(SIZE)]
    after = SweptBack(Wkv4State(*grad), dlog_w, du)
    gradients, before = backward(log_w, u, tokens, dy, read(inputs.entering), after)
    for j, gradient in enumerate(gradients):
        write(out.x, gradient, j)
    carried = (before.log_w, before.u, before.grad)
    write(scratch, carried)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        write((out.shared, out.state), carried)


def _token_tpu(inputs: Forward | Backward, j: int) -> Tokens:
    k, v = inputs.x.k[j], inputs.x.v
    flag = None if inputs.starts is None else jnp.full(k.shape, inputs.starts[0, j], jnp.int32)
    return token(k, v[j], flag)


def _identity(entering: Wkv4State, x: Any) -> Wkv4State:
    return entering


GPU = Driver(
    "cuda",
    LETTERS,
    _run_gpu,
    lambda h, n: 32,
    _identity,
    _identity,
    lambda x: unsupported_dtype(x, "bfloat16", "float16", "float32"),
    lambda x, size: (1, size, x.k.shape[2]),
)
TPU = Driver(
    "tpu",
    LETTERS,
    _run_tpu,
    lambda h, n: LANES,
    _identity,
    _identity,
    lambda x: unsupported_dtype(x, "bfloat16", "float32"),
    lambda x, size: (1, size, x.k.shape[2]),
)


def form(kernel: Kernel, named: bool) -> Form:
    """The form by the kernel; in programs for a CPU it is interpreted if it was `named`."""
    by_chunks = recurrence(kernel, named, partial(_passes, kernel), _XLA, _reference)

    def wkv4(x: Inputs, state: Wkv4State, reset: Starts) -> tuple[Float[Array, "b t c"], Wkv4State]:
        k, v, valid, t = x.k, x.v, x.mask, x.k.shape[1]
        more = -t % SIZE
        if more:
            k, v = (jnp.pad(z, ((0, 0), (0, more), (0, 0))) for z in (k, v))
            valid = jnp.ones((k.shape[0], t), bool) if valid is None else valid
            reset, valid = (
                z if z is None else jnp.pad(z, ((0, 0), (0, more))) for z in (reset, valid)
            )
        shared = (x.log_w.astype(jnp.float32), x.u.astype(jnp.float32))
        y, after = by_chunks(Tokens(k, v, None, None), shared, state, (reset, valid))
        return y[:, :t], after

    return wkv4


def _passes(kernel: Kernel, interpret: bool) -> Passes:
    """The kernel's passes, whose states are sums (`gradient_of_sums`)."""
    primal, run_forward, run_backward = passes(kernel, interpret)

    def forward(*args: Any) -> Any:
        (y, last), entering = run_forward(*args)
        return (y, last), (entering, last)

    def backward(args: Any, residuals: Any, cotangents: Any) -> Any:
        entering, last = residuals
        dy, dlast = cotangents
        cotangents = dy, sweeps.gradient_of_sums(dlast, last)
        dx, dshared, grad, _ = run_backward(args, entering, cotangents)
        return dx, dshared, sweeps.gradient_of_state(grad, args[2]), None

    return Passes(primal, forward, backward)


def _inputs(x: Tokens, shared: Any, masks: Any) -> Inputs:
    return Inputs(shared[0], x.k, x.v, shared[1], masks[1])


def _reference(x: Tokens, shared: Any, state: Wkv4State, masks: Any):
    return in_compute_dtype(chunked.wkv4)(_inputs(x, shared, masks), state, masks[0])


def _xla_forward(x: Tokens, shared: Any, state: Wkv4State, masks: Any):
    wide = jax.tree.map(lambda z: z.astype(jnp.float32), x)
    (y, last), entering = chunked.forward(_inputs(wide, shared, masks), state, masks[0], SIZE)
    return (y.astype(x.v.dtype), last), (entering, last)


def _xla_backward(args: Any, residuals: Any, cotangents: Any):
    *x, masks = args
    _, pull_back = jax.vjp(lambda *x: _reference(x[0], x[1], x[2], masks), *x)
    return *pull_back(cotangents), None


_XLA = Passes(_reference, _xla_forward, _xla_backward)
