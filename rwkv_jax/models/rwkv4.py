"""RWKV-4 "Dove": attention-free token mixing with one decay and one bonus per channel.

With x' the previous token and x_j = x * mu_j + x' * (1 - mu_j):

    r = sigma(x_r W_r)    k = x_k W_k    v = x_v W_v
    wkv_t = (sum_{s<t} e^{(t-1-s)w + k_s} v_s + e^{u+k_t} v_t) / (sum_{s<t} e^{(t-1-s)w + k_s} +
    e^{u+k_t}) out = (r * wkv) W_o             w = -exp(time_decay), u = time_first

The channel mix is sigma(x_r W_r) * (relu(x_k W_k)^2 W_v).

Source: arXiv:2305.13048 and RWKV-LM `RWKV-v4neo/src/model.py`, whose parameter names, initial
values and optimizer groups these are.
"""

import math
from functools import partial
from typing import Generic

import jax
import jax.numpy as jnp
from flax import struct

from rwkv_jax import nn
from rwkv_jax.config import ModelConfig
from rwkv_jax.models.block import Block, init_carry, residual
from rwkv_jax.models.state import BlockState
from rwkv_jax.params import (
    Depth,
    Layers,
    ParamSpec,
    closed_form,
    orthogonal,
    zeros,
)
from rwkv_jax.typing import Array, Bool, Float, Int, Leaf
from rwkv_jax.wkv import Wkv4State, wkv4

__all__ = [
    "Block",
    "ChannelMix",
    "TimeMix",
    "block",
    "channel_mix",
    "init_carry",
    "init_state",
    "interpolate",
    "specs",
    "time_mix",
]


@struct.dataclass
class TimeMix(Generic[Leaf]):
    """Parameters of the time mix (official `att`)."""

    time_decay: Leaf
    time_first: Leaf
    time_mix_k: Leaf
    time_mix_v: Leaf
    time_mix_r: Leaf
    key: Leaf
    value: Leaf
    receptance: Leaf
    output: Leaf


@struct.dataclass
class ChannelMix(Generic[Leaf]):
    """Parameters of the channel mix (official `ffn`)."""

    time_mix_k: Leaf
    time_mix_r: Leaf
    key: Leaf
    receptance: Leaf
    value: Leaf


def init_state(cfg: ModelConfig, batch: int) -> BlockState[Array]:
    """A fresh state of one layer."""
    shift = jnp.zeros((batch, cfg.width), jnp.float32)
    return BlockState(att_x=shift, wkv=Wkv4State.empty((batch, cfg.width)), ffn_x=shift)


def interpolate(
    x: Float[Array, "b t c"], previous: Float[Array, "b t c"], mu: Float[Array, " c"]
) -> Float[Array, "b t c"]:
    """`x * mu + previous * (1 - mu)`: version 4 weighs the current token by mu."""
    return previous + (x - previous) * nn.expand(mu, x)


def time_mix(
    params: TimeMix[Array],
    x: Float[Array, "b t c"],
    last: Float[Array, "b c"],
    state: Wkv4State,
    *,
    reset: Bool[Array, "b t"] | None = None,
    lengths: Int[Array, " b"] | None = None,
    mesh_axis: str | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t c"], Float[Array, "b c"], Wkv4State]:
    """The time mix of `x`, and the two states to hand on (`last` for the token shift, `state` for
    the WKV)."""
    p = params
    with jax.named_scope("token_shift"):
        previous, last = nn.token_shift(x, last, reset, lengths, mesh_axis)
        x_k, x_v, x_r = (
            interpolate(x, previous, mu) for mu in (p.time_mix_k, p.time_mix_v, p.time_mix_r)
        )
    with jax.named_scope("projections"):
        r = jax.nn.sigmoid(nn.linear(x_r, p.receptance))
        k, v = nn.linear(x_k, p.key), nn.linear(x_v, p.value)
    with jax.named_scope("wkv"):
        y, state = wkv4(
            -jnp.exp(p.time_decay.astype(jnp.float32)),
            k,
            v,
            p.time_first,
            state,
            reset=reset,
            lengths=lengths,
            mesh_axis=mesh_axis,
            implementation=implementation,
        )
    with jax.named_scope("output"):
        return nn.linear(r * y, p.output), last, state


def channel_mix(
    params: ChannelMix[Array],
    x: Float[Array, "b t c"],
    last: Float[Array, "b c"],
    *,
    reset: Bool[Array, "b t"] | None = None,
    lengths: Int[Array, " b"] | None = None,
    mesh_axis: str | None = None,
) -> tuple[Float[Array, "b t c"], Float[Array, "b c"]]:
    """`sigma(x_r W_r) * (relu(x_k W_k)^2 W_v)`, and the token-shift state to hand on."""
    p = params
    previous, last = nn.token_shift(x, last, reset, lengths, mesh_axis)
    hidden = nn.linear(interpolate(x, previous, p.time_mix_k), p.key)
    r = jax.nn.sigmoid(nn.linear(interpolate(x, previous, p.time_mix_r), p.receptance))
    return r * nn.squared_relu_linear(hidden, p.value), last


block = residual(time_mix, channel_mix)


def specs(cfg: ModelConfig) -> Block[ParamSpec]:
    """The table of one layer's parameters, stacked over `cfg.layers`.

    Optimizer groups (RWKV-v4neo trainer): mixes 1x without decay, `time_decay` 2x without,
    `time_first` 3x without, matrices with decay.
    """
    c, f = cfg.width, cfg.ffn

    make = Layers(cfg.layers)
    row, matrix, norm = partial(make.row, c), make.matrix, partial(make.norm, c)

    channel = jnp.arange(c, dtype=jnp.float32)
    share = channel / c
    ramp = channel / max(c - 1, 1)

    def time_decay(depth: Depth) -> Array:
        return -5.0 + 8.0 * ramp ** (0.7 + 1.3 * depth.rising)

    def time_first(depth: Depth) -> Array:
        return math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1)

    mix_k = row(closed_form(lambda d: share**d.falling))
    mix_v = row(closed_form(lambda d: share**d.falling + 0.3 * d.rising))
    mix_r = row(closed_form(lambda d: share ** (0.5 * d.falling)))
    att = TimeMix(
        time_decay=make.plain((c,), closed_form(time_decay), 2.0, ("heads",)),
        time_first=make.plain((c,), closed_form(time_first), 3.0, ("heads",)),
        time_mix_k=mix_k,
        time_mix_v=mix_v,
        time_mix_r=mix_r,
        key=matrix((c, c), ("embed", "heads"), zeros),
        value=matrix((c, c), ("embed", "heads"), orthogonal(1.0)),
        receptance=matrix((c, c), ("embed", "heads"), zeros),
        output=matrix((c, c), ("heads", "embed"), zeros),
    )
    ffn = ChannelMix(
        time_mix_k=mix_k,
        time_mix_r=mix_k,
        key=matrix((c, f), ("embed", "mlp"), orthogonal(math.sqrt(max(f / c, 1.0)))),
        receptance=matrix((c, c), ("embed", None), zeros),
        value=matrix((f, c), ("mlp", "embed"), zeros),
    )
    return Block(ln1=norm(), att=att, ln2=norm(), ffn=ffn)
