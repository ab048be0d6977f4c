"""The layer of the versions whose two mixes have no more to say to each other than `x`: 4, 5, 6."""

from typing import Any, Generic

import jax
from flax import struct

from rwkv_jax import nn
from rwkv_jax.models.state import BlockState
from rwkv_jax.nn import Norm
from rwkv_jax.typing import Array, Bool, Callable, Float, Int, Leaf


@struct.dataclass
class Block(Generic[Leaf]):
    """One layer; `att` and `ffn` are its version's `TimeMix` and `ChannelMix`."""

    ln1: Norm[Leaf]
    att: Any
    ln2: Norm[Leaf]
    ffn: Any


def residual(time_mix: Callable[..., Any], channel_mix: Callable[..., Any]) -> Callable[..., Any]:
    """The `block` of a version, from its mixes."""

    def block(
        params: Block[Array],
        x: Float[Array, "b t c"],
        carry: None,
        state: BlockState[Array],
        *,
        first: Bool[Array, ""] | bool,
        reset: Bool[Array, "b t"] | None = None,
        lengths: Int[Array, " b"] | None = None,
        mesh_axis: str | None = None,
        implementation: str | None = None,
    ) -> tuple[Float[Array, "b t c"], None, BlockState[Array]]:
        """One layer: `x` after both residual branches, and the layer's new state.

        `carry` and `first` are there for the versions that need them; this has one kind of layer.
        """
        with jax.named_scope("time_mix"):
            out, att_x, wkv = time_mix(
                params.att,
                nn.layer_norm(x, params.ln1),
                state.att_x,
                state.wkv,
                reset=reset,
                lengths=lengths,
                mesh_axis=mesh_axis,
                implementation=implementation,
            )
            x = x + out
        with jax.named_scope("channel_mix"):
            h = nn.layer_norm(x, params.ln2)
            out, ffn_x = channel_mix(
                params.ffn, h, state.ffn_x, reset=reset, lengths=lengths, mesh_axis=mesh_axis
            )
        return x + out, carry, BlockState(att_x=att_x, wkv=wkv, ffn_x=ffn_x)

    return block


def init_carry(x: Float[Array, "b t c"]) -> None:
    """These versions hand nothing from layer to layer beside `x`."""
    return None
