"""What training minimises: the loss of a batch, as a function that can be replaced.

    def with_label_smoothing(params, batch, carried, *, model, train):
        hidden, after = hidden_states(params, batch, carried, model=model, train=train)
        ...
        return loss, (cross_entropy, after)

    step = make_train_step(cfg, objective=with_label_smoothing)

or `train(cfg, objective=with_label_smoothing)` of `rwkv_jax.training.loop`, for a whole run.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rwkv_jax import models, sharding
from rwkv_jax.config import ModelConfig, TrainConfig
from rwkv_jax.loss import cross_entropy
from rwkv_jax.typing import Array, Bool, Callable, Float, Int, PyTree


class Examples(NamedTuple):
    """The rows of a batch, or of one of the equal parts that `train.accumulate` cuts it into.

    targets  the token that follows each input
    reset    where a document starts: nothing before it is remembered
    weight   of each token in the loss, with mean 1 over the whole batch; None is 1 for all
    """

    inputs: Int[Array, "b t"]
    targets: Int[Array, "b t"]
    reset: Bool[Array, "b t"]
    weight: Float[Array, "b t"] | None


Objective = Callable[..., tuple[Float[Array, ""], tuple[Float[Array, ""], PyTree]]]
"""A function with the arguments and results of `objective`."""


def objective(
    params: models.Model[Array],
    batch: Examples,
    carried: PyTree | None = None,
    *,
    model: ModelConfig,
    train: TrainConfig,
) -> tuple[Float[Array, ""], tuple[Float[Array, ""], PyTree]]:
    """Cross entropy of the next token, with the regularisers `train.l2wrap` and `train.z_loss`.

    Returns the loss to minimise, a mean over tokens, and then what is not differentiated: the cross
    entropy to report, in nats per token, and the recurrent `State` after the rows. `carried` is the
    state to start from where `train.carry_state` is set, else None.
    """
    hidden, after = hidden_states(params, batch, carried, model=model, train=train)
    with jax.named_scope("loss"):
        loss, parts = cross_entropy(
            hidden,
            params.head,
            batch.targets,
            weight=batch.weight,
            l2wrap=train.l2wrap,
            z_loss=train.z_loss,
        )
    return loss, (parts["cross_entropy"], after)


def hidden_states(
    params: models.Model[Array],
    batch: Examples,
    carried: PyTree | None = None,
    *,
    model: ModelConfig,
    train: TrainConfig,
) -> tuple[Float[Array, "b t c"], PyTree]:
    """What `params.head` maps to logits, and the recurrent state after the rows, computed with the
    type, rematerialisation and operators of `train`."""
    return models.backbone(
        params,
        batch.inputs,
        carried,
        cfg=model,
        reset=batch.reset,
        mesh_axis=sharding.time_axis(),
        dtype=jnp.dtype(train.dtype),
        remat=train.remat,
        implementation=implementation(train),
    )


def implementation(train: TrainConfig) -> str | None:
    """The operators' `implementation` that `train.wkv` names; None where it is chosen for them."""
    return None if train.wkv == "auto" else train.wkv
