"""RWKV-7a: version 7 with DeepEmbed, a table of matrices that each token brings to every channel
mix.

With x the channel mix's input, e = LN0(emb[token]) the model's own embedding, and M a square matrix
of side rank:

    M = s_emb[token] + e W_s_emb_x
    k = relu(x_k W_k)^2 * ((x s1) M s2 + s0)        out = k W_v

The tables need little work but much room, vocabulary x rank^2 a layer; only the rows of the tokens
at hand are read.

Source: PyPI `rwkv` 0.8.32 (`RWKV_DE_VERSION=1`), whose parameter names these are. No trainer was
released: the initial values here leave version 7 as it is at the first step.
"""

from dataclasses import replace
from typing import Any, Generic, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from rwkv_jax import nn, sharding
from rwkv_jax.config import ModelConfig
from rwkv_jax.models import rwkv7
from rwkv_jax.models.block import Block
from rwkv_jax.models.state import BlockState, matrix_state
from rwkv_jax.params import Layers, ParamSpec, ones, orthogonal, uniform, zeros
from rwkv_jax.typing import Array, Bool, Float, Int, Leaf

__all__ = [
    "Block",
    "Carry",
    "ChannelMix",
    "block",
    "gather",
    "init_carry",
    "init_state",
    "look_up",
    "specs",
]

RANK = 32
"""Side of the matrices of the released model."""


@struct.dataclass
class ChannelMix(Generic[Leaf]):
    """Parameters of the channel mix (official `ffn`)."""

    x_k: Leaf
    key: Leaf
    value: Leaf
    s_emb: Leaf
    s_emb_x: Leaf
    s1: Leaf
    s2: Leaf
    s0: Leaf


class Carry(NamedTuple):
    """What goes from layer to layer beside `x`."""

    v_first: Array
    embedded: Array


init_state = matrix_state


def init_carry(x: Float[Array, "b t c"]) -> Carry:
    """What the first layer is handed: `x` is the embedded tokens here."""
    return Carry(v_first=jnp.zeros_like(x), embedded=x)


def look_up(blocks: Any, tokens: Int[Array, "b t"]) -> Any:
    """The blocks with, for each table, the rows of these tokens: [.., b, t, rank^2]."""
    if isinstance(blocks, tuple):
        return tuple(look_up(layer, tokens) for layer in blocks)
    rows = nn.embed(blocks.ffn.s_emb, tokens)
    return replace(blocks, ffn=replace(blocks.ffn, s_emb=rows))


def gather(block: Any, dtype: Any) -> Any:
    """A layer's parameters as they are used; the rows of its table are parted as tokens are."""
    rows, rest = block.ffn.s_emb, replace(block, ffn=replace(block.ffn, s_emb=None))
    whole = sharding.gather(rest, dtype)
    return replace(whole, ffn=replace(whole.ffn, s_emb=rows))


def channel_mix(
    params: ChannelMix[Array],
    x: Float[Array, "b t c"],
    embedded: Float[Array, "b t c"],
    last: Float[Array, "b c"],
    *,
    reset: Bool[Array, "b t"] | None = None,
    lengths: Int[Array, " b"] | None = None,
    mesh_axis: str | None = None,
) -> tuple[Float[Array, "b t c"], Float[Array, "b c"]]:
    """The channel mix and the token-shift state to hand on; `params.s_emb` as `look_up` leaves
    it."""
    p = params
    previous, last = nn.token_shift(x, last, reset, lengths, mesh_axis)
    hidden = nn.linear(x + (previous - x) * nn.expand(p.x_k, x), p.key)
    with jax.named_scope("deep_embed"):
        low = nn.linear(x, p.s1)
        rank = low.shape[-1]
        matrix = p.s_emb.astype(x.dtype) + nn.linear(embedded, p.s_emb_x)
        matrix = matrix.reshape(*x.shape[:-1], rank, rank)
        low = jnp.einsum("bti,btij->btj", low, matrix)
        gain = nn.linear(low, p.s2)
        gain = gain + nn.expand(p.s0, gain)
    return nn.linear(jnp.square(jax.nn.relu(hidden)) * gain, p.value), last


def block(
    params: Block[Array],
    x: Float[Array, "b t c"],
    carry: Carry,
    state: BlockState[Array],
    *,
    first: Bool[Array, ""] | bool,
    reset: Bool[Array, "b t"] | None = None,
    lengths: Int[Array, " b"] | None = None,
    mesh_axis: str | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t c"], Carry, BlockState[Array]]:
    """One layer: `x` after both residual branches, the carry, and the layer's new state."""
    with jax.named_scope("time_mix"):
        out, v_first, att_x, wkv = rwkv7.time_mix(
            params.att,
            nn.layer_norm(x, params.ln1),
            carry.v_first,
            state.att_x,
            state.wkv,
            first=first,
            reset=reset,
            lengths=lengths,
            mesh_axis=mesh_axis,
            implementation=implementation,
        )
        x = x + out
    with jax.named_scope("channel_mix"):
        h = nn.layer_norm(x, params.ln2)
        out, ffn_x = channel_mix(
            params.ffn,
            h,
            carry.embedded,
            state.ffn_x,
            reset=reset,
            lengths=lengths,
            mesh_axis=mesh_axis,
        )
    after = BlockState(att_x=att_x, wkv=wkv, ffn_x=ffn_x)
    return x + out, carry._replace(v_first=v_first), after


def specs(cfg: ModelConfig) -> Block[ParamSpec]:
    """The table of one layer's parameters, stacked over `cfg.layers`: version 7's and the new
    ones."""
    c, f, rank = cfg.width, cfg.ffn, cfg.rank_embed or RANK
    base, make = rwkv7.specs(cfg), Layers(cfg.layers)
    table = ParamSpec(
        (cfg.vocab_size, rank**2),
        uniform(1e-4),
        cfg.layers,
        (None, "channels"),
        decay=True,
        layout="table",
    )
    ffn = ChannelMix(
        x_k=base.ffn.x_k,
        key=base.ffn.key,
        value=base.ffn.value,
        s_emb=table,
        s_emb_x=make.matrix((c, rank**2), ("embed", None), orthogonal(0.1)),
        s1=make.factor((c, rank), ("embed", None), zeros),
        s2=make.factor((rank, f), (None, "mlp"), orthogonal(0.1)),
        s0=make.row(f, ones, axes=("mlp",)),
    )
    return Block(ln1=base.ln1, att=base.att, ln2=base.ln2, ffn=ffn)
