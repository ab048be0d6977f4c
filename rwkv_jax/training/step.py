"""One optimizer step, compiled once: gradients of a batch (in parts, if asked), then the update."""

from functools import partial
from typing import Generic

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

from rwkv_jax import models, sharding
from rwkv_jax.config import Config, ModelConfig
from rwkv_jax.data.loader import Batch
from rwkv_jax.loss import cross_entropy
from rwkv_jax.params import path_name
from rwkv_jax.training.optimizer import schedule
from rwkv_jax.training.state import TrainState, optimizer_for, schedule_steps
from rwkv_jax.typing import Array, Bool, Callable, Float, Int, Leaf, PyTree


@struct.dataclass
class Metrics(Generic[Leaf]):
    """What one step reports; scalars but for `bad_gradients`."""

    loss: Leaf
    """Cross entropy in nats per token, without regularisers."""
    grad_norm: Leaf
    """Global norm, before clipping."""
    state_rms: Leaf
    """Root mean square of the recurrent state that the batch ends in."""
    lr: Leaf
    finite: Leaf
    """Loss and gradient are finite. If not, the step changed nothing."""
    bad_gradients: Leaf
    """Which parameters, in `jax.tree.leaves` order, had a non-finite gradient."""
    asked: Leaf | None = None
    """How many devices' processes ask to stop, where the step was told."""


def make_train_step(cfg: Config, model_cfg: ModelConfig) -> jax.stages.Wrapped:
    """The jitted `train_step(state, batch, asked=None) -> (state, metrics)`; it consumes its
    `state`. `asked`: one number of each device; their sum is told to all.

    Called with a mesh in context (`sharding.use_mesh`) and a state and a batch that lie on it,
    each device computes its part of both.
    """
    train = cfg.train
    dtype = jnp.dtype(train.dtype)
    optimizer = optimizer_for(cfg, model_cfg)
    learning_rate = schedule(cfg.optimizer, schedule_steps(cfg), version=model_cfg.version)
    implementation = None if train.wkv == "auto" else train.wkv

    def loss_fn(params, inputs, targets, reset, weight, carried):
        hidden, after = models.backbone(
            params,
            inputs,
            carried,
            cfg=model_cfg,
            reset=reset,
            mesh_axis=sharding.time_axis(),
            dtype=dtype,
            remat=train.remat,
            implementation=implementation,
        )
        with jax.named_scope("loss"):
            loss, parts = cross_entropy(
                hidden,
                params.head,
                targets,
                weight=weight,
                l2wrap=train.l2wrap,
                z_loss=train.z_loss,
            )
        memory = lax.stop_gradient(models.state_rms(after))
        return loss, (parts["cross_entropy"], memory, None if carried is None else after)

    def train_step(
        state: TrainState, batch: Batch, asked: Int[Array, " devices"] | None = None
    ) -> tuple[TrainState, Metrics]:
        (loss, memory), grads, carried = _gradients(
            loss_fn, state.params, batch, state.carried, train.accumulate
        )
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            squares = jnp.stack([jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)])
            grad_norm = jnp.sqrt(jnp.sum(squares))
            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            # A bad update is not taken: the state stays the last good one, whatever reads it
            # afterwards.
            carried = jax.tree.map(sharding.reshard_like, carried, state.carried)
            updated = TrainState(state.step + 1, params, opt_state, carried)
            state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
        lr = learning_rate(updated.step - 1)
        asked = None if asked is None else jnp.sum(asked)
        return state, Metrics(loss, grad_norm, memory, lr, finite, ~jnp.isfinite(squares), asked)

    return jax.jit(train_step, donate_argnums=0)


def _gradients(
    loss_fn: Callable, params: PyTree, batch: Batch, carried: PyTree, parts: int
) -> tuple[tuple[Float[Array, ""], Float[Array, ""]], PyTree, PyTree]:
    """Loss and state's RMS, gradient of the whole batch, and the rows' states after it, computed in
    `parts` equal parts after each other.

    `loss_fn` is a mean over tokens, so the average over equal parts is the whole batch's.
    """
    inputs, targets, reset, mask = batch
    weight = None if mask is None else _weights(jnp.asarray(mask))
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if parts == 1:
        (_, (loss, memory, carried)), grads = grad_fn(
            params, inputs, targets, reset, weight, carried
        )
        return (loss, memory), grads, carried

    def add_part(sums, part):
        rows, carried = part
        (_, (loss, memory, after)), grads = grad_fn(params, *rows, carried)
        return jax.tree.map(jnp.add, sums, ((loss, memory), grads)), after

    def split(x, axis=0):
        # Every parts-th row, not a run of rows: each device's rows are in all parts alike.
        shape = (*x.shape[:axis], x.shape[axis] // parts, parts, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis + 1, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 2)  # states are stacked over layers, then rows
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    rows = jax.tree.map(split, (inputs, targets, reset, weight))
    carried = jax.tree.map(partial(split, axis=1), carried)
    zero = jnp.zeros((), jnp.float32)
    zeros = ((zero, zero), jax.tree.map(jnp.zeros_like, params))
    sums, after = lax.scan(add_part, zeros, (rows, carried))
    return *jax.tree.map(lambda x: x / parts, sums), jax.tree.map(join, after)


def _weights(mask: Bool[Array, "b t"]) -> Float[Array, "b t"]:
    """Weights whose mean over the tokens of the batch is one, so that a mean of losses is that of
    the tokens that are trained on; zeros if none is."""
    mask = mask.astype(jnp.float32)
    return mask * (mask.size / jnp.maximum(jnp.sum(mask), 1))


def describe_nonfinite(metrics: Metrics, params: PyTree) -> str:
    """In words, for a step that was not finite: the loss, the gradients of which parameters."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    bad = [name for name, is_bad in zip(names, metrics.bad_gradients, strict=True) if is_bad]
    what = [] if jnp.isfinite(metrics.loss) else [f"the loss is {float(metrics.loss)}"]
    if bad:
        shown = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        what.append(f"the gradient is not finite in {shown}")
    return "; ".join(what) or f"the gradient norm is {float(metrics.grad_norm)}"
