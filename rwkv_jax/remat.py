"""Rematerialisation: what the backward pass saves of a layer, and what it recomputes.

none     saves every intermediate (but not parameters that were gathered for it)
dots     saves what `save_for_backward` tags, the results of matrix products and of the WKV, and
         recomputes the cheap rest: half the memory of `none`, and no slower, as less is stored
wkv      saves what the WKV needs for its gradient, except its inputs: products are recomputed, the
         recurrence is not
block    saves each layer's input only
offload  saves what `dots` saves, in host memory where the device has memory of its own
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
"""`checkpoint_name` of parameters that were gathered from several devices."""


def save_for_backward(x: Tree, *, of_wkv: bool = False) -> Tree:
    """Tag arrays (products, or with `of_wkv` the WKV's) as too expensive to recompute."""
    return jax.tree.map(partial(checkpoint_name, name=_WKV if of_wkv else _PRODUCT), x)


def rematerialise(layer: Callable, how: Remat, *, prevent_cse: bool) -> Callable:
    """`layer` under `jax.checkpoint`, saving for its gradient what `how` says.

    `prevent_cse`: see `jax.checkpoint`; false under `lax.scan`. Raises `ValueError` for an
    unknown `how`.
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
