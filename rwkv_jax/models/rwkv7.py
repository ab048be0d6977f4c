"""RWKV-7 "Goose" (x070): the delta rule with a decay, a removal key and a learning rate per
channel.

With x' the previous token, x_j = x + (x' - x) * mu_j and sigma the logistic function:

    r = x_r W_r                     w = exp(-exp(-1/2) sigma(w0 + tanh(x_w w1) w2))
    k = x_k W_k                     a = sigma(a0 + x_a a1 a2)
    v = x_v W_v                     g = sigma(x_g g1) g2

    v <- v + (v_first - v) sigma(v0 + x_v v1 v2)        v_first: v of the first layer, same token
    kk = normalise(k * k_k) per head
    k <- k * (1 + (a - 1) * k_a)

    S_t = S_{t-1} diag(w) - (S_{t-1} kk) (kk * a)^T + v k^T        y = S_t r
    out = ((GroupNorm(y) + (r . (k * r_k)) v) * g) W_o

The channel mix is relu(x_k W_k)^2 W_v. State-tuned models start every document from a learnt S,
`time_state`.

Source: arXiv:2503.14456 §4 and RWKV-LM `RWKV-v7/train_temp/src/model.py`, whose parameter names,
initial values and optimizer groups these are.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Generic

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rwkv_jax import nn, sharding
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
    constant,
    ln_x_weight,
    orthogonal,
    zeros,
)
from rwkv_jax.typing import Array, Callable, Float, Leaf
from rwkv_jax.wkv import wkv7

LOG_W_SCALE = -math.exp(-0.5)
"""log w = LOG_W_SCALE * sigma(.), so that w lies in (0.545, 1)."""

bounded_wkv7 = partial(wkv7, log_w_min=LOG_W_SCALE)


@container
class TimeMix(Generic[Leaf]):
    """Parameters of the time mix (official `att`); `time_state` only of a state-tuned model."""

    x_r: Leaf
    x_w: Leaf
    x_k: Leaf
    x_v: Leaf
    x_a: Leaf
    x_g: Leaf
    w0: Leaf
    w1: Leaf
    w2: Leaf
    a0: Leaf
    a1: Leaf
    a2: Leaf
    v0: Leaf
    v1: Leaf
    v2: Leaf
    g1: Leaf
    g2: Leaf
    k_k: Leaf
    k_a: Leaf
    r_k: Leaf
    time_state: Leaf | None
    receptance: Leaf
    key: Leaf
    value: Leaf
    output: Leaf
    ln_x: Norm[Leaf]


@container
class ChannelMix(Generic[Leaf]):
    """Parameters of the channel mix (official `ffn`)."""

    x_k: Leaf
    key: Leaf
    value: Leaf


@container
class Carry(Generic[Leaf]):
    """What passes from layer to layer besides `x`: the first layer's values."""

    v_first: Leaf  # [b, t, c]
    known: Leaf  # bool: false before the first layer, which defines v_first


def init_carry(x: Float[Array, "b t c"]) -> Carry[Array]:
    """The carry before the first layer."""
    return Carry(jnp.zeros_like(x), jnp.zeros((), bool))


def time_mix(
    params: TimeMix[Array],
    x: Float[Array, "b t c"],
    carry: Carry[Array],
    last: Float[Array, "b c"],
    state: Float[Array, "b h v k"],
    *,
    shift: Callable[..., tuple] = nn.token_shift,
    wkv: Callable[..., tuple] = bounded_wkv7,
) -> tuple[Float[Array, "b t c"], Carry[Array], Float[Array, "b c"], Float[Array, "b h v k"]]:
    """The time mix of `x`, the carry, and the states of the token shift and the WKV.

    `last` and `state` carry over from the tokens before `x`; zeros, or `time_state`, start a
    document.
    """
    p, n = params, params.r_k.shape[-1]
    with jax.named_scope("token_shift"):
        previous, last = shift(x, last)
        delta = previous - x
        x_r, x_w, x_k, x_v, x_a, x_g = (
            x + delta * nn.expand(mu, x) for mu in (p.x_r, p.x_w, p.x_k, p.x_v, p.x_a, p.x_g)
        )
    with jax.named_scope("projections"):
        r, k, v = nn.linear(x_r, p.receptance), nn.linear(x_k, p.key), nn.linear(x_v, p.value)
        w_raw = nn.precise(nn.lora(x_w, p.w1, p.w2, jnp.tanh))
        log_w = LOG_W_SCALE * jax.nn.sigmoid(w_raw + nn.expand(p.w0, w_raw))
        a = jax.nn.sigmoid(nn.lora(x_a, p.a1, p.a2) + nn.expand(p.a0, x))
        g = nn.lora(x_g, p.g1, p.g2, jax.nn.sigmoid)
        v_first = jnp.where(carry.known, sharding.reshard_like(carry.v_first, v), v)
        v = v + (v_first - v) * jax.nn.sigmoid(nn.lora(x_v, p.v1, p.v2) + nn.expand(p.v0, x))
    with jax.named_scope("keys"):
        kk = normalise(nn.split_heads(k * nn.expand(p.k_k, x), n))
        k = k * (1 + (a - 1) * nn.expand(p.k_a, x))
        r, log_w, k, v, a = (nn.split_heads(z, n) for z in (r, log_w, k, v, a))
    with jax.named_scope("wkv"):
        initial = None if p.time_state is None else nn.precise(p.time_state, x)
        y, state = wkv(r, log_w, k, v, -kk, kk * a, state, initial=initial)
    with jax.named_scope("output"):
        y = nn.group_norm(y, p.ln_x)
        bonus = jnp.sum(r * k * p.r_k.astype(x.dtype)[None, None], axis=-1, keepdims=True)
        out = nn.linear((y + nn.join_heads(bonus * v)) * g, p.output)
    return out, replace(carry, v_first=v_first, known=jnp.ones((), bool)), last, state


