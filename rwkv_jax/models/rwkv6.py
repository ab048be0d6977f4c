"""RWKV-6 "Finch" (x060): version 5.2 with a token shift and a decay that depend on the token.

With x' the previous token, d = x' - x, and for j in (w, k, v, r, g)

    m_j = tanh((x + d * maa_x) W1)_j W2_j        x_j = x + d * (maa_j + m_j)

(five low-rank maps that share W1):

    r = x_r W_r    k = x_k W_k    v = x_v W_v    g = silu(x_g W_g)
    w = exp(-exp(time_decay + tanh(x_w D1) D2))
    y_t = (S_{t-1} + v (u k)^T) r        S_t = S_{t-1} diag(w_t) + v k^T        S of shape [v, k]
    out = (GroupNorm(y) * g) W_o         u = time_faaaa

The channel mix is version 4's with mixes of the previous token. State-tuned models (`x060_state`)
start every document from a learnt S, `time_state`.

Source: arXiv:2404.05892 §4.2 and RWKV-LM `RWKV-v5/src/model.py`, whose parameter names, initial
values and optimizer groups these are.
"""

from functools import partial
from typing import Generic

import jax
import jax.numpy as jnp

from rwkv_jax import nn
from rwkv_jax.config import ModelConfig
from rwkv_jax.containers import container
from rwkv_jax.models.state import matrix_state, time_state
from rwkv_jax.models.version import Block, Version
from rwkv_jax.nn import Norm
from rwkv_jax.params import (
    Depth,
    Layers,
    ParamSpec,
    closed_form,
    ln_x_weight,
    orthogonal,
    uniform,
    zeros,
)
from rwkv_jax.typing import Array, Callable, Float, Leaf
from rwkv_jax.wkv import wkv6


@container
class TimeMix(Generic[Leaf]):
    """Parameters of the time mix (official `att`); `time_state` only of a state-tuned model."""

    time_maa_x: Leaf
    time_maa_w: Leaf
    time_maa_k: Leaf
    time_maa_v: Leaf
    time_maa_r: Leaf
    time_maa_g: Leaf
    time_maa_w1: Leaf
    time_maa_w2: Leaf
    time_decay: Leaf
    time_decay_w1: Leaf
    time_decay_w2: Leaf
    time_faaaa: Leaf
    time_state: Leaf | None
    receptance: Leaf
    key: Leaf
    value: Leaf
    gate: Leaf
    output: Leaf
    ln_x: Norm[Leaf]


@container
class ChannelMix(Generic[Leaf]):
    """Parameters of the channel mix (official `ffn`)."""

    time_maa_k: Leaf
    time_maa_r: Leaf
    key: Leaf
    receptance: Leaf
    value: Leaf


def time_mix(
    params: TimeMix[Array],
    x: Float[Array, "b t c"],
    carry: None,
    last: Float[Array, "b c"],
    state: Float[Array, "b h v k"],
    *,
    shift: Callable[..., tuple] = nn.token_shift,
    wkv: Callable[..., tuple] = wkv6,
) -> tuple[Float[Array, "b t c"], None, Float[Array, "b c"], Float[Array, "b h v k"]]:
    """The time mix of `x`, the carry (none), and the states of the token shift and the WKV.

    `last` and `state` carry over from the tokens before `x`; zeros, or `time_state`, start a
    document.
    """
    p, n = params, state.shape[-1]
    with jax.named_scope("token_shift"):
        previous, last = shift(x, last)
        x_w, x_k, x_v, x_r, x_g = interpolate(p, x, previous - x)
    with jax.named_scope("projections"):
        r, k, v = nn.linear(x_r, p.receptance), nn.linear(x_k, p.key), nn.linear(x_v, p.value)
        g = jax.nn.silu(nn.linear(x_g, p.gate))
        w = nn.precise(nn.lora(x_w, p.time_decay_w1, p.time_decay_w2, jnp.tanh))
        log_w = -jnp.exp(w + nn.expand(p.time_decay, w))
    with jax.named_scope("wkv"):
        r, log_w, k, v = (nn.split_heads(z, n) for z in (r, log_w, k, v))
        u = nn.precise(p.time_faaaa, x)
        initial = None if p.time_state is None else nn.precise(p.time_state, x)
        y, state = wkv(r, log_w, k, v, u, state, initial=initial)
    with jax.named_scope("output"):
        y = nn.group_norm(y, p.ln_x) * g
        return nn.linear(y, p.output), carry, last, state


