"""The state that training carries from step to step, how it is made, and how it is saved."""

from functools import partial
from typing import Any, Generic

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rwkv_jax import models, sharding
from rwkv_jax.config import Config
from rwkv_jax.containers import container
from rwkv_jax.training.mesh import params_shardings, rows_sharding
from rwkv_jax.training.optimizer import optimizer_for
from rwkv_jax.training.trainable import trainable
from rwkv_jax.typing import Array, Callable, Leaf, PyTree


@container
class TrainState(Generic[Leaf]):
    """Steps taken (which decide the data that comes next), parameters, optimizer's moments."""

    step: Leaf
    params: Any
    opt_state: Any
    carried: Any = None
    """The recurrent state of each row after the last step, where the next step starts from it."""


def to_trees(state: TrainState) -> dict[str, PyTree]:
    """The trees that a checkpoint stores."""
    rest = {"step": state.step, "opt_state": state.opt_state}
    if state.carried is not None:
        rest["carried"] = state.carried
    return {"params": state.params, "rest": rest}


def from_trees(trees: dict[str, PyTree]) -> TrainState:
    """The state of `to_trees`."""
    return TrainState(params=trees["params"], **trees["rest"])


def init_train_state(
    cfg: Config, params: models.Model[Array] | None = None, mesh: Mesh | None = None
) -> TrainState[Array]:
    """The state before the first step: these parameters, or new ones drawn from `train.seed`;
    moments are zero. Across a mesh no device ever holds more of new ones than its shard."""
    model, init = cfg.model, partial(models.init_params, cfg.model)
    if mesh is not None:
        shardings = params_shardings(models.specs(model), mesh)
        init = jax.jit(init, out_shardings=shardings)
        if params is not None:
            params = jax.tree.map(sharding.put_global, params, shardings)
    if params is None:
        params = init(jax.random.key(cfg.train.seed))
    with sharding.use_mesh(mesh):
        opt_state = jax.jit(_init_optimizer(cfg))(params)
        step, carried = jax.jit(lambda: jnp.zeros((), jnp.int32))(), None
        if cfg.train.carry_state:
            fresh = partial(models.init_state, model, cfg.train.batch)
            rows = None if mesh is None else rows_sharding(mesh)
            carried = jax.jit(fresh, out_shardings=rows)(params)
        return TrainState(step, params, opt_state, carried)


def abstract_train_state(cfg: Config, mesh: Mesh | None = None) -> TrainState[jax.ShapeDtypeStruct]:
    """The state's shapes, dtypes and shardings, without making it."""
    model = cfg.model
    params = models.abstract_params(model)
    step, carried = jax.ShapeDtypeStruct((), jnp.int32), None
    if cfg.train.carry_state:
        carried = jax.eval_shape(lambda p: models.init_state(model, cfg.train.batch, p), params)
    init = _init_optimizer(cfg)
    if mesh is None:
        return TrainState(step, params, jax.eval_shape(init, params), carried)
    params = jax.tree.map(_at, params, params_shardings(models.specs(model), mesh))
    with sharding.use_mesh(mesh):
        opt_state = jax.eval_shape(init, params)
    replicated = NamedSharding(mesh, PartitionSpec())
    opt_state = jax.tree.map(
        lambda x: _at(x, NamedSharding(mesh, x.sharding.spec) if x.sharding else replicated),
        opt_state,
    )
    carried = jax.tree.map(lambda x: _at(x, rows_sharding(mesh)), carried)
    return TrainState(_at(step, replicated), params, opt_state, carried)


def _init_optimizer(cfg: Config) -> Callable[[PyTree], PyTree]:
    """The optimizer's state of the trained part of the parameters, as a function of all."""
    init, part = optimizer_for(cfg).init, trainable(cfg.model, cfg.train.freeze)
    return lambda params: init(part.take(params))


def _at(x: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
