"""What belongs together, checked before a model runs: its parameters, tokens, masks and types.

The checks are of shapes and types, and cost a compiled program nothing. Values are checked where
they are known: NumPy's, and JAX's outside of its transformations.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax.config import ModelConfig
from rwkv_jax.params import path_name
from rwkv_jax.typing import PyTree
from rwkv_jax.wkv.form import check_lengths, known


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
        kinds = {jnp.dtype(x.dtype) for x in leaves}
        if odd := [kind.name for kind in kinds if not jnp.issubdtype(kind, jnp.floating)]:
            raise ValueError(f"params are {odd[0]}: floating point is needed")
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
        if x is not None and not (hasattr(x, "shape") and hasattr(x, "dtype")):
            raise ValueError(f"{name}: an array is needed, not {type(x).__name__}; jnp.asarray it")
    if len(tokens.shape) != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens have shape {tokens.shape}: [b, t] is needed, both at least 1")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens are {tokens.dtype}: ids, integers, are needed")
    b, t = tokens.shape
    if reset is not None and (reset.shape != (b, t) or reset.dtype != jnp.bool_):
        raise ValueError(
            f"reset is {reset.dtype} {list(reset.shape)}: bool [b, t], here {[b, t]}, is needed,"
            " true at the first token of a document"
        )
    if lengths is not None and (
        lengths.shape != (b,) or not jnp.issubdtype(lengths.dtype, jnp.integer)
    ):
        raise ValueError(
            f"lengths are {lengths.dtype} {list(lengths.shape)}: integers [b], here [{b}], are"
            " needed, the number of valid tokens of each row"
        )
    ids = np.asarray(tokens) if known(tokens) else None
    if ids is not None and (odd := ids[(ids < 0) | (ids >= vocabulary)]).size:
        raise ValueError(
            f"tokens: there is no id {odd[0]}, ids are 0 to {vocabulary - 1}; where rows are"
            " padded, pad with any of these and give lengths"
        )
    if lengths is not None and whole:
        check_lengths("lengths", lengths, t)
