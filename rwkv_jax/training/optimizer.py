"""AdamW with the parameter table's groups, and the official learning-rate schedule.

    p <- p - lr(step) lr_scale (m / (sqrt(v) + eps) + weight_decay p)

with bias-corrected moments m and v of gradients that are clipped by their global norm first. The
`ParamSpec` of p gives `lr_scale`, and says whether `weight_decay` applies. As in torch, `eps` is
added outside the root. The official 1e-18 is a normal float32, so a parameter that never had a
gradient gets 0 / (0 + eps) = 0. A gradient so small (below 1e-18) that its square underflows moves
its parameter by at most about lr, like any other; nothing is divided by zero.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rwkv_jax import models
from rwkv_jax.config import Config, OptimizerConfig
from rwkv_jax.params import is_spec
from rwkv_jax.typing import Array, Callable, Float, Int, PyTree

Schedule = Callable[[Int[Array, ""] | int], Float[Array, ""]]


class Optimizer(NamedTuple):
    """An `optax.GradientTransformation`, with the learning rate of each step."""

    init: Callable
    update: Callable
    learning_rate: Schedule


def optimizer_for(cfg: Config) -> Optimizer:
    """The optimizer of a run, with its schedule and its parameter groups."""
    steps = float(cfg.train.steps)
    if cfg.data.exit_tokens:  # the official schedule counts tokens: a step may be cut by its end
        steps = cfg.data.exit_tokens / (cfg.train.batch * cfg.train.context)
    learning_rate = schedule(cfg.optimizer, steps, version=cfg.model.version)
    chain = adamw(cfg.optimizer, models.specs(cfg.model), learning_rate)
    return Optimizer(chain.init, chain.update, learning_rate)


def schedule(cfg: OptimizerConfig, steps: int | float, *, version: str) -> Schedule:
    """The learning rate of a step (the first is 0): warm-up, then a half cosine to `final_lr`.

    The official schedule counts tokens, so `steps` need not be whole. It also warms up again after
    every restart. Here the step alone decides: a resumed run equals an uninterrupted one, and its
    second-moment estimates are restored, so there is nothing to warm up.
    """
    peak, final, warmup = cfg.peak_lr, cfg.final_lr, cfg.warmup_steps
    start = models.VERSIONS[version].warmup_start

    def learning_rate(step: Int[Array, ""] | int) -> Float[Array, ""]:
        s = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((s - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        cosine = (peak + final) / 2 + (peak - final) / 2 * jnp.cos(jnp.pi * progress)
        return cosine * jnp.where(s < warmup, start + (1 - start) * s / max(warmup, 1), 1.0)

    return learning_rate


def adamw(
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
        optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps),
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
