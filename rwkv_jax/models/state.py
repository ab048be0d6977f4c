"""The recurrent state: all that a model remembers, of constant size, as a value.

Keep one and go on from it as often as you like; nothing is changed in place.
"""

from typing import Any, Generic

import jax.numpy as jnp
from flax import struct

from rwkv_jax.config import ModelConfig
from rwkv_jax.typing import Array, Leaf


@struct.dataclass
class BlockState(Generic[Leaf]):
    """What one layer remembers, float32: the token shifts' last tokens [b, c] and the WKV state.

    The WKV state is a matrix per head, [b, h, v, k], from version 5 on; version 4 has the three
    vectors of `Wkv4State`.
    """

    att_x: Leaf
    wkv: Any
    ffn_x: Leaf


@struct.dataclass
class State:
    """A whole model's state, of the version it names; `blocks` is stacked over layers, or a tuple
    of layers."""

    blocks: Any
    version: str = struct.field(pytree_node=False)


def rms(state: State) -> Array:
    """Root mean square of what the WKV remembers, float32: of the matrices of versions 5 to 7; of
    version 4 the mean values, numerators over denominators. One that grows without end is a model
    that forgets too little. `state` is stacked."""
    wkv = state.blocks.wkv
    if state.version == "4":
        wkv = jnp.where(wkv.den > 0, wkv.num / jnp.where(wkv.den > 0, wkv.den, 1.0), 0.0)
    return jnp.sqrt(jnp.mean(jnp.square(wkv.astype(jnp.float32))))


def matrix_state(cfg: ModelConfig, batch: int) -> BlockState[Array]:
    """A fresh state of one layer, versions 5 to 7: zeros."""
    shift = jnp.zeros((batch, cfg.width), jnp.float32)
    wkv = jnp.zeros((batch, cfg.heads, cfg.head_size, cfg.head_size), jnp.float32)
    return BlockState(att_x=shift, wkv=wkv, ffn_x=shift)
