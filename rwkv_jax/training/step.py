"""One optimizer step, compiled once: gradients of a batch (in parts if `train.accumulate` says so),
then the update."""

import math
from dataclasses import replace
from functools import partial
from typing import Any, Generic, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from rwkv_jax import models, sharding
from rwkv_jax.config import Config
from rwkv_jax.containers import container
from rwkv_jax.data.loader import Batch
from rwkv_jax.params import path_name
from rwkv_jax.training.objective import Examples, Objective, objective
from rwkv_jax.training.optimizer import optimizer_for
from rwkv_jax.training.state import TrainState
from rwkv_jax.training.trainable import trained_by
from rwkv_jax.typing import Array, Bool, Callable, Float, Leaf, PyTree


@container
class Metrics(Generic[Leaf]):
    """What one step reports; scalars but for `bad_gradients`.

    loss           cross entropy in nats per token, without regularisers
    objective      what was minimised
    grad_norm      global norm, before clipping
    state_rms      root mean square of the recurrent state after the batch
    lr             learning rate
    finite         whether these three are finite; if not, the step changed nothing
    bad_gradients  which parameters, in the order of the leaves that are trained, had a non-finite
                   gradient
    """

    loss: Leaf
    objective: Leaf
    grad_norm: Leaf
    state_rms: Leaf
    lr: Leaf
    finite: Leaf
    bad_gradients: Leaf


def make_train_step(cfg: Config, objective: Objective = objective) -> jax.stages.Wrapped:
    """The jitted `train_step(state, batch) -> (state, metrics)`, which donates its `state`.

    `objective` is minimised (`rwkv_jax.training.objective`). Called with a mesh in context
    (`sharding.use_mesh`), and a state and a batch on it, each device computes its shard of both.
    """
    optimizer, part = optimizer_for(cfg), trained_by(cfg)
    loss_fn = partial(objective, model=cfg.model, train=cfg.train)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def loss_of_part(trained: PyTree, *rest: Any) -> Any:
            whole = replace(state, params=part.put(state.params, trained), base=base)
            return loss_fn(whole.model, *rest)

        base, state = state.base, replace(state, base=None)  # which no step changes
        trained = part.take(state.params)
        reported, grads, carried = _gradients(
            loss_of_part, trained, batch, state.carried, cfg.train.accumulate
        )
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, trained)
            params = part.put(state.params, optax.apply_updates(trained, updates))
            squares = jnp.stack([jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)])
            grad_norm = jnp.sqrt(jnp.sum(squares))
            finite = jnp.isfinite(jnp.stack([*reported[:2], grad_norm])).all()
            # A bad update is not applied: the state stays the last good one.
            carried = jax.tree.map(sharding.reshard_like, carried, state.carried)
            updated = TrainState(state.step + 1, params, opt_state, carried)
            state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
            state = replace(state, base=base)
        lr = optimizer.learning_rate(updated.step - 1)
        return state, Metrics(
            loss=reported.loss,
            objective=reported.objective,
            grad_norm=grad_norm,
            state_rms=reported.state_rms,
            lr=lr,
            finite=finite,
            bad_gradients=~jnp.isfinite(squares),
        )

    return jax.jit(train_step, donate_argnums=0)


class _Reported(NamedTuple):
    loss: Float[Array, ""]
    objective: Float[Array, ""]
    state_rms: Float[Array, ""]


def _gradients(
    loss_fn: Callable, params: PyTree, batch: Batch, carried: PyTree, parts: int
) -> tuple[_Reported, PyTree, PyTree]:
    """What is reported, the gradient of the whole batch, and the rows' states after it, computed in
    `parts` equal parts one after another.

    `loss_fn` is a mean over tokens, so the average over equal parts is the mean of the whole batch.
    """

    def with_report(params, part, carried):
        loss, cross_entropy, after = _results(loss_fn(params, part, carried))
        reported = _Reported(cross_entropy, loss, models.state_rms(after))
        return loss, (lax.stop_gradient(reported), None if carried is None else after)

    grad_fn = jax.value_and_grad(with_report, has_aux=True)
    weight = None if batch.mask is None else _weights(jnp.asarray(batch.mask))
    rows = Examples(*batch[:3], weight)  # pyright: ignore[reportArgumentType]
    if parts == 1:
        (_, (reported, after)), grads = grad_fn(params, rows, carried)
        return reported, grads, after

    def add_part(sums, part):
        (_, (reported, after)), grads = grad_fn(params, *part)
        return jax.tree.map(jnp.add, sums, (reported, grads)), after

    def split(x, axis=0):
        # Strided, not contiguous: every part then has rows of every device.
        shape = (*x.shape[:axis], x.shape[axis] // parts, parts, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis + 1, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 2)  # states are stacked over layers, then rows
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    zero = jnp.zeros((), jnp.float32)
    zeros = (_Reported(zero, zero, zero), jax.tree.map(jnp.zeros_like, params))
    split_states = partial(split, axis=1)
    split_rows = jax.tree.map(split, rows), jax.tree.map(split_states, carried)
    sums, after = lax.scan(add_part, zeros, split_rows)
    return *jax.tree.map(lambda x: x / parts, sums), jax.tree.map(join, after)


def _results(returned: Any) -> tuple[Array, Array, models.State]:
    """The three results of an objective, numbers as float32. Raises `ValueError` for others."""
    match returned:
        case (loss, (cross_entropy, models.State() as after)):
            if all(map(_is_float_scalar, (loss, cross_entropy))):
                return loss.astype(jnp.float32), cross_entropy.astype(jnp.float32), after
    found = jax.tree.map(_described, returned, is_leaf=lambda x: isinstance(x, models.State))
    raise ValueError(
        "an objective must return (loss, (cross_entropy, state)), two floating-point scalars of JAX"
        f" and a State, as rwkv_jax.training.objective.objective does; got {found}"
    )


def _is_float_scalar(x: Any) -> bool:
    return isinstance(x, jax.Array) and x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.floating)


def _described(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}" if isinstance(x, jax.Array) else type(x).__name__


def _weights(mask: Bool[Array, "b t"]) -> Float[Array, "b t"]:
    """Weights of the tokens that are trained on, with mean 1 over the batch, so that a mean of
    weighted losses is the mean over these tokens; zeros if there are none."""
    mask = mask.astype(jnp.float32)
    return mask * (mask.size / jnp.maximum(jnp.sum(mask), 1))


def describe_nonfinite(metrics: Metrics, params: PyTree) -> str:
    """Names what was not finite in a step: the loss, what was minimised, or the gradients of some
    of `params`, the ones that are trained."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    bad = [name for name, is_bad in zip(names, metrics.bad_gradients, strict=True) if is_bad]
    numbers = {"loss": float(metrics.loss), "objective": float(metrics.objective)}
    found = [f"the {name} is {x}" for name, x in numbers.items() if not math.isfinite(x)][:1]
    if bad:
        shown = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        found.append(f"the gradient is not finite in {shown}")
    return "; ".join(found) or f"the gradient norm is {float(metrics.grad_norm)}"