def normalise(x: Float[Array, "*shape n"]) -> Float[Array, "*shape n"]:
    """Unit vectors along the last axis, `x / max(|x|, 1e-12)`, with a zero gradient at zero."""
    wide = nn.precise(x)
    square = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * lax.rsqrt(jnp.maximum(square, 1e-24))).astype(x.dtype)


def channel_mix(
    params: ChannelMix[Array],
    x: Float[Array, "b t c"],
    carry: Carry[Array],
    last: Float[Array, "b c"],
    *,
    shift: Callable[..., tuple] = nn.token_shift,
) -> tuple[Float[Array, "b t c"], Float[Array, "b c"]]:
    """`relu(x_k W_k)^2 W_v`, and the token shift's state."""
    previous, last = shift(x, last)
    x_k = x + (previous - x) * nn.expand(params.x_k, x)
    return nn.squared_relu_linear(nn.linear(x_k, params.key), params.value), last


def specs(cfg: ModelConfig) -> Block[ParamSpec]:
    """The table of one layer's parameters, stacked over `cfg.layers`."""
    c, f, h, n = cfg.width, cfg.ffn, cfg.heads, cfg.head_size
    rank_w, rank_a, rank_v, rank_g = (cfg.rank(f"rank_{x}") for x in "wavg")

    make = Layers(cfg.layers)
    vector, matrix, norm = partial(make.row, c), make.matrix, partial(make.norm, c)
    of_heads, low_rank = partial(vector, axes=("heads",)), make.factor

    channel = jnp.arange(c, dtype=jnp.float32)
    ramp = channel / max(c - 1, 1)
    tilt = ramp - 0.5
    within = (channel % n - (n - 1) / 2) / max((n - 1) / 2, 0.5)
    zigzag = within * jnp.abs(within)

    def mix(power: float) -> ParamSpec:
        return vector(closed_form(lambda d: 1.0 - (channel / c) ** (power * d.falling)))

    def w0(depth: Depth) -> Array:
        return -5.5 + 6.0 * ramp ** (1.0 + depth.rising**0.3) + 2.5 * zigzag

    def ffn_mix(depth: Depth) -> Array:
        return 1.0 - (channel / c) ** (depth.falling**4)

    att = TimeMix(
        x_r=mix(0.2),
        x_w=mix(0.9),
        x_k=mix(0.7),
        x_v=mix(0.7),
        x_a=mix(0.9),
        x_g=mix(0.2),
        w0=of_heads(closed_form(w0), lr_scale=2.0),
        w1=low_rank((c, rank_w), ("embed", None), zeros),
        w2=low_rank((rank_w, c), (None, "channels"), orthogonal(0.1)),
        a0=of_heads(closed_form(lambda d: -0.19 + 0.3 * zigzag + 0.4 * tilt)),
        a1=low_rank((c, rank_a), ("embed", None), zeros),
        a2=low_rank((rank_a, c), (None, "channels"), orthogonal(0.1)),
        v0=of_heads(closed_form(lambda d: 0.73 - 0.4 * tilt)),
        v1=low_rank((c, rank_v), ("embed", None), zeros),
        v2=low_rank((rank_v, c), (None, "channels"), orthogonal(0.1)),
        g1=low_rank((c, rank_g), ("embed", None), zeros),
        g2=low_rank((rank_g, c), (None, "channels"), orthogonal(0.1)),
        k_k=of_heads(closed_form(lambda d: 0.71 - 0.1 * tilt)),
        k_a=of_heads(constant(1.02)),
        r_k=make.plain((h, n), constant(-0.04), axes=("heads", None)),
        time_state=time_state(cfg),
        receptance=matrix((c, c), ("embed", "heads"), orthogonal(1.0)),
        key=matrix((c, c), ("embed", "heads"), orthogonal(0.1)),
        value=matrix((c, c), ("embed", "heads"), orthogonal(1.0)),
        output=matrix((c, c), ("heads", "embed"), zeros),
        ln_x=norm(ln_x_weight, axes=("heads",)),
    )
    ffn = ChannelMix(
        x_k=vector(closed_form(ffn_mix)),
        key=matrix((c, f), ("embed", "mlp"), orthogonal(1.0)),
        value=matrix((f, c), ("mlp", "embed"), zeros),
    )
    return Block(ln1=norm(), att=att, ln2=norm(), ffn=ffn)


def decay(w0: np.ndarray) -> np.ndarray:
    """The factor per token that `w0` stands for, where a token adds nothing to it."""
    return np.exp(-math.exp(-0.5) / (1 + np.exp(-w0)))


VERSION = Version(
    specs,
    matrix_state,
    time_mix,
    channel_mix,
    bounded_wkv7,
    init_carry,
    recurrence_flops=8,  # S a, its product with b, v k, S r
    decay_name="w0",
    decay=decay,
    chat_template="g1",
)
