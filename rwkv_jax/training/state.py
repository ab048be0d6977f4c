"""What a training run carries from step to step."""

from typing import Any, Generic

import jax
import jax.numpy as jnp
import optax
from flax import struct

from rwkv_jax import models
from rwkv_jax.config import Config, ModelConfig
from rwkv_jax.training.optimizer import adamw, schedule
from rwkv_jax.typing import Array, Leaf


@struct.dataclass
class TrainState(Generic[Leaf]):
    """Steps taken, parameters and the optimizer's moments; the step decides the data's order."""

    step: Leaf
    params: Any
    opt_state: Any
    carried: Any = None
    """The recurrent state that each row's last step left it, where the next one goes on from it."""


def schedule_steps(cfg: Config) -> float:
    """Where the schedule ends; the official one counts tokens, of which a last step may be a
    part."""
    if cfg.data.exit_tokens:
        return cfg.data.exit_tokens / (cfg.train.batch * cfg.train.context)
    return float(cfg.train.steps)


def optimizer_for(cfg: Config, model_cfg: ModelConfig) -> optax.GradientTransformation:
    """The optimizer of a run, its schedule and its parameter groups."""
    learning_rate = schedule(cfg.optimizer, schedule_steps(cfg), version=model_cfg.version)
    return adamw(cfg.optimizer, models.specs(model_cfg), learning_rate)


def init_train_state(
    cfg: Config, model_cfg: ModelConfig, params: models.Model[Array] | None = None
) -> TrainState[Array]:
    """The state before the first step: these parameters, or fresh ones drawn from `train.seed`;
    moments zero."""
    if params is None:
        params = models.init_params(model_cfg, jax.random.key(cfg.train.seed))
    opt_state = jax.jit(optimizer_for(cfg, model_cfg).init)(params)
    carried = None
    if cfg.train.carry_state:
        carried = models.init_state(model_cfg, cfg.train.batch, params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, carried)


def abstract_train_state(cfg: Config, model_cfg: ModelConfig) -> TrainState[jax.ShapeDtypeStruct]:
    """The state's shapes and dtypes, without making it."""
    params = models.abstract_params(model_cfg)
    opt_state = jax.eval_shape(optimizer_for(cfg, model_cfg).init, params)
    carried = None
    if cfg.train.carry_state:
        carried = jax.eval_shape(lambda p: models.init_state(model_cfg, cfg.train.batch, p), params)
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, opt_state, carried)
