"""Rematerialisation: what the backward pass keeps of a layer, and what it computes again.

none    keeps every intermediate (but not parameters that were brought together for it)
dots    keeps what `keep` marks, the results of matrix products and of the WKV, and computes the
        cheap rest again: half the memory of `none`, and no slower, as less is stored
full    keeps the layer's input only
"""

from functools import partial
from typing import Literal, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

from rwkv_jax.typing import Callable

Remat = Literal["none", "dots", "full"]

Tree = TypeVar("Tree")

_KEPT = "rwkv_jax.keep"
GATHERED = "rwkv_jax.gathered"
"""The name of parameters that were brought together from several devices (`checkpoint_name`)."""


def keep(x: Tree) -> Tree:
    """Mark arrays as too dear to compute again."""
    return jax.tree.map(partial(checkpoint_name, name=_KEPT), x)


def rematerialise(layer: Callable, how: Remat, *, prevent_cse: bool) -> Callable:
    """`layer`, keeping for its gradient what `how` says.

    `prevent_cse`: see `jax.checkpoint`; false under `lax.scan`. Raises `ValueError` for another
    `how`.
    """
    if how == "none" and not jax.sharding.get_abstract_mesh().explicit_axes:
        return layer
    if how == "none":
        policy = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
        return jax.checkpoint(layer, prevent_cse=prevent_cse, policy=policy)
    if how == "full":
        return jax.checkpoint(layer, prevent_cse=prevent_cse)
    if how == "dots":
        policy = jax.checkpoint_policies.save_only_these_names(_KEPT)
        return jax.checkpoint(layer, prevent_cse=prevent_cse, policy=policy)
    raise ValueError(f"remat {how!r}: one of none, dots, full")
