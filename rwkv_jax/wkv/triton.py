"""Versions 5 to 7 on GPUs, by Pallas' Triton backend: a program a row and head, its state in
registers from the first chunk to the last.

Each token is read once and each result written once. The state that enters a chunk is kept for the
backward pass, in bfloat16 if the inputs are, which computes a chunk again from it. What a chunk
computes is a version's `tile.py`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from rwkv_jax.typing import Array, Float
from rwkv_jax.wkv import tiles
from rwkv_jax.wkv.device import device_kind
from rwkv_jax.wkv.tiles import Precision, Products

KEPT = "cbhvk"
"""The dimensions of the states that are kept: chunks first."""
WARPS = 8
"""With 4, more registers are spilled (`python -m benchmarks.kernels`)."""
TF32_THRICE = lax.DotAlgorithmPreset.TF32_TF32_F32_X3
"""Error about 2^-22, on tensor cores."""


LARGE = ("H100", "H200", "GH200", "B200", "GB200")
"""GPUs with the 176 KiB of shared memory a block that float32 heads of 128 take."""


def refusal(n: int, dtype: Any) -> str | None:
    """Why heads of this size have no kernel for such inputs on the program's device."""
    if n not in (16, 32, 64, 128):
        return f"heads of {n} channels (16, 32, 64 and 128 have)"
    kind = device_kind()
    small = "NVIDIA" in kind and not any(name in kind for name in LARGE)
    if n == 128 and dtype == jnp.float32 and small:
        return f"float32 heads of 128 channels on {kind}; bfloat16 ones have"
    return None


def heads_a_tile(h: int, n: int) -> int:
    """One."""
    return 1


def kept(entering: Float[Array, "chunks b h v k"]) -> Array:
    """States of all heads, as they are kept: the same."""
    return entering


def entering(kept: Array, h: int) -> Float[Array, "chunks b h v k"]:
    """The inverse of `kept`."""
    return kept


def products(dtype: Any, interpret: bool) -> Products:
    """What inputs of this type are multiplied with."""
    # A CPU knows no TF32. bfloat16 it rounds as a GPU does.
    exact = Precision(None, lax.Precision.HIGHEST if interpret else TF32_THRICE)
    data = exact if dtype == jnp.float32 else Precision("bfloat16", lax.Precision.DEFAULT)
    return Products(data, exact)


def forward(
    tile: ModuleType,
    size: int,
    keep: bool,
    interpret: bool,
    x: Any,
    shared: tuple[Array, ...],
    ids: Array | None,
    state: Array,
) -> tuple[Array, ...]:
    """(y, the state after), and where `keep` the states that enter the chunks [chunks, b, h, v, k].

    `x` are a version's inputs [b, t, h, n], of whole chunks of `size`; `shared` what all tokens
    share [b, h, n]; `ids` [b, chunks, C] counts the documents that start in a chunk.
    """
    b, t, h, n = x[0].shape
    chunks = t // size
    inputs = [*x, *shared, state, *([] if ids is None else [ids])]
    token, row, square = _specs(t, n)
    specs = [token] * len(x) + [row] * len(shared) + [square]
    kept = pl.BlockSpec((chunks, None, None, n, n), lambda b, h: (0, b, h, 0, 0))
    out_specs = [token, square] + [kept] * keep
    shapes = [
        jax.ShapeDtypeStruct(x[0].shape, x.v.dtype),
        jax.ShapeDtypeStruct(state.shape, jnp.float32),
    ] + [jax.ShapeDtypeStruct((chunks, *state.shape), kept_type(x))] * keep
    kernel = partial(
        _forward,
        tile=tile,
        form=type(x),
        size=size,
        shared=len(shared),
        documents=ids is not None,
        products=products(x.v.dtype, interpret),
    )
    name = f"{tile.OPERATOR}_forward"
    return call(
        name, kernel, (b, h), inputs, specs + _ids(ids), out_specs, shapes, WARPS, interpret
    )


def _forward(*refs: Any, tile, form, size, shared, documents, products) -> None:
    given = iter(refs)
    x_refs = form(*(next(given) for _ in form._fields))
    u = tuple(next(given)[...][None, :].astype(jnp.float32) for _ in range(shared))
    state_ref = next(given)
    ids_ref = next(given) if documents else None
    y_ref, after_ref, *entering = given

    def chunk(i: Array, state: Array) -> Array:
        for ref in entering:
            ref[i] = state.astype(ref.dtype)
        x, rows = _chunk(x_refs, ids_ref, i, size)
        y, state = tile.forward(x, u, state, rows, products)
        y_ref[pl.ds(i * size, size), :] = y.astype(y_ref.dtype)
        return state

    chunks = y_ref.shape[0] // size
    after_ref[...] = lax.fori_loop(0, chunks, chunk, state_ref[...].astype(jnp.float32))


