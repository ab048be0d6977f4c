"""RWKV-7a: version 7 with DeepEmbed, which gives every token a small matrix in every channel mix.

With x the channel mix's input, e = LN0(emb[token]) the model's own embedding, and M a matrix of
[rank, rank]:

    M = s_emb[token] + e W_s_emb_x
    k = relu(x_k W_k)^2 * ((x s1) M s2 + s0)        out = k W_v

The tables take little work but much memory, vocabulary x rank^2 per layer; only the rows of the
tokens at hand are read.

Source: PyPI `rwkv` 0.8.32 (`RWKV_DE_VERSION=1`), whose parameter names these are. No trainer was
released: the initial values here leave version 7 as it is at the first step.
"""

from dataclasses import replace
from typing import Any, Generic

import jax
import jax.numpy as jnp

from rwkv_jax import nn, sharding
from rwkv_jax.config import ModelConfig
from rwkv_jax.containers import container
from rwkv_jax.models import rwkv7
from rwkv_jax.models.version import Block
from rwkv_jax.params import Layers, ParamSpec, ones, orthogonal, uniform, zeros
from rwkv_jax.typing import Array, Callable, Float, Int, Leaf


@container
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


@container
class Carry(rwkv7.Carry[Leaf]):
    """Version 7's, and the embedded tokens."""

    embedded: Leaf  # [b, t, c]


def init_carry(x: Float[Array, "b t c"]) -> Carry[Array]:
    """The carry before the first layer, where `x` is the embedded tokens."""
    return Carry(embedded=x, **vars(rwkv7.init_carry(x)))


def look_up(blocks: Any, tokens: Int[Array, "b t"]) -> Any:
    """The blocks with each table replaced by its rows of these tokens: [..., b, t, rank^2]."""
    if isinstance(blocks, tuple):
        return tuple(look_up(layer, tokens) for layer in blocks)
    rows = nn.embed(blocks.ffn.s_emb, tokens)
    return replace(blocks, ffn=replace(blocks.ffn, s_emb=rows))


def gather(block: Any, dtype: Any) -> Any:
    """A layer's parameters, gathered for use; the rows of its table stay sharded as tokens are."""
    rows, rest = block.ffn.s_emb, replace(block, ffn=replace(block.ffn, s_emb=None))
    gathered = sharding.gather(rest, dtype)
    return replace(gathered, ffn=replace(gathered.ffn, s_emb=rows))


def channel_mix(
    params: ChannelMix[Array],
    x: Float[Array, "b t c"],
    carry: Carry[Array],
    last: Float[Array, "b c"],
    *,
    shift: Callable[..., tuple] = nn.token_shift,
) -> tuple[Float[Array, "b t c"], Float[Array, "b c"]]:
    """The channel mix, and the token shift's state; `params.s_emb` holds the tokens' rows
    (`look_up`)."""
    p = params
    previous, last = shift(x, last)
    hidden = nn.linear(x + (previous - x) * nn.expand(p.x_k, x), p.key)
    with jax.named_scope("deep_embed"):
        low = nn.linear(x, p.s1)
        rank = low.shape[-1]
        matrix = p.s_emb.astype(x.dtype) + nn.linear(carry.embedded, p.s_emb_x)
        matrix = matrix.reshape(*x.shape[:-1], rank, rank)
        gain = nn.linear(jnp.einsum("bti,btij->btj", low, matrix), p.s2)
        gain = gain + nn.expand(p.s0, gain)
    return nn.linear(jnp.square(jax.nn.relu(hidden)) * gain, p.value), last


def specs(cfg: ModelConfig) -> Block[ParamSpec]:
    """The table of one layer's parameters, stacked over `cfg.layers`: version 7's and the new
    ones."""
    c, f, rank = cfg.width, cfg.ffn, cfg.rank("rank_embed")
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


VERSION = rwkv7.VERSION._replace(
    specs=specs, channel_mix=channel_mix, init_carry=init_carry, look_up=look_up, gather=gather
)