def interpolate(
    params: TimeMix[Array], x: Float[Array, "b t c"], delta: Float[Array, "b t c"]
) -> list[Float[Array, "b t c"]]:
    """`x_w x_k x_v x_r x_g`; `delta` is the previous token minus `x`."""
    p = params
    hidden = jnp.tanh(nn.linear(x + delta * nn.expand(p.time_maa_x, x), p.time_maa_w1))
    fixed = (p.time_maa_w, p.time_maa_k, p.time_maa_v, p.time_maa_r, p.time_maa_g)
    parts = jnp.split(hidden, len(fixed), axis=-1)
    return [
        x + delta * (nn.expand(maa, x) + nn.linear(part, up))
        for maa, part, up in zip(fixed, parts, p.time_maa_w2, strict=True)
    ]


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
    delta = previous - x
    hidden = nn.linear(x + delta * nn.expand(p.time_maa_k, x), p.key)
    r = jax.nn.sigmoid(nn.linear(x + delta * nn.expand(p.time_maa_r, x), p.receptance))
    return r * nn.squared_relu_linear(hidden, p.value), last


def specs(cfg: ModelConfig) -> Block[ParamSpec]:
    """The table of one layer's parameters, stacked over `cfg.layers`.

    Optimizer groups (RWKV-v5 trainer): `time_decay` 2x without weight decay, matrices with it, the
    rest without.
    """
    c, f, h, n = cfg.width, cfg.ffn, cfg.heads, cfg.head_size
    rank_mix, rank_w = cfg.rank("rank_mix"), cfg.rank("rank_w")

    make = Layers(cfg.layers)
    row, matrix, norm = partial(make.row, c), make.matrix, partial(make.norm, c)
    plain, factor = make.plain, make.factor

    channel = jnp.arange(c, dtype=jnp.float32)
    share, ramp = channel / c, channel / max(c - 1, 1)
    zigzag = 0.1 * ((channel + 1) % 3 - 1)

    def time_decay(depth: Depth) -> Array:
        return -6.0 + 5.0 * ramp ** (0.7 + 1.3 * depth.rising)

    def time_faaaa(depth: Depth) -> Array:
        return (depth.rising * (1.0 - ramp) + zigzag).reshape(h, n)

    mix_k = row(closed_form(lambda d: 1.0 - share**d.falling))
    mix_v = row(closed_form(lambda d: 1.0 - (share**d.falling + 0.3 * d.rising)))
    mix_r = row(closed_form(lambda d: 1.0 - share ** (0.5 * d.falling)))
    ffn_mix = row(closed_form(lambda d: 1.0 - share ** (d.falling**3)))
    att = TimeMix(
        time_maa_x=mix_k,
        time_maa_w=mix_k,
        time_maa_k=mix_k,
        time_maa_v=mix_v,
        time_maa_r=mix_r,
        time_maa_g=mix_r,
        time_maa_w1=factor((c, 5 * rank_mix), ("embed", None), zeros),
        time_maa_w2=factor((5, rank_mix, c), (None, None, "embed"), uniform(0.01)),
        time_decay=row(closed_form(time_decay), 2.0, ("heads",)),
        time_decay_w1=factor((c, rank_w), ("embed", None), zeros),
        time_decay_w2=factor((rank_w, c), (None, "channels"), uniform(0.01)),
        time_faaaa=plain((h, n), closed_form(time_faaaa), axes=("heads", None)),
        time_state=time_state(cfg),
        receptance=matrix((c, c), ("embed", "heads"), orthogonal(1.0)),
        key=matrix((c, c), ("embed", "heads"), orthogonal(0.1)),
        value=matrix((c, c), ("embed", "heads"), orthogonal(1.0)),
        gate=matrix((c, c), ("embed", "heads"), orthogonal(0.1)),
        output=matrix((c, c), ("heads", "embed"), zeros),
        ln_x=norm(ln_x_weight, axes=("heads",)),
    )
    ffn = ChannelMix(
        time_maa_k=ffn_mix,
        time_maa_r=ffn_mix,
        key=matrix((c, f), ("embed", "mlp"), orthogonal(1.0)),
        receptance=matrix((c, c), ("embed", None), zeros),
        value=matrix((f, c), ("mlp", "embed"), zeros),
    )
    return Block(ln1=norm(), att=att, ln2=norm(), ffn=ffn)


VERSION = Version(specs, matrix_state, time_mix, channel_mix, wkv6, pypi_transposed=True)
