"""Versions 5 to 7 on TPUs, by Pallas' Mosaic backend: a grid of rows, tiles of heads, and chunks in
order, the state in VMEM from the first chunk to the last.

Heads of 64 lie two by two in the 128 lanes of a register (`tiles.py`), in the layout that the model
has them in: [b, t, h n]. States between are kept as dense as that: [v, h k].
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
from rwkv_jax.wkv.tiles import Precision, Products
from rwkv_jax.wkv.triton import kept_type

KEPT = "cbvm"
"""The dimensions of the states that are kept: chunks first, heads side by side."""
LANES = 128


def refusal(n: int, dtype: Any) -> str | None:
    """Why heads of this size have no kernel."""
    # Larger ones do not fit VMEM in float32, smaller ones take minutes to compile.
    return None if n in (16, 32, 64, 128) else f"heads of {n} channels (16, 32, 64 and 128 have)"


def heads_a_tile(h: int, n: int) -> int:
    """How many heads of size n lie side by side: all that fit, or all that there are."""
    return min(h, max(1, LANES // n))


def kept(entering: Float[Array, "chunks b h v k"]) -> Float[Array, "chunks b v hk"]:
    """States of all heads, as they are kept."""
    return entering.swapaxes(2, 3).reshape(*entering.shape[:2], entering.shape[3], -1)


def entering(kept: Float[Array, "chunks b v hk"], h: int) -> Float[Array, "chunks b h v k"]:
    """The inverse of `kept`."""
    return kept.reshape(*kept.shape[:3], h, -1).swapaxes(2, 3)


def products(dtype: Any) -> Products:
    """What inputs of this type are multiplied with. A TPU multiplies bfloat16, float32 in six
    passes of it; ones need three."""
    exact = Precision(None, lax.Precision.HIGHEST)
    data = exact if dtype == jnp.float32 else Precision("bfloat16", lax.Precision.DEFAULT)
    return Products(data, exact, parts=3)


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
    """`triton.forward`, but that states are kept as [chunks, b, v, h k]. Heads fill whole tiles."""
    b, t, h, n = x[0].shape
    heads = heads_a_tile(h, n)
    grid = (b, h // heads, t // size)
    inputs = [*map(merged, x), *(tiled(z, heads) for z in shared), packed(state, heads)]
    token, row, square, kept = _specs(size, n, heads, lambda c: c)
    specs = [token] * len(x) + [row] * len(shared) + [square]
    if ids is not None:
        inputs.append(every_head(ids, heads))
        specs.append(_ids(size, heads, lambda c: c))
    shapes = [
        jax.ShapeDtypeStruct(inputs[0].shape, x.v.dtype),
        jax.ShapeDtypeStruct((b, h // heads, n, heads * n), jnp.float32),
    ]
    if keep:
        shapes.append(jax.ShapeDtypeStruct((grid[2], b, n, h * n), kept_type(x)))
    kernel = partial(
        _forward,
        tile=tile,
        form=type(x),
        heads=heads,
        shared=len(shared),
        documents=ids is not None,
        products=products(x.v.dtype),
    )
    out_specs = [token, square] + [kept] * keep
    name = f"{tile.OPERATOR}_forward"
    carried = [(heads * n, heads * n)]
    y, after, *entering = call(
        name, kernel, grid, inputs, specs, out_specs, shapes, carried, interpret
    )
    return y.reshape(x[0].shape), unpacked(after, heads), *entering


def _forward(*refs: Any, tile, form, heads, shared, documents, products) -> None:
    given, state = iter(refs[:-1]), refs[-1]
    x_refs = form(*(next(given) for _ in form._fields))
    u = tuple(next(given)[...].astype(jnp.float32) for _ in range(shared))
    state_ref = next(given)
    ids_ref = next(given) if documents else None
    y_ref, after_ref, *entering = given
    c = pl.program_id(2)

    @pl.when(c == 0)
    def _():
        state[...] = spread(state_ref[...], heads)

    for ref in entering:
        ref[...] = dense(state[...], heads).astype(ref.dtype)
    x, rows = _chunk(x_refs, ids_ref, heads)
    y, after = tile.forward(x, u, state[...], rows, products)
    y_ref[...] = tiles.side_by_side(y, heads).astype(y_ref.dtype)
    state[...] = after

    @pl.when(c == pl.num_programs(2) - 1)
    def _():
        after_ref[...] = dense(after, heads)


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
    """`triton.backward`."""
    b, t, h, n = x[0].shape
    heads = heads_a_tile(h, n)
    chunks = t // size
    grid = (b, h // heads, chunks)
    inputs = [*map(merged, x), *(tiled(z, heads) for z in shared)]
    inputs += [entering, merged(dy), packed(dstate, heads)]
    token, row, square, kept = _specs(size, n, heads, lambda c: chunks - 1 - c)
    specs = [token] * len(x) + [row] * len(shared) + [kept, token, square]
    if ids is not None:
        inputs.append(every_head(ids, heads))
        specs.append(_ids(size, heads, lambda c: chunks - 1 - c))
    shapes = [jax.ShapeDtypeStruct(merged(z).shape, z.dtype) for z in x]
    shapes += [jax.ShapeDtypeStruct((b, h // heads, 1, heads * n), jnp.float32) for _ in shared]
    shapes += [jax.ShapeDtypeStruct((b, h // heads, n, heads * n), jnp.float32)]
    kernel = partial(
        _backward,
        tile=tile,
        form=type(x),
        heads=heads,
        shared=len(shared),
        documents=ids is not None,
        products=products(x.v.dtype),
    )
    out_specs = [token] * len(x) + [row] * len(shared) + [square]
    name = f"{tile.OPERATOR}_backward"
    carried = [(heads * n, heads * n)]
    out = call(name, kernel, grid, inputs, specs, out_specs, shapes, carried, interpret)
    dx = (z.reshape(x[0].shape) for z in out[: len(x)])
    du = (z.reshape(b, h, n) for z in out[len(x) : -1])
    return *dx, *du, unpacked(out[-1], heads)


def _backward(*refs: Any, tile, form, heads, shared, documents, products) -> None:
    given, dstate = iter(refs[:-1]), refs[-1]
    x_refs = form(*(next(given) for _ in form._fields))
    u = tuple(next(given)[...].astype(jnp.float32) for _ in range(shared))
    entering_ref, dy_ref, dstate_ref = next(given), next(given), next(given)
    ids_ref = next(given) if documents else None
    dx_refs = [next(given) for _ in form._fields]
    du_refs = [next(given) for _ in range(shared)]
    (dstart_ref,) = given
    c = pl.program_id(2)

    @pl.when(c == 0)
    def _():
        dstate[...] = spread(dstate_ref[...], heads)
        for ref in du_refs:
            ref[...] = jnp.zeros_like(ref)

    x, rows = _chunk(x_refs, ids_ref, heads)
    state = spread(entering_ref[...].astype(jnp.float32), heads)
    dy = tiles.stacked(dy_ref[...].astype(jnp.float32), heads)
    dx, du, before = tile.backward(x, u, state, dy, dstate[...], rows, products)
    for ref, z in zip(dx_refs, dx, strict=True):
        ref[...] = tiles.side_by_side(z, heads).astype(ref.dtype)
    for ref, z in zip(du_refs, du, strict=True):
        ref[...] += z
    dstate[...] = before

    @pl.when(c == pl.num_programs(2) - 1)
    def _():
        dstart_ref[...] = dense(before, heads)


def _chunk(refs: tuple, ids_ref: Any, heads: int) -> tuple[tuple, tiles.Rows]:
    """A chunk's inputs in float32, and its rows."""
    x = type(refs)(*(tiles.stacked(ref[...].astype(jnp.float32), heads) for ref in refs))
    ids = None if ids_ref is None else ids_ref[...]
    return x, tiles.rows(refs[0].shape[0], heads, ids)


