"""Versions 5 to 7 on TPUs, by Pallas' Mosaic backend: a grid of rows, tiles of heads, and chunks in
order, with the state in VMEM from the first chunk to the last.

Two heads of 64 share the 128 lanes of a register (`tiles.py`), side by side as in the model's own
layout [b, t, h n]. States that are kept for the backward pass are as dense: [v, h k].
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from rwkv_jax.typing import Array, Float
from rwkv_jax.wkv.pallas import tiles
from rwkv_jax.wkv.pallas.heads import kept_dtype, unsupported
from rwkv_jax.wkv.pallas.kernel import (
    Backward,
    Driver,
    Forward,
    Gradients,
    Kernel,
    Outputs,
    Tile,
    pass_letters,
)
from rwkv_jax.wkv.pallas.launch import Axis, launch, map_letters
from rwkv_jax.wkv.pallas.tiles import Precision, Products, merge_heads, split_heads

LANES = 128
LETTERS = pass_letters(tokens="bthn", shared="bhn", state="bhvk", entering="cbvm", starts="bcs")
_FOLDED = {"bthn": "btm", "bhn": "bg1w", "bhvk": "bgvw", "cbvm": "cbvm", "bcs": "bc1r"}
"""The letters of folded arrays: g tiles of heads, w channels and r rows of a tile."""


def heads_a_tile(h: int, n: int) -> int:
    """How many heads of `n` channels lie side by side: as many as fit, or all."""
    return min(h, max(1, LANES // n))


def products(dtype: Any) -> Products:
    """The products for inputs of `dtype`. A TPU multiplies bfloat16; float32 takes six passes of
    it, or three where one factor is ones."""
    exact = Precision(None, lax.Precision.HIGHEST)
    data = exact if dtype == jnp.float32 else Precision("bfloat16", lax.Precision.DEFAULT)
    return Products(data, exact, parts=3)


def run(kernel: Kernel, name: str, inputs: Any, outputs: Any, interpret: bool) -> Any:
    """A pass (`Driver.run`), of heads that fill whole tiles."""
    h, n = inputs.x.v.shape[2:]
    heads = heads_a_tile(h, n)
    fold = partial(map_letters, partial(_fold, heads))
    body = {"forward": _forward, "backward": _backward}[name]
    width, time = heads * n, Axis({"t": kernel.size, "c": None}, backwards=name == "backward")
    letters, out_letters = LETTERS[name]
    out = launch(
        partial(body, kernel.tile, heads, products(inputs.x.v.dtype)),
        f"{kernel.tile.operator}_{name}",
        (Axis({"b": None}), Axis({"g": None, "m": width}), time),
        (fold(letters, inputs), jax.tree.map(_FOLDED.get, letters)),
        (
            jax.eval_shape(partial(fold, out_letters), outputs),
            jax.tree.map(_FOLDED.get, out_letters),
        ),
        **options(3, [(width, width)], interpret),
    )
    return map_letters(partial(_unfold, heads), out_letters, out, outputs)


def _fold(heads: int, dims: str, x: Array) -> Array:
    """An array with the heads of a tile side by side in its last dimension."""
    if dims == "bthn":
        return x.reshape(*x.shape[:2], -1)
    if dims == "bhn":
        return x.reshape(x.shape[0], -1, 1, heads * x.shape[2])
    if dims == "bhvk":
        b, _, v, k = x.shape
        return x.reshape(b, -1, heads, v, k).swapaxes(2, 3).reshape(b, -1, v, heads * k)
    if dims == "bcs":
        return jnp.tile(x, (1, 1, heads))[:, :, None]
    return x


def _unfold(heads: int, dims: str, x: Array, like: jax.ShapeDtypeStruct) -> Array:
    """The inverse of `_fold`."""
    if dims == "bhvk":
        b, count, v, w = x.shape
        x = x.reshape(b, count, v, heads, w // heads).swapaxes(2, 3)
    return x.reshape(like.shape)


def _forward(
    tile: Tile, heads: int, p: Products, inputs: Forward, out: Outputs, state: Any
) -> None:
    shared = _vectors(inputs)
    c = pl.program_id(2)

    @pl.when(c == 0)
    def _():
        state[...] = split_heads(inputs.state[...], heads)

    if out.entering is not None:
        out.entering[...] = merge_heads(state[...], heads).astype(out.entering.dtype)
    x, rows = _chunk(inputs, heads)
    y, after = tile.forward(x, shared, state[...], rows, p)
    out.y[...] = merge_heads(y, heads).astype(out.y.dtype)
    state[...] = after

    @pl.when(c == pl.num_programs(2) - 1)
    def _():
        out.after[...] = merge_heads(after, heads)


def _backward(
    tile: Tile, heads: int, p: Products, inputs: Backward, out: Gradients, dstate: Any
) -> None:
    shared = _vectors(inputs)
    c = pl.program_id(2)

    @pl.when(c == 0)
    def _():
        dstate[...] = split_heads(inputs.dstate[...], heads)
        for ref in out.shared:
            ref[...] = jnp.zeros_like(ref)

    x, rows = _chunk(inputs, heads)
    state = split_heads(inputs.entering[...].astype(jnp.float32), heads)
    dy = split_heads(inputs.dy[...].astype(jnp.float32), heads)
    dx, dshared, before = tile.backward(x, shared, state, dy, dstate[...], rows, p)
    for ref, z in zip(out.x, dx, strict=True):
        ref[...] = merge_heads(z, heads).astype(ref.dtype)
    for ref, z in zip(out.shared, dshared, strict=True):
        ref[...] += z
    dstate[...] = before

    @pl.when(c == pl.num_programs(2) - 1)
    def _():
        out.state[...] = merge_heads(before, heads)


def _vectors(inputs: Forward | Backward) -> tuple[Array, ...]:
    return tuple(ref[...].astype(jnp.float32) for ref in inputs.shared)


def _chunk(inputs: Forward | Backward, heads: int) -> tuple[Any, tiles.Rows]:
    """The chunk's inputs in float32, and its rows."""
    refs = inputs.x
    x = type(refs)(*(split_heads(ref[...].astype(jnp.float32), heads) for ref in refs))
    counts = None if inputs.starts is None else inputs.starts[...]
    return x, tiles.rows(refs.v.shape[0], heads, counts)


def options(axes: int, scratch: list[tuple[int, ...]], interpret: bool) -> dict[str, Any]:
    """Mosaic's options of `pl.pallas_call`, for a grid of so many axes. `scratch` are the shapes of
    what is carried along the last axis, in float32; its programs then run in order."""
    # Imported here: only programs for TPUs, and tests, need it.
    from jax.experimental.pallas import tpu

    order: list[Any] = ["parallel"] * axes
    if scratch:
        order[-1] = "arbitrary"
    return {
        "scratch_shapes": [tpu.VMEM(shape, jnp.float32) for shape in scratch],
        "compiler_params": tpu.CompilerParams(dimension_semantics=tuple(order)),
        "interpret": interpret,
    }


def pack(entering: Float[Array, "chunks b h v k"], x: Any) -> Float[Array, "chunks b v hk"]:
    entering = entering.astype(kept_dtype(x)).swapaxes(2, 3)
    return entering.reshape(*entering.shape[:3], -1)


def unpack(entering: Float[Array, "chunks b v hk"], x: Any) -> Float[Array, "chunks b h v k"]:
    entering = entering.astype(jnp.float32)
    return entering.reshape(*entering.shape[:3], x.v.shape[2], -1).swapaxes(2, 3)


DRIVER = Driver("tpu", LETTERS, run, heads_a_tile, pack, unpack, unsupported)
