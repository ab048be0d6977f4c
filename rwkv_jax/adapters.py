"""Adapters: small changes of a model, made, used, merged, and in files.

    init            a new one, to train
    on              parameters with an adapter, differentiable
    merge           the change added to the parameters for good
    load, save      folders of Hugging Face's `peft`, `.pth` of RWKV-PEFT, runs (docs/tuning.md)

An adapter is a value, `Adapter`: see `rwkv_jax.tuning`.
"""

from collections.abc import Sequence

from rwkv_jax import tuning
from rwkv_jax.checkpoint.adapters import AdapterInfo, load, save
from rwkv_jax.config import ModelConfig, TuneConfig
from rwkv_jax.errors import UserError
from rwkv_jax.models import Model
from rwkv_jax.tuning import Adapter, merge, on
from rwkv_jax.typing import Array, PRNGKeyArray

__all__ = ("Adapter", "AdapterInfo", "init", "load", "merge", "on", "save")


def init(
    cfg: ModelConfig,
    key: PRNGKeyArray,
    rank: int = 16,
    alpha: float = 32.0,
    targets: Sequence[str] = ("att", "ffn"),
    layers: str = "",
    rslora: bool = False,
    also: Sequence[str] = (),
    params: Model[Array] | None = None,
) -> Adapter[Array]:
    """An adapter that changes nothing yet, float32; the arguments are those of `[tune]` in a run's
    config, and `params` the model's, which `also` starts from.

    Raises UserError for a target or layers that are not in the model, and without `params`.
    """
    tune = TuneConfig(
        method="lora",
        targets=list(targets),
        layers=layers,
        rank=rank,
        alpha=alpha,
        rslora=rslora,
        also=list(also),
    )
    try:
        return tuning.init(cfg, key, tune, params)
    except ValueError as error:
        raise UserError(str(error).replace("tune.", "")) from None
