"""`pl.pallas_call` on trees of arrays, with blocks described by the letters of their dimensions.

A string such as "bthn" has a letter for each dimension of an array. Letters are given as a prefix
of the arrays' tree: one string for a named tuple says that all of its arrays have those dimensions.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl

from rwkv_jax.typing import Callable, PyTree


class Axis(NamedTuple):
    """An axis of the grid.

    blocks     how many indices of a dimension a program's block has, by letter; None: one index,
               and the block does not have that dimension
    backwards  whether programs along the axis go from the end of those dimensions to their start
    """

    blocks: dict[str, int | None]
    backwards: bool = False


def map_letters(f: Callable[..., Any], letters: PyTree, *trees: PyTree) -> PyTree:
    """`f(letters, *arrays)` for each array of the trees."""
    return jax.tree.map(lambda dims, *xs: jax.tree.map(partial(f, dims), *xs), letters, *trees)


def launch(
    body: Callable[..., None],
    name: str,
    grid: Sequence[Axis],
    inputs: tuple[PyTree, PyTree],
    outputs: tuple[PyTree, PyTree],
    memory: Mapping[str, Any] | None = None,
    **options: Any,
) -> PyTree:
    """Run `body(inputs, outputs, *scratch)`, whose arguments are trees of refs, on a grid.

    `inputs` are (arrays, letters), `outputs` (shapes and dtypes, letters). Dimensions that no axis
    of the grid names are whole in every block. `memory` maps letters to the memory space of those
    blocks; `options` are those of `pl.pallas_call`.
    """
    letters = jax.tree.broadcast(inputs[1], inputs[0])
    sizes: dict[str, int] = {}  # of dimensions, by letter
    for dims, x in zip(jax.tree.leaves(letters), jax.tree.leaves(inputs[0]), strict=True):
        sizes |= zip(dims, x.shape, strict=True)
    programs = tuple(
        next(sizes[dim] // (block or 1) for dim, block in axis.blocks.items() if dim in sizes)
        for axis in grid
    )

    def spec(dims: str, x: Any) -> pl.BlockSpec:
        def axis_of(dim: str) -> int | None:
            return next((i for i, axis in enumerate(grid) if dim in axis.blocks), None)

        def index(*program: Any) -> tuple:
            def along(i: int | None) -> Any:
                if i is None:
                    return 0
                return programs[i] - 1 - program[i] if grid[i].backwards else program[i]

            return tuple(along(axis_of(dim)) for dim in dims)

        block = tuple(
            size if (i := axis_of(dim)) is None else grid[i].blocks[dim]
            for dim, size in zip(dims, x.shape, strict=True)
        )
        return pl.BlockSpec(block, index, memory_space=(memory or {}).get(dims))

    run = pl.pallas_call(
        body,
        grid=programs,
        in_specs=(map_letters(spec, inputs[1], inputs[0]),),
        out_specs=(map_letters(spec, outputs[1], outputs[0]),),
        out_shape=(outputs[0],),
        name=name,
        **options,
    )
    return run(inputs[0])[0]