def dense(state: Float[Array, "W W"], heads: int) -> Float[Array, "v W"]:
    """The blocks of a block diagonal, side by side."""
    return tiles.side_by_side(state, heads)


def spread(blocks: Float[Array, "v W"], heads: int) -> Float[Array, "W W"]:
    """The inverse of `dense`."""
    return tiles.stacked(blocks, heads)


def merged(x: Float[Array, "b t h n"]) -> Float[Array, "b t hn"]:
    """Heads side by side."""
    return x.reshape(*x.shape[:2], -1)


def tiled(x: Float[Array, "b h n"], heads: int) -> Float[Array, "b tiles 1 W"]:
    """Vectors of heads, by tile."""
    return x.reshape(x.shape[0], -1, 1, heads * x.shape[2])


def packed(state: Float[Array, "b h v k"], heads: int) -> Float[Array, "b tiles v W"]:
    """States of heads, by tile."""
    b, _, v, k = state.shape
    return state.reshape(b, -1, heads, v, k).swapaxes(2, 3).reshape(b, -1, v, heads * k)


def unpacked(state: Float[Array, "b tiles v W"], heads: int) -> Float[Array, "b h v k"]:
    """The inverse of `packed`."""
    b, count, v, w = state.shape
    k = w // heads
    return state.reshape(b, count, v, heads, k).swapaxes(2, 3).reshape(b, -1, v, k)


def every_head(ids: Float[Array, "b chunks C"], heads: int) -> Float[Array, "b chunks 1 R"]:
    """The document ids of a tile's rows."""
    return jnp.tile(ids, (1, 1, heads))[:, :, None]


def _specs(size: int, n: int, heads: int, order: Any) -> tuple[pl.BlockSpec, ...]:
    """Of a tile's chunk: its tokens, a vector of all chunks, a state of all, a state of each."""
    return (
        pl.BlockSpec((None, size, heads * n), lambda b, h, c: (b, order(c), h)),
        pl.BlockSpec((None, None, 1, heads * n), lambda b, h, c: (b, h, 0, 0)),
        pl.BlockSpec((None, None, n, heads * n), lambda b, h, c: (b, h, 0, 0)),
        pl.BlockSpec((None, None, n, heads * n), lambda b, h, c: (order(c), b, 0, h)),
    )


def _ids(size: int, heads: int, order: Any) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, 1, size * heads), lambda b, h, c: (b, order(c), 0, 0))


def call(
    name: str,
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    inputs: Sequence[Array],
    in_specs: list[pl.BlockSpec],
    out_specs: list[pl.BlockSpec],
    shapes: list[jax.ShapeDtypeStruct],
    scratch: list[tuple[int, ...]],
    interpret: bool,
    aliases: dict[int, int] | None = None,
) -> tuple[Array, ...]:
    """A kernel on its inputs; `pl.pallas_call` with what is Mosaic's. With `scratch`, shapes in
    float32 that are carried along the last axis of the grid, that axis goes in order."""
    # Imported here: only a program for a TPU, or a test, needs it.
    from jax.experimental.pallas import tpu

    order: list[Any] = ["parallel"] * len(grid)
    if scratch:
        order[-1] = "arbitrary"
    run = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=shapes,
        scratch_shapes=[tpu.VMEM(shape, jnp.float32) for shape in scratch],
        input_output_aliases=aliases or {},
        compiler_params=tpu.CompilerParams(dimension_semantics=tuple(order)),
        interpret=interpret,
        name=name,
    )
    return tuple(run(*inputs))
