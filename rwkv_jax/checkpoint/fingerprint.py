"""One fingerprint of weights, by which files made with a model (states, caches) name it.

It is the same for a model's .pth, folder, run and parameters, and in float32 and bfloat16: SHA-256
of every official tensor's name, sizes and a sample of its numbers, rounded to bfloat16. Numbers
below the smallest normal one of float16 count as 0, so a bfloat16 model and its float16 copy are
the same too. (A float32 model and its float16 copy are not: rounded twice, some numbers differ.)

The sample is a few runs of neighbours: a change of the whole model, or of a whole tensor, is seen;
one of a few numbers need not be. The first layer's tensors that version 7 does not use are left
out.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from rwkv_jax.checkpoint.files import ArrayLike
from rwkv_jax.checkpoint.keymaps import (
    check,
    is_on_host,
    names_of,
    official_shape,
    optional,
    table,
)
from rwkv_jax.config import ModelConfig
from rwkv_jax.models import Model, as_tuned, check_params
from rwkv_jax.params import ParamSpec
from rwkv_jax.typing import Array

RUNS, LENGTH = 8, 32
"""Of each tensor so many runs of so many numbers are read, evenly spaced."""

SMALLEST = 2.0**-14


def fingerprint(params: Model[Array], cfg: ModelConfig) -> str:
    """Of parameters, in either layout: 16 hexadecimal digits.

    Raises ValueError if they are not of `cfg`'s model.
    """
    check_params(params, cfg)
    cfg = as_tuned(cfg, params)
    names, places = [], []
    for path, spec in table(cfg).items():
        index = _sample(official_shape(spec))
        index = index[::-1] if spec.layout == "linear" else index[-len(spec.shape) :]
        names.append((names_of(path, spec), official_shape(spec)))
        places.append(_places(params, path, spec, index))
    digest = hashlib.sha256()
    for (each, shape), samples in zip(names, _picked(places), strict=True):
        for name, values in zip(each, samples, strict=True):
            _add(digest, name, shape, values)
    return digest.hexdigest()[:16]


def fingerprint_of(tensors: Mapping[str, ArrayLike]) -> str:
    """Of a whole model's tensors in official names; of files, only what is sampled is read.

    Raises WeightsError if they are not a whole model.
    """
    digest = hashlib.sha256()
    for path, spec in table(check(tensors)).items():
        for name in names_of(path, spec):
            if name in tensors:
                x = tensors[name]
                _add(digest, name, x.shape, np.asarray(x)[_sample(x.shape)])
    return digest.hexdigest()[:16]


def _places(
    params: Model[Array], path: str, spec: ParamSpec, index: tuple[np.ndarray, ...]
) -> list[tuple[Array, tuple[np.ndarray, ...]]]:
    """Where the sample of a parameter is: arrays, each with an index [layers, numbers]."""
    home, *rest = path.split(".")
    found = getattr(params, home)
    homes = found if isinstance(found, tuple) else (found,)
    for part in rest:
        homes = [getattr(x, part) for x in homes]
    if spec.layers and not isinstance(found, tuple):
        index = (np.arange(spec.layers)[:, None], *index)
    else:
        index = tuple(x[None] for x in index)
    return [(jnp.asarray(x), index) for x in homes]


def _picked(
    places: list[list[tuple[Array, tuple[np.ndarray, ...]]]],
) -> Iterator[np.ndarray]:
    """The numbers at the places of each parameter. One accelerator picks them all in one program,
    and they alone leave it."""
    (first, _), *_ = places[0]
    if len(first.devices()) == 1 and not is_on_host(first):
        found = jax.device_get(_gather(places))
    else:
        found = ([np.asarray(x)[index] for x, index in each] for each in places)
    return map(np.concatenate, found)


@jax.jit
def _gather(places: Any) -> Any:
    return [[x[index] for x, index in each] for each in places]


def _sample(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """The index of the numbers that are read of an array, in its order."""
    count = math.prod(shape)
    if count <= RUNS * LENGTH:
        places = np.arange(count)
    else:
        starts = np.linspace(0, count - LENGTH, RUNS).astype(np.int64)
        places = (starts[:, None] + np.arange(LENGTH)).ravel()
    return np.unravel_index(places, shape)


def _add(digest: Any, name: str, shape: tuple[int, ...], values: np.ndarray) -> None:
    if optional(name):
        return
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
        rounded[np.abs(rounded) < SMALLEST] = 0.0
    rounded[np.isnan(rounded)] = np.nan
    kept = [size for size in shape if size != 1]
    digest.update(f"{name} {kept}\n".encode() + rounded.astype("<f4").tobytes())
