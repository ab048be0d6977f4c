"""Optimizers with the parameter table's groups, and schedules of the learning rate.

    p <- p - lr(step) lr_scale (direction + weight_decay p)

AdamW's direction is m / (sqrt(v) + eps), with bias-corrected moments m and v of gradients that are
clipped by their global norm first. The
`ParamSpec` of p gives `lr_scale`, and says whether `weight_decay` applies. As in torch, `eps` is
added outside the root. The official 1e-18 is a normal float32, so a parameter that never had a
gradient gets 0 / (0 + eps) = 0. A gradient so small (below 1e-18) that its square underflows moves
its parameter by at most about lr, like any other; nothing is divided by zero.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rwkv_jax import models, sharding
from rwkv_jax.config import Config, OptimizerConfig
from rwkv_jax.params import ParamSpec, is_spec
from rwkv_jax.training.trainable import trained_by
from rwkv_jax.typing import Array, Callable, Float, Int, PyTree

Schedule = Callable[[Int[Array, ""] | int], Float[Array, ""]]


class Optimizer(NamedTuple):
    """An `optax.GradientTransformation`, with the learning rate of each step."""

    init: Callable
    update: Callable
    learning_rate: Schedule


def optimizer_for(cfg: Config) -> Optimizer:
    """The optimizer of the trained part of a run's parameters (`trained_by`), with its schedule and
    its parameter groups."""
    steps = float(cfg.train.steps)
    if cfg.data.exit_tokens:  # the official schedule counts tokens: a step may be cut by its end
        steps = cfg.data.exit_tokens / (cfg.train.batch * cfg.train.context)
    learning_rate = schedule(cfg.optimizer, steps, version=cfg.model.version)
    trained = trained_by(cfg)
    chain = transformation(cfg.optimizer, trained.specs, learning_rate)
    return Optimizer(chain.init, chain.update, learning_rate)


def schedule(cfg: OptimizerConfig, steps: int | float, *, version: str) -> Schedule:
    """The learning rate of a step (the first is 0): warm-up, then as `schedule` says.

    The official schedule counts tokens, so `steps` need not be whole. It also warms up again after
    every restart. Here the step alone decides: a resumed run equals an uninterrupted one, and its
    second-moment estimates are restored, so there is nothing to warm up.
    """
    peak, final, warmup = cfg.peak_lr, cfg.final_lr, cfg.warmup_steps
    start = models.VERSIONS[version].warmup_start
    begin = max(warmup, steps * (1 - cfg.decay_share)) if cfg.schedule == "wsd" else warmup

    def learning_rate(step: Int[Array, ""] | int) -> Float[Array, ""]:
        s = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((s - begin) / max(steps - begin, 1), 0.0, 1.0)
        if cfg.schedule == "cosine":
            rate = (peak + final) / 2 + (peak - final) / 2 * jnp.cos(jnp.pi * progress)
        else:
            rate = peak + (final - peak) * (0 if cfg.schedule == "constant" else progress)
        return rate * jnp.where(s < warmup, start + (1 - start) * s / max(warmup, 1), 1.0)

    return learning_rate


def from_the_start(opt_state: PyTree) -> PyTree:
    """An optimizer's state whose schedule is at its first step; the moments stay."""

    def is_count(x: object) -> bool:
        return isinstance(x, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda x: optax.ScaleByScheduleState(jnp.zeros_like(x.count)) if is_count(x) else x,
        opt_state,
        is_leaf=is_count,
    )


def transformation(
    cfg: OptimizerConfig, specs: PyTree, learning_rate: Schedule
) -> optax.GradientTransformation:
    """The update above, for the parameters that `specs` (a tree of `ParamSpec`) describes."""
    decayed = jax.tree.map(lambda spec: spec.decay, specs, is_leaf=is_spec)
    lr_scales = jax.tree.map(lambda spec: spec.lr_scale, specs, is_leaf=is_spec)
    scale_groups = optax.stateless(
        lambda updates, _: jax.tree.map(lambda u, scale: u * scale, updates, lr_scales)
    )
    chain = optax.chain(
        optax.clip_by_global_norm(cfg.clip) if cfg.clip else optax.identity(),
        _direction(cfg, specs),
        optax.add_decayed_weights(cfg.weight_decay, mask=decayed),
        scale_groups,
        optax.scale_by_learning_rate(learning_rate),  # pyright: ignore[reportArgumentType]
    )

    def update(grads: PyTree, state: PyTree, params: PyTree | None = None) -> tuple:
        # optax raises floats to integer powers, which JAX's strict promotion refuses, and which are
        # float64 where that is enabled.
        with jax.numpy_dtype_promotion("standard"), jax.enable_x64(False):
            return chain.update(grads, state, params)

    return optax.GradientTransformation(chain.init, update)  # pyright: ignore[reportArgumentType]


def _direction(cfg: OptimizerConfig, specs: PyTree) -> optax.GradientTransformation:
    """What becomes of clipped gradients before weight decay and rates.

    Lion: Chen et al. 2023 (arXiv 2302.06675). Muon: Jordan et al. 2024, of matrices in layers, with
    the scale that gives an update the RMS of AdamW's (Liu et al. 2025, arXiv 2502.16982).
    """
    adam = optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps)
    if cfg.name == "adamw":
        return adam
    if cfg.name == "lion":
        return optax.scale_by_lion(cfg.beta1, cfg.beta2)
    muon = optax.chain(
        optax.trace(decay=0.95, nesterov=True),
        optax.stateless(lambda updates, _: jax.tree.map(_orthogonal, updates)),
    )
    kinds = jax.tree.map(_kind, specs, is_leaf=is_spec)
    return optax.partition({"muon": muon, "adam": adam}, kinds)


def _kind(spec: ParamSpec) -> str:
    return "muon" if spec.layers and spec.layout == "linear" else "adam"


NEWTON_SCHULZ = 3.4445, -4.775, 2.0315
"""Coefficients of the quintic iteration; it brings singular values to about 0.7 to 1.2."""


def _orthogonal(updates: Float[Array, "l m n"]) -> Float[Array, "l m n"]:
    """Each matrix with its singular values at about 1, times a factor that gives it the RMS of
    AdamW's updates. Every device computes whole matrices."""
    x = sharding.replicate(updates)
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.swapaxes(1, 2)
    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.swapaxes(1, 2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    x = x if wide else x.swapaxes(1, 2)
    return sharding.reshard_like(x, updates) * (0.2 * max(x.shape[1:]) ** 0.5)
