"""Rematerialisation: what the backward pass keeps of a layer, and what it computes again.

none     keeps every intermediate (but not parameters that were brought together for it)
dots     keeps what `keep` marks, the results of matrix products and of the WKV, and computes the
         cheap rest again: half the memory of `none`, and no slower, as less is stored
wkv      keeps what the WKV needs for its gradient, its input apart: products are made again, the
         recurrence is not
block    keeps the layer's input only
offload  keeps what `dots` keeps, in the host's memory where the device has one beside its own
"""

from functools import partial
from typing import Literal, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

from rwkv_jax.typing import Callable

Remat = Literal["none", "dots", "wkv", "block", "offload"]

Tree = TypeVar("Tree")

_PRODUCT, _WKV = "rwkv_jax.product", "rwkv_jax.wkv"
GATHERED = "rwkv_jax.gathered"
"""The name of parameters that were brought together from several devices (`checkpoint_name`)."""


def keep(x: Tree, *, of_wkv: bool = False) -> Tree:
    """Mark arrays, of a matrix product or of the WKV, as too dear to compute again."""
    return jax.tree.map(partial(checkpoint_name, name=_WKV if of_wkv else _PRODUCT), x)


def rematerialise(layer: Callable, how: Remat, *, prevent_cse: bool) -> Callable:
    """`layer`, keeping for its gradient what `how` says.

    `prevent_cse`: see `jax.checkpoint`; false under `lax.scan`. Raises `ValueError` for another
    `how`.
    """
    policies = jax.checkpoint_policies
    named = {"dots": (_PRODUCT, _WKV), "wkv": (_WKV,), "block": ()}
    if how == "none" and not jax.sharding.get_abstract_mesh().explicit_axes:
        return layer
    if how == "none":
        policy = policies.save_anything_except_these_names(GATHERED)
    elif how == "offload":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[_PRODUCT, _WKV],
            offload_src="device",
            offload_dst="pinned_host",
        )
    elif how in named:
        policy = policies.save_only_these_names(*named[how])
    else:
        raise ValueError(f"remat {how!r}: one of none, {', '.join(named)}, offload")
    return jax.checkpoint(layer, prevent_cse=prevent_cse, policy=policy)
