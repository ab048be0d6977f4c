"""What a version of RWKV is to the rest of the package, and the layer that all versions share.

RWKV looks at other tokens in two places only, the token shift and the WKV. `backbone` binds these
two functions once, to the documents, lengths and mesh axis at hand, and hands them in, so that the
mixes of a version read as its paper does.
"""

from typing import Any, Generic, NamedTuple

import jax
import numpy as np
from flax import struct

from rwkv_jax import nn, sharding
from rwkv_jax.config import ModelConfig
from rwkv_jax.models.state import BlockState
from rwkv_jax.nn import Norm
from rwkv_jax.params import ParamSpec
from rwkv_jax.typing import Array, Callable, Float, Leaf, PyTree


@struct.dataclass
class Block(Generic[Leaf]):
    """One layer's parameters; `att` and `ffn` are the version's `TimeMix` and `ChannelMix`."""

    ln1: Norm[Leaf]
    att: Any
    ln2: Norm[Leaf]
    ffn: Any


def no_carry(x: Float[Array, "b t c"]) -> None:
    """The carry of versions that pass nothing but `x` from layer to layer."""


def no_look_up(blocks: PyTree, tokens: Array) -> PyTree:
    """The blocks of versions without tables indexed by token."""
    return blocks


class Version(NamedTuple):
    """A version: its parameters and functions, and the facts that others need to know."""

    specs: Callable[[ModelConfig], Block[ParamSpec]]
    """The table of one layer's parameters, stacked over layers."""
    init_state: Callable[[ModelConfig, int], BlockState[Array]]
    """(cfg, batch): a fresh state of one layer."""
    time_mix: Callable[..., tuple]
    """(params, x, carry, last, state, *, shift, wkv) -> (out, carry, last, state)."""
    channel_mix: Callable[..., tuple]
    """(params, x, carry, last, *, shift) -> (out, last)."""
    wkv: Callable[..., tuple]
    """The recurrence, one of `rwkv_jax.wkv`."""
    init_carry: Callable[[Array], Any] = no_carry
    """What the first layer is given besides the embedded tokens `x`."""
    look_up: Callable[[PyTree, Array], PyTree] = no_look_up
    """(blocks, tokens): the blocks, each table indexed by token replaced by its rows."""
    gather: Callable[[PyTree, Any], PyTree] = sharding.gather
    """(block, dtype): one layer's parameters, gathered for use."""
    recall: Callable[[Any], Array] = lambda wkv: wkv
    """A WKV state as the values that tokens read from it, to be measured."""
    recurrence_flops: int = 4
    """FLOPs of the recurrence per token, channel, and channel of its head."""
    decay_name: str = "time_decay"
    """The official parameter of the time mix that sets decays where no token does."""
    decay: Callable[[np.ndarray], np.ndarray] = lambda raw: np.exp(-np.exp(raw))
    """That parameter's values as factors per token."""
    warmup_start: float = 0.01
    """The fraction of the peak learning rate at which the official trainer's warm-up starts."""
    pypi_transposed: bool = False
    """Whether PyPI `rwkv` has the matrices of the state as [h, k, v]."""
    chat_template: str = "world"
    """The template (`rwkv_jax.data.conversations`) that its chat models were likely trained on."""


def block(
    version: Version,
    params: Block[Array],
    x: Float[Array, "b t c"],
    carry: Any,
    state: BlockState[Array],
    shift: Callable[..., tuple],
    wkv: Callable[..., tuple],
) -> tuple[Float[Array, "b t c"], Any, BlockState[Array]]:
    """One layer of any version: `x` after both residual branches, the carry, and the new state.

    `shift(x, last)` is the token shift, `wkv` the version's recurrence, both bound to what they
    need to know of documents, lengths and devices.
    """
    with jax.named_scope("time_mix"):
        h = nn.layer_norm(x, params.ln1)
        out, carry, att_x, memory = version.time_mix(
            params.att, h, carry, state.att_x, state.wkv, shift=shift, wkv=wkv
        )
        x = x + out
    with jax.named_scope("channel_mix"):
        h = nn.layer_norm(x, params.ln2)
        out, ffn_x = version.channel_mix(params.ffn, h, carry, state.ffn_x, shift=shift)
    return x + out, carry, BlockState(att_x=att_x, wkv=memory, ffn_x=ffn_x)
