"""Versions 5 to 7 on TPUs, by Pallas' Mosaic backend: a grid of rows, heads, and chunks in order,
with the state in VMEM from the first chunk to the last.

Heads lie side by side in the 128 lanes of a register, as in the model's own layout [b, t, h n]
(`lanes.py`). States that are kept for the backward pass are as dense: [v, h k].
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from rwkv_jax.typing import Array, Callable, Float
from rwkv_jax.wkv.device import device_kind
from rwkv_jax.wkv.pallas.heads import kept_dtype, unsupported, unsupported_dtype
from rwkv_jax.wkv.pallas.kernel import Backward, Driver, Kernel, letters_of, pass_letters
from rwkv_jax.wkv.pallas.launch import Axis, launch, map_letters
from rwkv_jax.wkv.pallas.tpu.lanes import LANES, Documents, Tile

SIZE = 64
"""Tokens a chunk."""
CHAINS = {2: 16, 4: 4}
"""Chunks that a program computes side by side, at most, by the bytes of a number. With fewer, the
matrix units wait; more take longer to compile (`python -m benchmarks.schedule`)."""
VMEM = 48 << 20
"""Bytes that a program may use."""
_FOLDED = {"bthn": "btm", "bhn": "bg1w", "bhvk": "bgvw", "cbvm": "cbvm", "bcs": "bc1r"}
"""The letters of folded arrays: g tiles of heads, w channels and r columns of a tile."""


class Chain(NamedTuple):
    """One chunk of one row and tile: refs of its blocks."""

    inputs: Any  # `Forward` or `Backward`
    docs: Documents
    state: Any  # S, or its gradient [v, W], carried from one chunk to the next
    out: Any  # `Outputs` or `Gradients`


def heads_a_tile(n: int) -> int:
    """How many heads of `n` channels lie side by side."""
    return max(1, LANES // n)


def operand_dtype(x: Any) -> Any:
    """Of products: bfloat16, which a TPU multiplies, or float32, in six passes of it."""
    return jnp.float32 if x.v.dtype == jnp.float32 else jnp.bfloat16


class Program(NamedTuple):
    """How many rows, tiles and times the chunks of one program are of."""

    rows: int
    tiles: int
    times: int


def program(rows: int, tiles: int, times: int, limit: int, cores: int) -> Program:
    """At most `limit` chunks of the device's, such that each of its cores has a program: of many
    tiles first, then of many rows, then of many times, which wait for each other's states."""

    def most(count: int, limit: int) -> int:
        return max(n for n in range(1, max(1, min(count, limit)) + 1) if count % n == 0)

    side = min(limit, rows * tiles // cores)
    tiles = most(tiles, side)
    rows = most(rows, side // tiles)
    return Program(rows, tiles, most(times, limit // (tiles * rows)))


def limits(x: Any, chains: int, interpret: bool) -> tuple[int, int]:
    """How many chunks a program may have, and how many cores share the programs: `chains` at most,
    or as many as pay if JAX is told to compile for speed (`JAX_OPTIMIZATION_LEVEL=O3`)."""
    kind = device_kind()
    limit = CHAINS[max(z.dtype.itemsize for z in (x.r, x.k, x.v))]
    if kind == "TPU v4":  # has 16 MiB of VMEM
        limit //= 2
    if jax.config.jax_optimization_level != "O3":  # pyright: ignore[reportAttributeAccessIssue]
        limit = min(limit, chains)
    # XLA for CPUs takes minutes to compile more.
    return 2 if interpret else limit, 2 if kind in ("TPU v4", "TPU v5", "TPU v5p") else 1


def chunks_of(x: Any, size: int, chains: int, interpret: bool) -> tuple[Program, int]:
    """What a program computes of the inputs, and how many cores share the programs."""
    b, t, h, n = x.k.shape
    limit, cores = limits(x, chains, interpret)
    return program(b, -(-h // heads_a_tile(n)), -(-t // size), limit, cores), cores


def of_one_program(chains: int, x: Any, size: int) -> tuple[int, int, int]:
    of, cores = chunks_of(x, size, chains, False)
    return of.rows * cores, of.times * size, of.tiles * heads_a_tile(x.k.shape[-1])


def unsupported_here(x: Any) -> str | None:
    # Mosaic casts no float16.
    return unsupported_dtype(x, "bfloat16", "float32") or unsupported(x)


def run(
    letters: dict[str, tuple],
    chains: int,
    kernel: Kernel,
    name: str,
    inputs: Any,
    outputs: Any,
    interpret: bool,
) -> Any:
    """A pass (`Driver.run`), of heads that fill whole tiles."""
    n = inputs.x.v.shape[-1]
    heads = heads_a_tile(n)
    tile = Tile(kernel.size, heads, heads * n, operand_dtype(inputs.x))
    of, _ = chunks_of(inputs.x, kernel.size, chains, interpret)
    fold = partial(map_letters, partial(_fold, tile))
    in_letters, out_letters = letters[name][0], letters_of(outputs, letters[name][1])
    folded = jax.tree.map(_FOLDED.get, (in_letters, out_letters))
    out = launch(
        partial(_body, getattr(kernel.algebra, name), tile, of, folded),
        f"{kernel.algebra.operator}_{name}",
        (
            Axis({"b": of.rows}),
            Axis({"g": of.tiles, "m": of.tiles * tile.width}),
            Axis({"t": tile.size * of.times, "c": of.times}, backwards=name == "backward"),
        ),
        (fold(in_letters, inputs), folded[0]),
        (jax.eval_shape(partial(fold, out_letters), outputs), folded[1]),
        **options(3, [(of.rows * of.tiles, n, tile.width)], interpret, VMEM),
    )
    return map_letters(partial(_unfold, heads), out_letters, out, outputs)


def _fold(tile: Tile, dims: str, x: Array) -> Array:
    """An array with the heads of a tile side by side in its last dimension."""
    if dims == "bthn":
        return x.reshape(*x.shape[:2], -1)
    if dims == "bhn":
        return x.reshape(x.shape[0], -1, 1, tile.width)
    if dims == "bhvk":
        b, _, v, k = x.shape
        return x.reshape(b, -1, tile.heads, v, k).swapaxes(2, 3).reshape(b, -1, v, tile.width)
    if dims == "bcs":
        return jnp.tile(x, (1, 1, tile.columns // tile.size))[:, :, None]
    return x


def _unfold(heads: int, dims: str, x: Array, like: jax.ShapeDtypeStruct) -> Array:
    """The inverse of `_fold`."""
    if dims == "bhvk":
        b, count, v, w = x.shape
        x = x.reshape(b, count, v, heads, w // heads).swapaxes(2, 3)
    return x.reshape(like.shape)


def _body(
    algebra: Callable[..., None],
    tile: Tile,
    of: Program,
    letters: tuple,
    inputs: Any,
    out: Any,
    state: Any,
) -> None:
    back = isinstance(inputs, Backward)
    given, left = (inputs.dstate, out.state) if back else (inputs.state, out.after)
    places = [(row, i) for row in range(of.rows) for i in range(of.tiles)]
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        for place, at in enumerate(places):
            state[place] = given[at]
        for ref in out.shared if back else ():
            ref[...] = jnp.zeros_like(ref)

    def chain(time: int, place: int) -> Chain:
        view = partial(_view, tile, time, *places[place])
        mine, results = (map_letters(view, *z) for z in zip(letters, (inputs, out), strict=True))
        counts = None if mine.starts is None else mine.starts[...]
        return Chain(mine, Documents.of(tile, counts), state.at[place], results)

    times = range(of.times)[::-1] if back else range(of.times)
    algebra(tile, [chain(time, place) for time in times for place in range(len(places))], of.times)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        for place, at in enumerate(places):
            left[at] = state[place]


def _view(tile: Tile, time: int, row: int, i: int, dims: str, ref: Any) -> Any:
    """What a chunk, a row and a tile have of a block."""
    lanes = slice(i * tile.width, (i + 1) * tile.width)
    tokens = slice(time * tile.size, (time + 1) * tile.size)
    place = {
        "btm": (row, tokens, lanes),
        "bg1w": (row, i),
        "bgvw": (row, i),
        "cbvm": (time, row, slice(None), lanes),
        "bc1r": (row, time),
    }
    return ref.at[place[dims]]


def options(
    axes: int, scratch: list[tuple[int, ...]], interpret: bool, vmem: int | None = None
) -> dict[str, Any]:
    """Mosaic's options of `pl.pallas_call`, for a grid of so many axes. `scratch` are the shapes of
    what is carried along the last axis, in float32; its programs then run in order. `vmem` is the
    number of bytes that a program may use."""
    # Imported here: only programs for TPUs, and tests, need it.
    from jax.experimental.pallas import tpu

    order: list[Any] = ["parallel"] * axes
    if scratch:
        order[-1] = "arbitrary"
    return {
        "scratch_shapes": [tpu.VMEM(shape, jnp.float32) for shape in scratch],
        "compiler_params": tpu.CompilerParams(
            dimension_semantics=tuple(order), vmem_limit_bytes=vmem
        ),
        "interpret": interpret,
    }


def pack(entering: Float[Array, "chunks b h v k"], x: Any) -> Float[Array, "chunks b v hk"]:
    entering = entering.astype(kept_dtype(x)).swapaxes(2, 3)
    return entering.reshape(*entering.shape[:3], -1)


def unpack(entering: Float[Array, "chunks b v hk"], x: Any) -> Float[Array, "chunks b h v k"]:
    entering = entering.astype(jnp.float32)
    return entering.reshape(*entering.shape[:3], x.v.shape[2], -1).swapaxes(2, 3)


def driver(
    chains: int, entering: Any = "cbvm", pack: Callable = pack, unpack: Callable = unpack
) -> Driver:
    """The driver of a version, which keeps arrays of the letters `entering`, with so many chunks
    side by side that they compile soon."""
    letters = pass_letters(
        tokens="bthn", shared="bhn", state="bhvk", entering=entering, starts="bcs"
    )
    return Driver(
        "tpu",
        letters,
        partial(run, letters, chains),
        lambda h, n: heads_a_tile(n),
        pack,
        unpack,
        unsupported_here,
        partial(of_one_program, chains),
    )
