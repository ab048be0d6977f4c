"""The state that training carries from step to step, how it is made, and how it is saved."""

from dataclasses import replace
from functools import partial
from typing import Any, Generic

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rwkv_jax import models, sharding, tuning
from rwkv_jax import params as tables
from rwkv_jax.config import Config
from rwkv_jax.containers import container
from rwkv_jax.training.mesh import params_shardings, rows_sharding
from rwkv_jax.training.optimizer import optimizer_for
from rwkv_jax.training.trainable import specs, trained_by
from rwkv_jax.typing import Array, Callable, Leaf, PyTree


@container
class TrainState(Generic[Leaf]):
    """Steps taken (which decide the data that comes next), what is trained, its moments."""

    step: Leaf
    params: Any
    """The model's parameters, or an adapter (`rwkv_jax.tuning`)."""
    opt_state: Any
    carried: Any = None
    """The recurrent state of each row after the last step, where the next step starts from it."""
    base: Any = None
    """The frozen parameters that an adapter belongs to; no checkpoint has them."""

    @property
    def model(self) -> models.Model:
        """The whole model, whose gradient is the adapter's."""
        return self.params if self.base is None else tuning.on(self.base, self.params)

    @property
    def change(self) -> tuning.Adapter:
        """The adapter; its state is the whole one, where the frozen parameters have one too."""
        if self.params.state is None:
            return self.params
        return replace(self.params, state=tuning.get(self.model, tuning.STATE))

    @property
    def merged(self) -> models.Model:
        """The whole model as plain parameters, to write with."""
        if self.base is None:
            return self.params
        return tuning.merge(self.base, self.params, dtype=jnp.float32)


def to_trees(state: TrainState) -> dict[str, PyTree]:
    """The trees that a checkpoint stores."""
    rest = {"step": state.step, "opt_state": state.opt_state}
    if state.carried is not None:
        rest["carried"] = state.carried
    return {"params": state.params, "rest": rest}


def from_trees(trees: dict[str, PyTree], base: PyTree = None) -> TrainState:
    """The state of `to_trees`, with the `base` that it had."""
    return TrainState(params=trees["params"], **trees["rest"], base=base)


def init_train_state(
    cfg: Config, given: models.Model[Array] | None = None, mesh: Mesh | None = None
) -> TrainState[Array]:
    """The state before the first step: these parameters, or new ones drawn from `train.seed`;
    moments are zero. Across a mesh no device ever holds more of new ones than its shard.

    An adapter is always new; the given parameters are its base.
    """
    model, key = cfg.model, jax.random.key(cfg.train.seed)
    if given is not None:
        given = placed(given, cfg, mesh)
    base, params = (None, given) if cfg.tune.method == "full" else (given, None)
    shardings = None if mesh is None else params_shardings(specs(cfg), mesh)
    if base is not None:
        with sharding.use_mesh(mesh):
            params = tuning.init(model, key, cfg.tune, base, shardings)
    elif params is None:
        init = partial(models.init_params, model)
        params = (init if mesh is None else jax.jit(init, out_shardings=shardings))(key)
    with sharding.use_mesh(mesh):
        opt_state = jax.jit(_init_optimizer(cfg))(params)
        step, carried = jax.jit(lambda: jnp.zeros((), jnp.int32))(), None
        if cfg.train.carry_state:
            fresh = partial(models.init_state, model, cfg.train.batch)
            rows = None if mesh is None else rows_sharding(mesh)
            carried = jax.jit(fresh, out_shardings=rows)(params if base is None else base)
        return TrainState(step, params, opt_state, carried, base)


def placed(params: models.Model[Array], cfg: Config, mesh: Mesh | None) -> models.Model[Array]:
    """A model's parameters on the mesh."""
    if mesh is None:
        return params
    shardings = params_shardings(models.specs(cfg.model), mesh)
    return jax.tree.map(sharding.put_global, params, shardings)


def abstract_train_state(cfg: Config, mesh: Mesh | None = None) -> TrainState[jax.ShapeDtypeStruct]:
    """The state's shapes, dtypes and shardings, without making it."""
    model = cfg.model
    params, base = tables.abstract(specs(cfg)), None
    if cfg.tune.method != "full":
        base = models.abstract_params(model)
        if cfg.tune.base != "float32":  # official weights are stored in bfloat16
            base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), base)
    step, carried = jax.ShapeDtypeStruct((), jnp.int32), None
    if cfg.train.carry_state:
        whole = params if base is None else base
        carried = jax.eval_shape(lambda p: models.init_state(model, cfg.train.batch, p), whole)
    init = _init_optimizer(cfg)
    if mesh is None:
        return TrainState(step, params, jax.eval_shape(init, params), carried, base)
    params = jax.tree.map(_at, params, params_shardings(specs(cfg), mesh))
    if base is not None:
        base = jax.tree.map(_at, base, params_shardings(models.specs(model), mesh))
    with sharding.use_mesh(mesh):
        opt_state = jax.eval_shape(init, params)
    replicated = NamedSharding(mesh, PartitionSpec())
    opt_state = jax.tree.map(
        lambda x: _at(x, NamedSharding(mesh, x.sharding.spec) if x.sharding else replicated),
        opt_state,
    )
    carried = jax.tree.map(lambda x: _at(x, rows_sharding(mesh)), carried)
    return TrainState(_at(step, replicated), params, opt_state, carried, base)


def _init_optimizer(cfg: Config) -> Callable[[PyTree], PyTree]:
    """The optimizer's state of the trained part of the parameters, as a function of all."""
    init, part = optimizer_for(cfg).init, trained_by(cfg)
    return lambda params: init(part.take(params))


def _at(x: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
