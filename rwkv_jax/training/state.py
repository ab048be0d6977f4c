"""What a training run carries from step to step."""

from functools import partial
from typing import Any, Generic

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rwkv_jax import models, sharding
from rwkv_jax.config import Config, ModelConfig
from rwkv_jax.training.mesh import params_shardings, rows_sharding
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
    cfg: Config,
    model_cfg: ModelConfig,
    params: models.Model[Array] | None = None,
    mesh: Mesh | None = None,
) -> TrainState[Array]:
    """The state before the first step: these parameters, or fresh ones drawn from `train.seed`;
    moments zero. Over a mesh no device ever has more of fresh ones than its part."""
    if params is None:
        key = jax.random.key(cfg.train.seed)
        if mesh is None:
            params = models.init_params(model_cfg, key)
        else:
            places = params_shardings(models.specs(model_cfg), mesh)
            params = jax.jit(partial(models.init_params, model_cfg), out_shardings=places)(key)
    elif mesh is not None:
        places = params_shardings(models.specs(model_cfg), mesh)
        params = jax.tree.map(sharding.put_global, params, places)
    with sharding.use_mesh(mesh):
        opt_state = jax.jit(optimizer_for(cfg, model_cfg).init)(params)
        step, carried = jax.jit(lambda: jnp.zeros((), jnp.int32))(), None
        if cfg.train.carry_state:
            fresh = partial(models.init_state, model_cfg, cfg.train.batch)
            rows = None if mesh is None else rows_sharding(mesh)
            carried = jax.jit(fresh, out_shardings=rows)(params)
        return TrainState(step, params, opt_state, carried)


def abstract_train_state(
    cfg: Config, model_cfg: ModelConfig, mesh: Mesh | None = None
) -> TrainState[jax.ShapeDtypeStruct]:
    """The state's shapes, dtypes and places, without making it."""
    params = models.abstract_params(model_cfg)
    step, carried = jax.ShapeDtypeStruct((), jnp.int32), None
    if cfg.train.carry_state:
        carried = jax.eval_shape(lambda p: models.init_state(model_cfg, cfg.train.batch, p), params)
    init = optimizer_for(cfg, model_cfg).init
    if mesh is None:
        return TrainState(step, params, jax.eval_shape(init, params), carried)
    params = jax.tree.map(_at, params, params_shardings(models.specs(model_cfg), mesh))
    with sharding.use_mesh(mesh):
        opt_state = jax.eval_shape(init, params)
    whole = NamedSharding(mesh, PartitionSpec())
    opt_state = jax.tree.map(
        lambda x: _at(x, NamedSharding(mesh, x.sharding.spec) if x.sharding else whole), opt_state
    )
    carried = jax.tree.map(lambda x: _at(x, rows_sharding(mesh)), carried)
    return TrainState(_at(step, whole), params, opt_state, carried)


def _at(x: jax.ShapeDtypeStruct, place: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
