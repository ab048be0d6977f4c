"""The recurrent state: all that a model remembers, of constant size, as a value.

Nothing is changed in place: keep a state and continue from it as often as you like.
"""

from typing import Any, Generic

import jax.numpy as jnp

from rwkv_jax.config import ModelConfig
from rwkv_jax.containers import container, static
from rwkv_jax.params import ParamSpec, zeros
from rwkv_jax.typing import Array, Leaf


@container
class BlockState(Generic[Leaf]):
    """What one layer remembers, float32: the last tokens of both token shifts [b, c], and the WKV
    state, one matrix per head [b, h, v, k] (version 4: the three vectors of `Wkv4State`)."""

    att_x: Leaf
    wkv: Any
    ffn_x: Leaf


@container
class State:
    """A whole model's state, labelled with its version; `blocks` is stacked, or a tuple of
    layers."""

    blocks: Any
    version: str = static()


def matrix_state(cfg: ModelConfig, batch: int) -> BlockState[Array]:
    """A fresh state of one layer, versions 5 to 7: zeros."""
    shift = jnp.zeros((batch, cfg.width), jnp.float32)
    wkv = jnp.zeros((batch, cfg.heads, cfg.head_size, cfg.head_size), jnp.float32)
    return BlockState(att_x=shift, wkv=wkv, ffn_x=shift)


def time_state(cfg: ModelConfig) -> ParamSpec | None:
    """The parameter that a state-tuned model's documents start from, [h, v, k], stacked over
    layers; None in other models.

    Without weight decay, which would pull the state towards zero; the official trainer of version 6
    has it.
    """
    if not cfg.state_tuned:
        return None
    n = cfg.head_size
    return ParamSpec((cfg.heads, n, n), zeros, cfg.layers, ("heads", None, None))
