"""RWKV-5 "Eagle": matrix-valued states, one decay and one bonus per head (5.0, 5.1) or per channel
(5.2).

With x' the previous token and x_j = x * mu_j + x' * (1 - mu_j):

    r = x_r W_r    k = x_k W_k    v = x_v W_v    g = silu(x_g W_g)
    y_t = (S_{t-1} + v (u k)^T) r        S_t = S_{t-1} diag(w) + v k^T        S of shape [v, k]
    out = (GroupNorm(y) * g) W_o         w = exp(-exp(time_decay))

| version | `time_decay` | u                 | gate |
|---------|--------------|-------------------|------|
| 5.0     | [h]          | exp(`time_first`) | no   |
| 5.1     | [h]          | `time_faaaa`      | yes  |
| 5.2     | [h, n]       | `time_faaaa`      | yes  |

The channel mix is version 4's. (rwkv.cpp calls 5.0 "5v1".) State-tuned models start every document
from a learnt S, `time_state`.

Source: arXiv:2404.05892 §4.1 and RWKV-LM `RWKV-v5/src/model.py`, whose parameter names, initial
values and optimizer groups these are.
"""

from functools import partial
from typing import Generic

import jax
import jax.numpy as jnp

from rwkv_jax import nn
from rwkv_jax.config import ModelConfig
from rwkv_jax.containers import container
from rwkv_jax.models.rwkv4 import ChannelMix, channel_mix, interpolate
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
from rwkv_jax.wkv import wkv6


@container
class TimeMix(Generic[Leaf]):
    """Parameters of the time mix (official `att`); None where a version has no such parameter, and
    `time_state` of a model that is not state-tuned."""

    time_decay: Leaf
    time_first: Leaf | None
    time_faaaa: Leaf | None
    time_state: Leaf | None
    time_mix_k: Leaf
    time_mix_v: Leaf
    time_mix_r: Leaf
    time_mix_g: Leaf | None
    key: Leaf
    value: Leaf
    receptance: Leaf
    gate: Leaf | None
    output: Leaf
    ln_x: Norm[Leaf]


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
        x_k, x_v, x_r = (
            interpolate(x, previous, mu) for mu in (p.time_mix_k, p.time_mix_v, p.time_mix_r)
        )
    with jax.named_scope("projections"):
        products = (x_r, p.receptance), (x_k, p.key), (x_v, p.value)
        r, k, v = (nn.split_heads(nn.linear(*pair), n) for pair in products)
    with jax.named_scope("wkv"):
        log_w = per_channel(-jnp.exp(nn.precise(p.time_decay, x)), n)
        initial = None if p.time_state is None else nn.precise(p.time_state, x)
        y, state = wkv(r, log_w, k, v, per_channel(bonus(p, x), n), state, initial=initial)
    with jax.named_scope("output"):
        y = nn.group_norm(y, p.ln_x)
        if p.gate is not None and p.time_mix_g is not None:
            x_g = interpolate(x, previous, p.time_mix_g)
            y = y * jax.nn.silu(nn.linear(x_g, p.gate))
        return nn.linear(y, p.output), carry, last, state


def bonus(params: TimeMix[Array], x: Array) -> Float[Array, "h *n"]:
    """u, for the compute type of `x`."""
    if params.time_faaaa is not None:
        return nn.precise(params.time_faaaa, x)
    assert params.time_first is not None, "one of the two is there"
    return jnp.exp(nn.precise(params.time_first, x))


def per_channel(x: Float[Array, "h *n"], n: int) -> Float[Array, "h n"]:
    """A value per head or per channel, as one per channel."""
    return jnp.broadcast_to(x.reshape(x.shape[0], -1), (x.shape[0], n))


def specs(cfg: ModelConfig) -> Block[ParamSpec]:
    """The table of one layer's parameters, stacked over `cfg.layers`.

    Optimizer groups (RWKV-v5 trainer): mixes and `time_faaaa` 1x without decay, `time_decay` 2x
    without, `time_first` 3x without, matrices with decay.
    """
    c, f, h, n = cfg.width, cfg.ffn, cfg.heads, cfg.head_size
    gated, by_channel = cfg.version != "5.0", cfg.version == "5.2"

    make = Layers(cfg.layers)
    row, matrix, norm = partial(make.row, c), make.matrix, partial(make.norm, c)

    shape, axes = ((h, n), ("heads", None)) if by_channel else ((h,), ("heads",))
    index = jnp.arange(c if by_channel else h, dtype=jnp.float32).reshape(shape)
    ramp = index / max(index.size - 1, 1)
    share = jnp.arange(c, dtype=jnp.float32) / c
    zigzag = 0.1 * ((index + 1) % 3 - 1) if by_channel else 0.0

    def time_decay(depth: Depth) -> Array:
        return -6.0 + 5.0 * ramp ** (0.7 + 1.3 * depth.rising)

    def time_faaaa(depth: Depth) -> Array:
        return depth.rising * (1.0 - ramp) + zigzag

    mix_k = row(closed_form(lambda d: share**d.falling))
    mix_v = row(closed_form(lambda d: share**d.falling + 0.3 * d.rising))
    mix_r = row(closed_form(lambda d: share ** (0.5 * d.falling)))
    att = TimeMix(
        time_decay=make.plain(shape, closed_form(time_decay), 2.0, axes),
        time_first=None if gated else make.plain(shape, constant(-3.0), 3.0, axes),
        time_faaaa=make.plain(shape, closed_form(time_faaaa), axes=axes) if gated else None,
        time_state=time_state(cfg),
        time_mix_k=mix_k,
        time_mix_v=mix_v,
        time_mix_r=mix_r,
        time_mix_g=mix_r if gated else None,
        key=matrix((c, c), ("embed", "heads"), orthogonal(0.1)),
        value=matrix((c, c), ("embed", "heads"), orthogonal(1.0)),
        receptance=matrix((c, c), ("embed", "heads"), orthogonal(1.0)),
        gate=matrix((c, c), ("embed", "heads"), orthogonal(0.1)) if gated else None,
        output=matrix((c, c), ("heads", "embed"), zeros),
        ln_x=norm(ln_x_weight, axes=("heads",)),
    )
    ffn = ChannelMix(
        time_mix_k=mix_k,
        time_mix_r=mix_k,
        key=matrix((c, f), ("embed", "mlp"), orthogonal(1.0)),
        receptance=matrix((c, c), ("embed", None), zeros),
        value=matrix((f, c), ("mlp", "embed"), zeros),
    )
    return Block(ln1=norm(), att=att, ln2=norm(), ffn=ffn)


VERSION = Version(specs, matrix_state, time_mix, channel_mix, wkv6, pypi_transposed=True)
