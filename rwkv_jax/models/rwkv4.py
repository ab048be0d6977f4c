"""RWKV-4 "Dove": attention-free token mixing with one decay and one bonus per channel.

With x' the previous token, x_j = x * mu_j + x' * (1 - mu_j) and sigma the logistic function:

    r = sigma(x_r W_r)    k = x_k W_k    v = x_v W_v
    wkv_t = (sum_{s<t} e^{(t-1-s) w + k_s} v_s + e^{u+k_t} v_t)
            / (sum_{s<t} e^{(t-1-s) w + k_s} + e^{u+k_t})
    out = (r * wkv) W_o                 w = -exp(time_decay), u = time_first

The channel mix is sigma(x_r W_r) * (relu(x_k W_k)^2 W_v).

Source: arXiv:2305.13048 and RWKV-LM `RWKV-v4neo/src/model.py`, whose parameter names, initial
values and optimizer groups these are.
"""

import math
from functools import partial
from typing import Generic

import jax
import jax.numpy as jnp

from rwkv_jax import nn
from rwkv_jax.config import ModelConfig
from rwkv_jax.containers import container
from rwkv_jax.models.state import BlockState
from rwkv_jax.models.version import Block, Version
from rwkv_jax.params import (
    Depth,
    Layers,
    ParamSpec,
    closed_form,
    orthogonal,
    zeros,
)
from rwkv_jax.typing import Array, Callable, Float, Leaf
from rwkv_jax.wkv import Wkv4State, wkv4


@container
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


@container
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
    """`x * mu + previous * (1 - mu)`."""
    return previous + (x - previous) * nn.expand(mu, x)


def time_mix(
    params: TimeMix[Array],
    x: Float[Array, "b t c"],
    carry: None,
    last: Float[Array, "b c"],
    state: Wkv4State,
    *,
    shift: Callable[..., tuple] = nn.token_shift,
    wkv: Callable[..., tuple] = wkv4,
) -> tuple[Float[Array, "b t c"], None, Float[Array, "b c"], Wkv4State]:
    """The time mix of `x`, the carry (none), and the states of the token shift and the WKV.

    `last` and `state` carry over from the tokens before `x`; `init_state` starts a document.
    """
    p = params
    with jax.named_scope("token_shift"):
        previous, last = shift(x, last)
        x_k, x_v, x_r = (
            interpolate(x, previous, mu) for mu in (p.time_mix_k, p.time_mix_v, p.time_mix_r)
        )
    with jax.named_scope("projections"):
        r = jax.nn.sigmoid(nn.linear(x_r, p.receptance))
        k, v = nn.linear(x_k, p.key), nn.linear(x_v, p.value)
        log_w = -jnp.exp(nn.precise(p.time_decay, x))
    with jax.named_scope("wkv"):
        y, state = wkv(log_w, k, v, nn.precise(p.time_first, x), state)
    with jax.named_scope("output"):
        return nn.linear(r * y, p.output), carry, last, state


def channel_mix(
    params: ChannelMix[Array],
    x: Float[Array, "b t c"],
    carry: None,
    last: Float[Array, "b c"],
    *,
    shift: Callable[..., tuple] = nn.token_shift,
) -> tuple[Float[Array, "b t c"], Float[Array, "b c"]]:
    """`sigma(x_r W_r) * (relu(x_k W_k)^2 W_v)`, and the token shift's state."""
    p = params
    previous, last = shift(x, last)
    hidden = nn.linear(interpolate(x, previous, p.time_mix_k), p.key)
    r = jax.nn.sigmoid(nn.linear(interpolate(x, previous, p.time_mix_r), p.receptance))
    return r * nn.squared_relu_linear(hidden, p.value), last


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


def recall(wkv: Wkv4State) -> Array:
    """The weighted mean of values that the state holds; 0 before the first token."""
    return jnp.where(wkv.den > 0, wkv.num / jnp.where(wkv.den > 0, wkv.den, 1.0), 0.0)


VERSION = Version(
    specs,
    init_state,
    time_mix,
    channel_mix,
    wkv4,
    recall=recall,
    recurrence_flops=0,  # sums and products of channels, no matrix products
    warmup_start=0.2,
)
