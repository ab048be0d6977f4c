"""One optimizer step, compiled once: gradients of a batch (in parts, if asked), then the update."""

from typing import Generic

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

from rwkv_jax import models
from rwkv_jax.config import Config, ModelConfig
from rwkv_jax.data.loader import Batch
from rwkv_jax.params import path_name
from rwkv_jax.training.loss import cross_entropy
from rwkv_jax.training.optimizer import schedule
from rwkv_jax.training.state import TrainState, optimizer_for
from rwkv_jax.typing import Array, Callable, Float, Leaf, PyTree


@struct.dataclass
class Metrics(Generic[Leaf]):
    """What one step reports; scalars but the last."""

    loss: Leaf
    """Cross entropy in nats per token, without regularisers."""
    grad_norm: Leaf
    """Global norm, before clipping."""
    lr: Leaf
    finite: Leaf
    """Loss and gradient are finite. If not, the step changed nothing."""
    bad_gradients: Leaf
    """Which parameters, in `jax.tree.leaves` order, had a non-finite gradient."""


def make_train_step(cfg: Config, model_cfg: ModelConfig) -> jax.stages.Wrapped:
    """The jitted `train_step(state, batch) -> (state, metrics)`; it consumes its `state`."""
    train = cfg.train
    dtype = jnp.dtype(train.dtype)
    optimizer = optimizer_for(cfg, model_cfg)
    learning_rate = schedule(cfg.optimizer, train.steps, version=model_cfg.version)
    implementation = None if train.wkv == "auto" else train.wkv

    def loss_fn(params, inputs, targets, reset):
        hidden, _ = models.backbone(
            params,
            inputs,
            cfg=model_cfg,
            reset=reset,
            dtype=dtype,
            remat=train.remat,
            implementation=implementation,
        )
        with jax.named_scope("loss"):
            loss, parts = cross_entropy(
                hidden, params.head, targets, l2wrap=train.l2wrap, z_loss=train.z_loss
            )
        return loss, parts["cross_entropy"]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, grads = _gradients(loss_fn, state.params, batch, train.accumulate)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            squares = jnp.stack([jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)])
            grad_norm = jnp.sqrt(jnp.sum(squares))
            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            # A bad update is not taken: the state stays the last good one, whatever reads it
            # afterwards.
            updated = TrainState(state.step + 1, params, opt_state)
            state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
        lr = learning_rate(updated.step - 1)
        return state, Metrics(loss, grad_norm, lr, finite, ~jnp.isfinite(squares))

    return jax.jit(train_step, donate_argnums=0)


def _gradients(
    loss_fn: Callable, params: PyTree, batch: Batch, parts: int
) -> tuple[Float[Array, ""], PyTree]:
    """Loss and gradient of the whole batch, computed in `parts` equal parts after each other.

    `loss_fn` is a mean over tokens, so the average over equal parts is the whole batch's.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if parts == 1:
        (_, loss), grads = grad_fn(params, *batch)
        return loss, grads

    def add_part(sums, part):
        (_, loss), grads = grad_fn(params, *part)
        return jax.tree.map(jnp.add, sums, (loss, grads)), None

    split = tuple(x.reshape(parts, x.shape[0] // parts, *x.shape[1:]) for x in batch)
    zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    sums, _ = lax.scan(add_part, zeros, split)
    return jax.tree.map(lambda x: x / parts, sums)


def what_is_not_finite(metrics: Metrics, params: PyTree) -> str:
    """In words, for a step that was not finite: the loss, the gradients of which parameters."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    bad = [name for name, is_bad in zip(names, metrics.bad_gradients, strict=True) if is_bad]
    what = [] if jnp.isfinite(metrics.loss) else [f"the loss is {float(metrics.loss)}"]
    if bad:
        shown = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        what.append(f"the gradient is not finite in {shown}")
    return "; ".join(what) or f"the gradient norm is {float(metrics.grad_norm)}"
