"""One table states every parameter once; initial values, shapes, counts, shardings and optimizer
groups are derived from it.

A table is a tree of `ParamSpec` with the structure of the parameters. Random keys are folded by a
parameter's path and layer, so that adding a parameter changes no other's initial value.
"""

import math
import zlib
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap

from rwkv_jax.nn import Norm
from rwkv_jax.typing import Array, Callable, Float, PRNGKeyArray, PyTree


@dataclass(frozen=True)
class Depth:
    """A layer's position in the stack, which official initialisations depend on.

    `index` may be traced. With one layer, where the official ratio divides by zero, `rising` is 0.
    """

    index: int | Array
    layers: int

    @property
    def rising(self) -> float | Array:
        """Official `ratio_0_to_1`: 0 at the first layer, 1 at the last."""
        return self.index / max(self.layers - 1, 1)

    @property
    def falling(self) -> float | Array:
        """Official `ratio_1_to_almost_0`: 1 at the first layer, 1/layers at the last."""
        return 1.0 - self.index / self.layers


Init = Callable[[PRNGKeyArray, tuple[int, ...], Depth], Float[Array, "..."]]


Axes = tuple[str | None, ...]
"""Logical axes, keys of `rwkv_jax.sharding.RULES`; None is never sharded."""


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: its shape, initial value, optimizer group and place in official checkpoints.

    shape     of one layer
    init      (key, shape, depth) -> initial value
    layers    copies, stacked on a leading axis; 0 for a parameter outside of the stack
    axes      logical name of each axis; () for a small parameter that is replicated
    lr_scale  factor of the learning rate
    decay     whether weight decay applies
    layout    in official files: `linear` is `NAME.weight`, [out, in] there and [in, out] here;
              `table` is `NAME.weight`, as here; `row` is [1, 1, c]; `plain`, and `factor` for a
              low-rank matrix [in, out], are as here
    """

    shape: tuple[int, ...]
    init: Init
    layers: int = 0
    axes: Axes = ()
    lr_scale: float = 1.0
    decay: bool = False
    layout: Literal["plain", "linear", "table", "row", "factor"] = "plain"

    @property
    def full_shape(self) -> tuple[int, ...]:
        """The array's shape, with the layer axis."""
        return ((self.layers,) if self.layers else ()) + self.shape


@dataclass(frozen=True)
class Layers:
    """Makes the specs of one layer's parameters, stacked over `count` layers."""

    count: int

    def plain(
        self, shape: tuple[int, ...], init: Init, lr_scale: float = 1.0, axes: Axes = ()
    ) -> ParamSpec:
        """Stored as it is, without weight decay."""
        return ParamSpec(shape, init, self.count, axes, lr_scale)

    def row(self, width: int, init: Init, lr_scale: float = 1.0, axes: Axes = ()) -> ParamSpec:
        """A vector that official files store as [1, 1, c], without weight decay."""
        return ParamSpec((width,), init, self.count, axes, lr_scale, layout="row")

    def factor(self, shape: tuple[int, ...], axes: Axes, init: Init) -> ParamSpec:
        """A low-rank matrix [in, out], without weight decay."""
        return ParamSpec(shape, init, self.count, axes, layout="factor")

    def matrix(self, shape: tuple[int, int], axes: Axes, init: Init) -> ParamSpec:
        """A linear map [in, out], with weight decay."""
        return ParamSpec(shape, init, self.count, axes, decay=True, layout="linear")

    def norm(self, width: int, weight: Init | None = None, axes: Axes = ()) -> Norm[ParamSpec]:
        """A normalisation: weights 1 unless `weight` says otherwise, biases 0."""
        return Norm(
            self.plain((width,), weight or ones, axes=axes), self.plain((width,), zeros, axes=axes)
        )


def is_spec(leaf: object) -> bool:
    """Whether a tree node is a `ParamSpec` (for `jax.tree.map(..., is_leaf=is_spec)`)."""
    return isinstance(leaf, ParamSpec)


def init(specs: PyTree, key: PRNGKeyArray) -> PyTree:
    """Float32 parameters with the initial values of the table; a function of table and key."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(specs, is_leaf=is_spec)
    table = tuple((path_name(path), spec) for path, spec in leaves)
    return jax.tree.unflatten(tree, _init_leaves(key, table))


@partial(jax.jit, static_argnums=1)
def _init_leaves(key: PRNGKeyArray, table: tuple[tuple[str, ParamSpec], ...]) -> list[Array]:
    # Under vmap one after the other: jaxlib 0.10 on CPU deadlocks when a program has several
    # batched QR factorisations.
    return sequential_vmap(partial(_leaves, table=table))(key)


def _leaves(key: PRNGKeyArray, table: tuple[tuple[str, ParamSpec], ...]) -> list[Array]:
    keys = {name: jax.random.fold_in(key, zlib.crc32(name.encode())) for name, _ in table}
    assert len(keys) == len(table), "two parameters of one name"

    def layer(index: Array, depth: int) -> dict[str, Array]:
        """Layer `index` of all leaves that are stacked over `depth` layers."""
        return {
            name: spec.init(jax.random.fold_in(keys[name], index), spec.shape, Depth(index, depth))
            for name, spec in table
            if spec.layers == depth
        }

    found = {
        name: spec.init(keys[name], spec.shape, Depth(0, 1))
        for name, spec in table
        if not spec.layers
    }
    # One loop for all leaves: a loop for each takes longer to compile.
    for depth in sorted({spec.layers for _, spec in table} - {0}):
        found |= lax.map(partial(layer, depth=depth), jnp.arange(depth, dtype=jnp.int32))
    return [found[name] for name, _ in table]


def path_name(path: tuple) -> str:
    """`blocks.att.w0` for the path of a leaf."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def abstract(specs: PyTree) -> PyTree:
    """The table as a tree of `jax.ShapeDtypeStruct`."""
    return jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.full_shape, jnp.float32), specs, is_leaf=is_spec
    )


def count(specs: PyTree) -> int:
    """The number of parameters."""
    return sum(math.prod(s.full_shape) for s in jax.tree.leaves(specs, is_leaf=is_spec))


def constant(value: float) -> Init:
    return lambda key, shape, depth: jnp.full(shape, value, jnp.float32)


zeros, ones = constant(0.0), constant(1.0)


def closed_form(formula: Callable[[Depth], Float[Array, "..."]]) -> Init:
    """No randomness: `formula(depth)` broadcast to the shape."""
    return lambda key, shape, depth: jnp.broadcast_to(
        jnp.asarray(formula(depth), jnp.float32), shape
    )


def ln_x_weight(key: PRNGKeyArray, shape: tuple[int, ...], depth: Depth) -> Float[Array, "..."]:
    """Official for the group norm of versions 5 to 7: ((1 + layer) / layers)^0.7."""
    return jnp.full(shape, ((1 + depth.index) / depth.layers) ** 0.7, jnp.float32)


def uniform(bound: float) -> Init:
    """Uniform in [-bound, bound]."""
    return lambda key, shape, depth: jax.random.uniform(
        key, shape, jnp.float32, minval=-bound, maxval=bound
    )


def orthogonal(gain: float = 1.0) -> Init:
    """`gain` times a matrix with orthonormal rows or columns, whichever are fewer (torch
    `orthogonal_`)."""
    return lambda key, shape, depth: jax.nn.initializers.orthogonal(gain)(key, shape, jnp.float32)
