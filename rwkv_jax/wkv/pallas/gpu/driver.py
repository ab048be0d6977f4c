"""Versions 5 to 7 on GPUs, by Pallas' Triton backend: one program for each row and head, which
keeps its state in registers from the first chunk to the last.

Each token is read once and each result written once. The state that enters a chunk is kept for the
backward pass, which recomputes the chunk from it; in bfloat16 if the inputs are. What a chunk
computes is a version's `Algebra`.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from rwkv_jax.typing import Array
from rwkv_jax.wkv.device import device_kind
from rwkv_jax.wkv.pallas import heads
from rwkv_jax.wkv.pallas.gpu import tiles
from rwkv_jax.wkv.pallas.gpu.tiles import Precision, Products
from rwkv_jax.wkv.pallas.kernel import (
    Algebra,
    Backward,
    Driver,
    Forward,
    Gradients,
    Kernel,
    Outputs,
    pass_letters,
)
from rwkv_jax.wkv.pallas.launch import Axis, launch

WARPS = 8
"""With 4, more registers are spilled (`python -m benchmarks.schedule`)."""
TF32_THRICE = lax.DotAlgorithmPreset.TF32_TF32_F32_X3
"""Relative error about 2^-22, on tensor cores."""
LARGE = ("H100", "H200", "GH200", "B200", "GB200")
"""GPUs with the 176 KiB of shared memory a block that float32 heads of 128 take."""
GRID = (Axis({"b": None}), Axis({"h": None}))
LETTERS = pass_letters(tokens="bthn", shared="bhn", state="bhvk", entering="cbhvk", starts="bcs")


def unsupported(x: Any) -> str | None:
    dtypes = heads.unsupported_dtype(x, "bfloat16", "float16", "float32")
    if reason := dtypes or heads.unsupported(x):
        return reason
    kind = device_kind()
    small = "NVIDIA" in kind and not any(name in kind for name in LARGE)
    if x.r.shape[-1] == 128 and x.v.dtype == jnp.float32 and small:
        return f"float32 heads of 128 channels on {kind} (bfloat16 ones are supported)"
    return None


def products(dtype: Any, interpret: bool) -> Products:
    """The products for inputs of `dtype`."""
    # A CPU has no TF32. It rounds bfloat16 as a GPU does.
    exact = Precision(None, lax.Precision.HIGHEST if interpret else TF32_THRICE)
    data = exact if dtype == jnp.float32 else Precision("bfloat16", lax.Precision.DEFAULT)
    return Products(data, exact)


def run(kernel: Kernel, name: str, inputs: Any, outputs: Any, interpret: bool) -> Any:
    """Launches the forward or backward pass (`Driver.run`)."""
    body = {"forward": _forward, "backward": _backward}[name]
    p = products(inputs.x.v.dtype, interpret)
    letters, out_letters = LETTERS[name]
    return launch(
        partial(body, kernel.algebra, kernel.size, p),
        f"{kernel.algebra.operator}_{name}",
        GRID,
        (inputs, letters),
        (outputs, out_letters),
        **options(WARPS, interpret),
    )


def _forward(algebra: Algebra, size: int, p: Products, inputs: Forward, out: Outputs) -> None:
    shared = _vectors(inputs)

    def chunk(i: Array, state: Array) -> Array:
        if out.entering is not None:
            out.entering[i] = state.astype(out.entering.dtype)
        x, rows = _chunk(inputs, i, size)
        y, state = algebra.forward(x, shared, state, rows, p)
        out.y[pl.ds(i * size, size), :] = y.astype(out.y.dtype)
        return state

    chunks = out.y.shape[0] // size
    out.after[...] = lax.fori_loop(0, chunks, chunk, inputs.state[...].astype(jnp.float32))


def _backward(algebra: Algebra, size: int, p: Products, inputs: Backward, out: Gradients) -> None:
    shared = _vectors(inputs)
    chunks = inputs.dy.shape[0] // size

    def chunk(i: Array, carry: tuple) -> tuple:
        i = chunks - 1 - i
        dstate, dshared = carry
        x, rows = _chunk(inputs, i, size)
        here = pl.ds(i * size, size)
        dy = inputs.dy[here, :].astype(jnp.float32)
        state = inputs.entering[i].astype(jnp.float32)
        dx, more, dstate = algebra.backward(x, shared, state, dy, dstate, rows, p)
        for ref, z in zip(out.x, dx, strict=True):
            ref[here, :] = z.astype(ref.dtype)
        return dstate, tuple(a + b for a, b in zip(dshared, more, strict=True))

    zeros = tuple(jnp.zeros_like(u) for u in shared)
    carry = (inputs.dstate[...].astype(jnp.float32), zeros)
    dstate, dshared = lax.fori_loop(0, chunks, chunk, carry)
    for ref, z in zip(out.shared, dshared, strict=True):
        ref[...] = jnp.sum(z, axis=0)
    out.state[...] = dstate


def _vectors(inputs: Forward | Backward) -> tuple[Array, ...]:
    return tuple(ref[...][None, :].astype(jnp.float32) for ref in inputs.shared)


def _chunk(inputs: Forward | Backward, i: Array, size: int) -> tuple[Any, tiles.Rows]:
    """The inputs of chunk `i` in float32, and its rows."""
    refs = inputs.x
    x = type(refs)(*(ref[pl.ds(i * size, size), :].astype(jnp.float32) for ref in refs))
    counts = None if inputs.starts is None else inputs.starts[i][None, :]
    return x, tiles.rows(size, counts)


def options(warps: int, interpret: bool) -> dict[str, Any]:
    """Triton's options of `pl.pallas_call`."""
    if interpret:
        return {"interpret": True}
    # Imported here: it is slow to import, and only programs for GPUs need it.
    from jax.experimental.pallas import triton

    return {"compiler_params": triton.CompilerParams(num_warps=warps, num_stages=1)}


def pack(entering: Array, x: Any) -> Array:
    return entering.astype(heads.kept_dtype(x))


def unpack(entering: Array, x: Any) -> Array:
    return entering.astype(jnp.float32)


def program(x: Any, size: int) -> tuple[int, int, int]:
    return 1, size, 1


DRIVER = Driver("cuda", LETTERS, run, lambda h, n: 1, pack, unpack, unsupported, program)