def backward(
    tile: ModuleType,
    size: int,
    interpret: bool,
    x: Any,
    shared: tuple[Array, ...],
    ids: Array | None,
    entering: Array,
    dy: Array,
    dstate: Array,
) -> tuple[Array, ...]:
    """Gradients of `x`, of `shared` in each row, and of the state that enters the first chunk."""
    b, t, h, n = x[0].shape
    chunks = t // size
    inputs = [*x, *shared, entering, dy, dstate, *([] if ids is None else [ids])]
    token, row, square = _specs(t, n)
    kept = pl.BlockSpec((chunks, None, None, n, n), lambda b, h: (0, b, h, 0, 0))
    specs = [token] * len(x) + [row] * len(shared) + [kept, token, square]
    out_specs = [token] * len(x) + [row] * len(shared) + [square]
    shapes = [jax.ShapeDtypeStruct(z.shape, z.dtype) for z in x]
    shapes += [jax.ShapeDtypeStruct(z.shape, jnp.float32) for z in (*shared, dstate)]
    kernel = partial(
        _backward,
        tile=tile,
        form=type(x),
        size=size,
        shared=len(shared),
        documents=ids is not None,
        products=products(x.v.dtype, interpret),
    )
    name = f"{tile.OPERATOR}_backward"
    return call(
        name, kernel, (b, h), inputs, specs + _ids(ids), out_specs, shapes, WARPS, interpret
    )


def _backward(*refs: Any, tile, form, size, shared, documents, products) -> None:
    given = iter(refs)
    x_refs = form(*(next(given) for _ in form._fields))
    u = tuple(next(given)[...][None, :].astype(jnp.float32) for _ in range(shared))
    entering_ref, dy_ref, dstate_ref = next(given), next(given), next(given)
    ids_ref = next(given) if documents else None
    dx_refs = [next(given) for _ in form._fields]
    du_refs = [next(given) for _ in range(shared)]
    (dstart_ref,) = given
    chunks = dy_ref.shape[0] // size

    def chunk(i: Array, carry: tuple) -> tuple:
        i = chunks - 1 - i
        dstate, du = carry
        x, rows = _chunk(x_refs, ids_ref, i, size)
        here = pl.ds(i * size, size)
        dy = dy_ref[here, :].astype(jnp.float32)
        state = entering_ref[i].astype(jnp.float32)
        dx, more, dstate = tile.backward(x, u, state, dy, dstate, rows, products)
        for ref, z in zip(dx_refs, dx, strict=True):
            ref[here, :] = z.astype(ref.dtype)
        return dstate, tuple(a + b for a, b in zip(du, more, strict=True))

    zeros = tuple(jnp.zeros_like(z) for z in u)
    dstate, du = lax.fori_loop(0, chunks, chunk, (dstate_ref[...].astype(jnp.float32), zeros))
    for ref, z in zip(du_refs, du, strict=True):
        ref[...] = jnp.sum(z, axis=0)
    dstart_ref[...] = dstate


def _chunk(refs: tuple, ids_ref: Any, i: Array, size: int) -> tuple[tuple, tiles.Rows]:
    """A chunk's inputs in float32, and its rows."""
    x = type(refs)(*(ref[pl.ds(i * size, size), :].astype(jnp.float32) for ref in refs))
    ids = None if ids_ref is None else ids_ref[i][None, :]
    return x, tiles.rows(size, 1, ids)


def kept_type(x: Any) -> Any:
    """Of the states that are kept: that of bfloat16 inputs; float16 would overflow."""
    return jnp.bfloat16 if x.v.dtype == jnp.bfloat16 else jnp.float32


def _specs(t: int, n: int) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """Of a row and head: its tokens, a vector, a state."""
    return (
        pl.BlockSpec((None, t, None, n), lambda b, h: (b, 0, h, 0)),
        pl.BlockSpec((None, None, n), lambda b, h: (b, h, 0)),
        pl.BlockSpec((None, None, n, n), lambda b, h: (b, h, 0, 0)),
    )


def _ids(ids: Array | None) -> list[pl.BlockSpec]:
    if ids is None:
        return []
    return [pl.BlockSpec((None, *ids.shape[1:]), lambda b, h: (b, 0, 0))]


def call(
    name: str,
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    inputs: Sequence[Array],
    in_specs: list[pl.BlockSpec],
    out_specs: list[pl.BlockSpec],
    shapes: list[jax.ShapeDtypeStruct],
    warps: int,
    interpret: bool,
    aliases: dict[int, int] | None = None,
) -> tuple[Array, ...]:
    """A kernel on its inputs; `pl.pallas_call` with what is Triton's."""
    options: dict[str, Any] = {}
    if not interpret:
        # Imported here: it is slow to, and only a program for a GPU needs it.
        from jax.experimental.pallas import triton

        options = {"compiler_params": triton.CompilerParams(num_warps=warps, num_stages=1)}
    run = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=shapes,
        input_output_aliases=aliases or {},
        interpret=interpret,
        name=name,
        **options,
    )
    return tuple(run(*inputs))
