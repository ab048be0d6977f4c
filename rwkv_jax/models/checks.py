"""What belongs together, checked before a model runs: its parameters, tokens, masks and types.

The checks are of shapes and types, and cost a compiled program nothing. Values are checked where
they are concrete: NumPy's, and JAX's outside of its transformations.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax import sharding
from rwkv_jax.config import ModelConfig
from rwkv_jax.params import path_name
from rwkv_jax.typing import PyTree
from rwkv_jax.wkv.form import check_lengths, is_concrete


def compute_dtype(dtype: Any) -> np.dtype:
    """`dtype` as NumPy's. Raises `ValueError` unless a model can compute in it."""
    kinds = ("float32", "bfloat16", "float16", "float64")
    try:
        name = "None" if dtype is None else jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in kinds:
        raise ValueError(f"dtype {name}: a model computes in {', '.join(kinds[:3])} or {kinds[3]}")
    if name == "float64" and jax.dtypes.canonicalize_dtype(name) != jnp.float64:
        raise ValueError('dtype float64: call jax.config.update("jax_enable_x64", True) first')
    return jnp.dtype(dtype)


def check_config(cfg: Any) -> None:
    """Raises `ValueError` unless `cfg` is a model's."""
    if not isinstance(cfg, ModelConfig):
        raise ValueError(f"cfg is {type(cfg).__name__}, not a ModelConfig: `load` returns one")


def check_floating(name: str, arrays: Iterable[Any]) -> None:
    """Raises `ValueError` for an array that does not hold floating-point numbers."""
    for x in arrays:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {x.dtype}")


def check_params(params: Any, expected: PyTree, cfg: ModelConfig) -> None:
    """Raises `ValueError` unless `params` have the structure and shapes of `expected`, `cfg`'s."""
    if type(params) is not type(expected):
        raise ValueError(
            f"params are {type(params).__name__}, not a Model: give those of `init_params`, or of"
            " `load`, which returns params and cfg"
        )
    leaves, tree = jax.tree.flatten(params)
    shapes, known = jax.tree.flatten(expected)
    if tree == known and all(jnp.shape(x) == y.shape for x, y in zip(leaves, shapes, strict=True)):
        check_floating("params", leaves)
        return
    found, wanted = (
        {path_name(path): list(jnp.shape(x)) for path, x in jax.tree.leaves_with_path(tree)}
        for tree in (params, expected)
    )
    # First those that only one has: of another version, nearly all differ.
    for name in sorted([*found, *wanted], key=lambda name: name in found and name in wanted):
        have, want = (shapes.get(name, "missing") for shapes in (found, wanted))
        if have != want:
            raise ValueError(
                f"params.{name} is {have}, but in a model of cfg (RWKV-{cfg.version}, {cfg.layers}"
                f" layers, width {cfg.width}) it is {want}: give the cfg of these params"
            )


def check_tokens(tokens: Any, reset: Any, lengths: Any, vocabulary: int, *, whole: bool) -> None:
    """Raises `ValueError` unless `tokens` are ids [b, t] of `vocabulary`, and the masks are theirs.

    `whole`: `lengths` count these tokens, not those of several devices.
    """
    for name, x in {"tokens": tokens, "reset": reset, "lengths": lengths}.items():
        optional = x is None and name != "tokens"
        if not optional and not (hasattr(x, "shape") and hasattr(x, "dtype")):
            raise ValueError(
                f"{name} must be an array, got {type(x).__name__}: convert it by jnp.asarray"
            )
    if len(tokens.shape) != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens must be [b, t], both at least 1, got shape {tokens.shape}")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers, got {tokens.dtype}")
    b, t = tokens.shape
    if reset is not None and (reset.shape != (b, t) or reset.dtype != jnp.bool_):
        raise ValueError(
            f"reset must be bool [b, t], here {[b, t]}, true at the first token of a document; got"
            f" {reset.dtype} {list(reset.shape)}"
        )
    if lengths is not None and (
        lengths.shape != (b,) or not jnp.issubdtype(lengths.dtype, jnp.integer)
    ):
        raise ValueError(
            f"lengths must be integers [b], here [{b}], the number of valid tokens of each row;"
            f" got {lengths.dtype} {list(lengths.shape)}"
        )
    ids = np.asarray(tokens) if is_concrete(tokens) else None
    if ids is not None and (odd := ids[(ids < 0) | (ids >= vocabulary)]).size:
        raise ValueError(
            f"tokens: there is no id {odd[0]}, ids are 0 to {vocabulary - 1}; where rows are"
            " padded, pad with any of these and give lengths"
        )
    if lengths is not None and whole:
        check_lengths("lengths", lengths, t)


def check_mesh(params: Any, tokens: Any, mesh_axis: str | None) -> None:
    """Raises `ValueError` unless the mesh in context is that of the arrays, and `mesh_axis` the
    axis that shards, or can shard, their time."""
    if mesh_axis is not None and sharding.is_manual(mesh_axis):
        return
    if not sharding.is_explicit():
        for name, x in {"tokens": tokens, "params": params.emb}.items():
            if jax.typeof(x).sharding.mesh.explicit_axes:
                raise ValueError(
                    f"{name} are sharded over a mesh with explicit axes, which is not in context:"
                    " call jax.set_mesh(mesh)"
                )
    rows, time = map(sharding.names_of, jax.typeof(tokens).sharding.spec)
    if mesh_axis is None and time:
        raise ValueError(f"forward: time is sharded over {time[0]!r}; pass mesh_axis={time[0]!r}")
    if mesh_axis is None:
        return
    sharding.check_axis("forward", mesh_axis, tokens.shape[1])
    if not sharding.is_explicit(mesh_axis):
        raise ValueError(
            f"forward: mesh axis {mesh_axis!r} is automatic; models shard time over explicit axes:"
            " make the mesh with axis_types=(jax.sharding.AxisType.Explicit, ...)"
        )
    if mesh_axis in rows:
        raise ValueError(
            f"forward: mesh axis {mesh_axis!r} shards the rows of the tokens; name another for time"
        )
