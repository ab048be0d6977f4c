"""The vocabulary of kernels for Hopper GPUs, in Pallas' Mosaic GPU: tiles of 64 by 64, products on
the tensor cores of a warpgroup (wgmma), documents, and programs that go from chunk to chunk.

The sum of products is, rounded to bfloat16, the left factor of the next ones without leaving its
registers. Right factors, and what is needed transposed or by another warpgroup, lie in shared
memory: in tiles. What is put there is seen by wgmma and by copies after a `commit_smem`.

JAX before 0.11 cannot import this module.
"""

import threading
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from rwkv_jax.typing import Array, Callable
from rwkv_jax.wkv.pallas.hopper.driver import CHUNK as C

plgpu: Any = mosaic_gpu  # what it holds depends on JAX's version

BLOCK = 16
"""Triangles are inverted in blocks of so many rows first: a warp's share of a product."""
WGMMA = plgpu.Layout.WGMMA
ROWS, LANES = WGMMA.reduce(1), WGMMA.reduce(0)
"""The layouts of vectors with an entry for each row, or each lane, of a value."""


def tile(dtype: Any = jnp.bfloat16, width: int = C) -> Any:
    """Shared memory [C, width], in swizzled rows of at most 128 bytes, as wgmma and TMA take it."""
    size = jnp.dtype(dtype).itemsize
    row = min(128, width * size)
    how = plgpu.TilingTransform((8, row // size)), plgpu.SwizzleTransform(row)
    return plgpu.SMEM((C, width), dtype, transforms=how)


def load(ref: Any, layout: Any = WGMMA) -> Array:
    return plgpu.load(ref, layout=layout, optimized=False)


def load_float32(ref: Any) -> Array:
    return load(ref).astype(jnp.float32)


def put(ref: Any, x: Array) -> None:
    ref[...] = x.astype(ref.dtype)


def put_terms(refs: tuple, x: Array) -> None:
    """Bfloat16 terms whose sum is x, up to 8 bits a term."""
    for ref in refs:
        term = x.astype(jnp.bfloat16)
        ref[...] = term
        x = x - term.astype(jnp.float32)


def places(width: int = C) -> tuple[Array, Array]:
    """The row and the lane of each entry of [C, width]."""
    row, lane = (plgpu.broadcasted_iota(jnp.int32, (C, width), d, layout=WGMMA) for d in (0, 1))
    return row, lane


def ones(which: Array) -> Array:
    return jnp.where(which, 1.0, 0.0).astype(jnp.bfloat16)


def each(left: Any, rights: tuple) -> list[tuple[Any, Any]]:
    """The factors of `left` times a sum of tiles."""
    return [(left, right) for right in rights]


def on_tensor_cores(*pairs: tuple[Any, Any]) -> Array:
    """The sum of products [C, K] [K, width] in float32; left factors are values or tiles, right
    factors tiles."""

    def run(total: Any) -> Array:
        for left, right in pairs:
            plgpu.wgmma(total, left, right)
        return total[...]

    return pl.run_scoped(run, plgpu.ACC((C, pairs[0][1].shape[1]), jnp.float32))


def interpreted(*pairs: tuple[Any, Any]) -> Array:
    """The same, where Mosaic GPU is interpreted: it takes no values as factors, and looks for no
    races in what wgmma reads."""

    def value(x: Any) -> Array:
        return (x if isinstance(x, jax.Array) else load(x)).astype(jnp.float32)

    total = jnp.zeros((), jnp.float32)
    for left, right in pairs:
        total = jnp.dot(value(left), value(right), precision="highest") + total
    return total


class Documents(NamedTuple):
    """What a document may not see is multiplied by 0: all that is here is finite. Where no document
    can start, nothing is multiplied, and factors that are tiles stay tiles."""

    rows: Any = None  # how many have started up to each token [C], in ROWS
    lanes: Any = None  # the same in LANES
    last: Any = None  # up to the last token

    def same(self, x: Array) -> Array:
        """[t, s], where both tokens are of one document."""
        if self.last is None:
            return x
        return _only(x, _along(self.rows, 0) == _along(self.lanes, 1))

    def first(self, x: Any, axis: int = 0) -> Any:
        """The tokens along an axis that the state before the chunk belongs to."""
        return self._of(0.0, x, axis)

    def final(self, x: Any, axis: int = 0) -> Any:
        """Those that the state after the chunk belongs to."""
        return self._of(self.last, x, axis)

    def carried(self, state: Array) -> Array:
        """The state, unless a document starts."""
        return state if self.last is None else state * jnp.where(self.last == 0.0, 1.0, 0.0)

    def _of(self, number: Any, x: Any, axis: int) -> Any:
        if self.last is None:
            return x
        return _only(x, _along((self.rows, self.lanes)[axis], axis) == number)


def _along(x: Array, axis: int) -> Array:
    return lax.broadcast_in_dim(x, (C, C), (axis,))


def _only(x: Any, which: Array) -> Array:
    # Not by `where`: bfloat16 numbers are selected one by one, but multiplied in pairs.
    x = x if isinstance(x, jax.Array) else load(x)
    return x * jnp.where(which, 1.0, 0.0).astype(x.dtype)


class Program(NamedTuple):
    """What one row and head is computed with."""

    at: tuple[Array, Array]  # the row and the head
    chunks: int
    starts: Any  # twice: Mosaic would merge two loads of one vector in two layouts
    tiles: Any
    dot: Callable[..., Array]

    def tokens(self, ref: Any, c: Array | int) -> Any:
        """Those of chunk c."""
        row, head = self.at
        return ref.at[row, pl.ds(c * C, C), head]

    def counts(self, c: Array | int) -> list[tuple[Any, Any]]:
        """Of documents that start in chunk c: from where to where."""
        if self.starts is None:
            return []
        pairs = zip(self.starts, self.tiles.starts, strict=True)
        return [(counts.at[self.at[0], c], ref) for counts, ref in pairs]

    def documents(self, c: Array) -> Documents:
        """Of chunk c, whose counts have arrived."""
        if self.starts is None:
            return Documents()
        rows, lanes = self.tiles.starts
        return Documents(load(rows, ROWS), load(lanes, LANES), self.starts[0][self.at[0], c, C - 1])

    def fetch(self, barrier: Any, c: Array | int, *pairs: tuple[Any, Any]) -> None:
        """Starts to copy parts of chunk c, (from, to), if there is such a chunk; the barrier waits
        for all of them."""

        @pl.when((c >= 0) & (c < self.chunks))
        def _() -> None:
            for source, ref in pairs:
                plgpu.copy_gmem_to_smem(source, ref, barrier)

    def send(self, x: Array, ref: Any, to: Any) -> None:
        """Starts to write x, from a tile."""
        put(ref, x)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(ref, to)


def launch(
    body: Callable[..., None],
    name: str,
    inputs: Any,
    outputs: Any,
    scratch: dict[str, Any],
    interpret: bool,
    warpgroups: int,
) -> Any:
    """`body(program, inputs, outputs)` on trees of refs, for each row and head."""
    if inputs.starts is not None:
        inputs = inputs._replace(starts=(inputs.starts,) * 2)
        scratch = scratch | {"starts": (plgpu.SMEM((C,), jnp.float32),) * 2}
    b, t, h, _ = inputs.x.v.shape
    given, tree = jax.tree.flatten(inputs)
    results, out_tree = jax.tree.flatten(outputs)

    def kernel(*refs: Any, **tiles: Any) -> None:
        ins, outs = tree.unflatten(refs[: len(given)]), out_tree.unflatten(refs[len(given) :])
        at = lax.axis_index("row"), lax.axis_index("head")
        dot = interpreted if interpret else on_tensor_cores
        body(Program(at, t // C, ins.starts, SimpleNamespace(**tiles), dot), ins, outs)

    run = plgpu.kernel(
        kernel,
        out_type=results,
        scratch_types=scratch,
        grid=(b, h),
        grid_names=("row", "head"),
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    return out_tree.unflatten(run_on_host(run, results, given) if interpret else run(*given))


_one_at_a_time = threading.Lock()


def run_on_host(run: Callable[..., Any], outputs: Any, inputs: Any) -> Any:
    """`run(*inputs)` as a function without side effects, which is what JAX can differentiate and
    partition: the interpreter's are ordered callbacks, and memory that all kernels share."""
    compiled = jax.jit(run)

    def call(*inputs: Any) -> Any:
        with _one_at_a_time:
            return jax.device_get(compiled(*inputs))

    return jax.pure_callback(call, outputs, *inputs)


def unit_inverse(lower: Array, tiles: tuple, dot: Callable[..., Array]) -> Array:
    """(I - lower)^-1 [C, C] in bfloat16, by exact block doubling (`algebra.unit_inverse`).

    As long as blocks are no larger than BLOCK, they are kept side by side in [C, BLOCK], a quarter
    of the numbers. `tiles` are two [C, C] and two [C, BLOCK].
    """
    whole_lower, whole_inverse, side_lower, side_inverse = tiles
    row, lane = places(BLOCK)
    mine = [ones(row // BLOCK == block) for block in range(C // BLOCK)]

    def spread(x: Array) -> Array:
        return jnp.concatenate([x * here for here in mine], 1)

    def doubled(inverse: Array, size: int, lower: Any, ref: Any, spread: Callable) -> Array:
        """Blocks of 2 size, from those of size."""
        put(ref, inverse)
        plgpu.commit_smem()
        left = dot((spread(inverse.astype(jnp.bfloat16)), lower)).astype(jnp.bfloat16)
        link = dot((spread(left), ref))
        # Two blocks meet where `size` is the highest bit in which row and lane differ.
        row, lane = places(ref.shape[1])
        return jnp.where((row ^ lane) & (ref.shape[1] - size) == size, link, inverse)

    put(whole_lower, lower)
    side = jnp.zeros((), jnp.bfloat16)
    for block, here in enumerate(mine):
        side = side + lower[:, block * BLOCK : (block + 1) * BLOCK] * here
    put(side_lower, side)
    apart = (row ^ lane) & (BLOCK - 1)
    pairs = jnp.where(apart == 1, side.astype(jnp.float32), 0.0)  # blocks of two: I + lower
    inverse = jnp.where(apart == 0, 1.0, pairs)
    for size in (2, 4, 8):
        inverse = doubled(inverse, size, side_lower, side_inverse, spread)
    inverse = spread(inverse.astype(jnp.bfloat16)).astype(jnp.float32)
    for size in (16, 32):
        inverse = doubled(inverse, size, whole_lower, whole_inverse, lambda x: x)
    return inverse.astype(jnp.bfloat16)
