"""Adapters merged into a model's tensors, one at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rwkv_jax import tuning
from rwkv_jax.checkpoint.errors import WeightsError
from rwkv_jax.checkpoint.files import ArrayLike, Deferred, cast, float_type
from rwkv_jax.checkpoint.keymaps import names_of, table
from rwkv_jax.config import ModelConfig
from rwkv_jax.params import ParamSpec
from rwkv_jax.tuning import STATE, Adapter, Dora
from rwkv_jax.typing import Array

Measure = Callable[[str, np.ndarray, np.ndarray, np.ndarray], None]
"""(official name, the model's numbers, those with the change, and these as stored), float32."""


def merged(
    tensors: Mapping[str, ArrayLike],
    cfg: ModelConfig,
    adapters: Sequence[tuple[Adapter[Array], float]],
    dtype: Any = None,
    measure: Measure = lambda *_: None,
) -> dict[str, ArrayLike]:
    """A model's tensors in official names with the sum of what each adapter, times its weight,
    changes in them. A changed tensor is computed in float32 when it is used, one at a time, and
    rounded once: to its own type, or to `dtype`, which all layers of its parameter then have.

    Raises WeightsError for a state that no file of the model can hold.
    """
    found = dict(tensors)
    known = table(cfg)
    for path, spec in known.items():
        if not any(path in x.low_rank or path in x.whole for x, _ in adapters):
            continue
        for layer, name in enumerate(names_of(path, spec)):
            if name in tensors:
                place = path, spec, layer if spec.layers else None
                found[name] = _merged_tensor(name, tensors[name], place, adapters, dtype, measure)
    for adapter, weight in adapters:
        if adapter.state is not None:
            if cfg.version != "6" or len(adapters) > 1:
                raise WeightsError(
                    "an adapter with a state: only a model of version 6 can hold one, of one"
                    " adapter; save the state by itself and give it with --state"
                )
            for layer, x in enumerate(np.asarray(adapter.state) * np.float32(weight)):
                found[STATE.replace("blocks.", f"blocks.{layer}.")] = x
    return found


def _merged_tensor(
    name: str,
    tensor: ArrayLike,
    place: tuple[str, ParamSpec, int | None],
    adapters: Sequence[tuple[Adapter[Array], float]],
    dtype: Any,
    measure: Measure,
) -> ArrayLike:
    path, spec, layer = place
    kind = np.dtype(tensor.dtype) if dtype is None else float_type(dtype)

    def here(x: Array) -> np.ndarray:
        return np.asarray(x if layer is None else x[layer]).astype(np.float32)

    def make() -> np.ndarray:
        before = np.asarray(tensor).astype(np.float32)
        after = before.copy()
        for adapter, weight in adapters:
            if (change := adapter.low_rank.get(path)) is not None:
                if isinstance(change, Dora):
                    change = replace(change, magnitude=here(change.magnitude))
                product = here(change.down) @ here(change.up)
                after += tuning.difference(change, before.T, product, weight).T
            if (value := adapter.whole.get(path)) is not None:
                value = here(value).T if spec.layout == "linear" else here(value)
                if len(adapters) == 1 and weight == 1.0:
                    after = value.reshape(before.shape)  # to the bit
                else:
                    after += weight * (value.reshape(before.shape) - before)
        rounded = np.asarray(cast(name, after, kind))
        measure(name, before, after, rounded.astype(np.float32))
        return rounded

    return Deferred(tensor.shape, kind, make)
