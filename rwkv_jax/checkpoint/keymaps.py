"""Maps parameters to official checkpoints and back: names, transposes and shapes, all derived from
the parameter table; `_VERSIONS` tells the versions apart.

Official files are flat: `blocks.3.att.receptance.weight` -> array. Linear weights are [out, in]
there and [in, out] here; token-shift mixes are [1, 1, c] there and [c] here; layers are separate
there and stacked here. Numbers are neither computed nor rounded, so a round trip is exact.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rwkv_jax import models
from rwkv_jax.checkpoint.errors import WeightsError, shown
from rwkv_jax.checkpoint.files import (
    ArrayLike,
    Deferred,
    c_order,
    cast,
    copy_into,
    float_type,
)
from rwkv_jax.checkpoint.names import plain
from rwkv_jax.config import VERSION_SETTINGS, ConfigError, ModelConfig
from rwkv_jax.models import Model, specs
from rwkv_jax.params import ParamSpec, is_spec, path_name
from rwkv_jax.typing import Array, PyTree

_UNUSED = ("att.v0", "att.v1", "att.v2")
"""Version 7: layer 0 has no value to mix with, so most files leave these out there."""

LARGE = 64 << 20
"""A parameter of at least so many bytes is put on its device layer by layer."""

ALIGNMENT = 64
"""Bytes. Arrays of numpy that begin at a multiple are used by JAX on a CPU without a copy."""


class _Version(NamedTuple):
    """How a version's checkpoint is recognised and measured."""

    marks: tuple[str, ...]
    """Tensors of the first layer; no later entry of `_VERSIONS` has all of them."""
    sizes: Mapping[str, tuple[str, int]] = MappingProxyType({})
    """Settings of `ModelConfig`, or `heads`, each with the tensor of the last layer and its axis
    that has this size."""
    per_channel: bool = False
    """Whether the decay has an axis of channels."""


_SIZES_7 = {f"rank_{x}": (f"att.{x}1", 1) for x in "wavg"} | {"head_size": ("att.r_k", -1)}
_HEADS = {"heads": ("att.time_decay", 0)}
_VERSIONS = {
    "7a": _Version(("att.r_k", "ffn.s_emb.weight"), _SIZES_7 | {"rank_embed": ("ffn.s1", 1)}),
    "7": _Version(("att.r_k",), _SIZES_7),
    "6": _Version(
        ("att.time_maa_x",),
        {
            "head_size": ("att.time_faaaa", -1),
            "rank_mix": ("att.time_maa_w2", 1),
            "rank_w": ("att.time_decay_w1", 1),
        },
    ),
    "5.2": _Version(("att.ln_x.weight", "att.gate.weight"), _HEADS, per_channel=True),
    "5.1": _Version(("att.ln_x.weight", "att.gate.weight"), _HEADS),
    "5.0": _Version(("att.ln_x.weight",), _HEADS),
    "4": _Version(()),
}
"""In the order in which they are tried."""


def from_official(
    tensors: Mapping[str, ArrayLike], *, dtype: Any = None, sharding: Any = None
) -> tuple[Model[Array], ModelConfig]:
    """Parameters and their config from official names; every size is read from the shapes.

    Parameters keep the dtype they are stored in unless `dtype` is given. `sharding` is one
    `jax.sharding.Sharding` for all, or a `Model` of them; None is the default device. Tensors are
    read one after the other: besides the parameters the host holds about one at a time.

    Raises WeightsError for a tensor that is missing, unexpected, or of another shape or type, or
    has numbers too large for `dtype`.
    """
    dtype = None if dtype is None else jax.dtypes.canonicalize_dtype(float_type(dtype))
    tensors = plain(tensors)
    cfg = check(tensors)
    specs_by_path, tree = table(cfg), jax.tree.structure(specs(cfg), is_leaf=is_spec)
    sources = [_sources(tensors, name, spec, dtype) for name, spec in specs_by_path.items()]
    one = sharding is None or isinstance(sharding, jax.sharding.Sharding)
    if not one and not isinstance(sharding, Model):
        raise ValueError(
            "sharding must be a jax.sharding.Sharding or a Model of them, got"
            f" {type(sharding).__name__}: jax.sharding.NamedSharding(mesh, spec) makes one"
        )
    shardings = [sharding] * len(specs_by_path) if one else tree.flatten_up_to(sharding)
    for (name, spec), place in zip(specs_by_path.items(), shardings, strict=True):
        _check_divides(name, spec, place)
    return jax.tree.unflatten(tree, map(_placed, sources, specs_by_path.values(), shardings)), cfg


def unstacked_from_official(
    tensors: Mapping[str, ArrayLike], dtype_of: Callable[[ParamSpec], Any]
) -> tuple[Model[Array], ModelConfig]:
    """`from_official` with `blocks` as a tuple of layers and each parameter in a type of its own.

    Besides the parameters the host holds a few rows of one.
    """
    tensors = plain(tensors)
    cfg = check(tensors)
    paths = table(cfg)
    placed: dict[str, list[Array]] = {}
    for path, spec in paths.items():
        placed[path] = [
            jax.device_put(_copied(name, tensors.get(name), spec, dtype_of(spec)))
            for name in names_of(path, spec)
        ]
    tree = jax.tree.structure(specs(cfg), is_leaf=is_spec)
    lists = jax.tree.unflatten(tree, [placed[path] for path in paths])

    def pick(tree: PyTree, layer: int) -> PyTree:
        return jax.tree.map(itemgetter(layer), tree, is_leaf=lambda x: isinstance(x, list))

    whole = pick(replace(lists, blocks=None), 0)
    blocks = tuple(pick(lists.blocks, layer) for layer in range(cfg.layers))
    return replace(whole, blocks=blocks), cfg


def check(tensors: Mapping[str, ArrayLike]) -> ModelConfig:
    """The config of a complete official checkpoint. Raises WeightsError as `from_official` does,
    without reading a number."""
    tensors = plain(tensors)
    cfg = config_of(tensors)
    for problem, remedy in problems(tensors, cfg):
        raise WeightsError(problem + remedy)
    return cfg


def table(cfg: ModelConfig) -> dict[str, ParamSpec]:
    """The specs of all parameters by path, in the order of the tree's leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(specs(cfg), is_leaf=is_spec)
    return {path_name(path): spec for path, spec in leaves}


def _sources(
    tensors: Mapping[str, ArrayLike], path: str, spec: ParamSpec, dtype: Any
) -> list[ArrayLike]:
    """The tensors of a parameter, one for each layer, all of one type."""
    layers = {name: tensors.get(name) for name in names_of(path, spec)}
    kinds = {np.dtype(x.dtype) for x in layers.values() if x is not None} or {np.dtype("f4")}
    # float64 becomes float32 where JAX has it switched off, which would be a warning later.
    kind = dtype or jnp.result_type(*map(jax.dtypes.canonicalize_dtype, kinds))
    shape = official_shape(spec)
    zeros = Deferred(shape, kind, lambda: np.zeros(shape, kind))
    return [zeros if x is None else cast(name, x, kind) for name, x in layers.items()]


def problems(tensors: Mapping[str, ArrayLike], cfg: ModelConfig) -> Iterator[tuple[str, str]]:
    """Yields (problem, remedy) for each way in which `tensors` is not a complete checkpoint."""
    needed = expected(cfg)
    for name, shape in needed.items():
        if name not in tensors:
            if not optional(name):
                remedy = f": not a complete RWKV-{cfg.version} checkpoint; take the whole file"
                remedy += TIED if name == "head.weight" else ""
                yield f"{name} is missing", remedy
            continue
        array = tensors[name]
        if sizes(array) != [size for size in shape if size != 1]:
            problem = f"{name} has shape {list(array.shape)}, not {list(shape)}"
            yield problem, "; the file is damaged, or of another model"
        if not jnp.issubdtype(array.dtype, jnp.floating):
            problem = f"{name} has the type {np.dtype(array.dtype).name}"
            yield problem, "; only 16, 32 or 64 bit floating point can be read"
    for name in sorted(set(tensors) - set(needed)):
        problem = f"{shown(name)} is not a parameter of RWKV-{cfg.version}"
        yield problem, "; this release does not know such a model"


def sizes(array: ArrayLike) -> list[int]:
    """A shape without axes of length 1, in which files of one model may differ."""
    return [size for size in array.shape if size != 1]


def to_official(
    params: Model[Array], cfg: ModelConfig, *, dtype: Any = None
) -> dict[str, ArrayLike]:
    """The parameters under official names and in official shapes, in their own dtype or `dtype`;
    each is fetched from its device when numpy asks for it. Inverse of `from_official`.

    Version 7 includes layer 0's unused v0, v1 and v2, as the current official trainer writes them.
    Raises ValueError if the parameters are not those of `cfg`'s model.
    """
    dtype = None if dtype is None else float_type(dtype)
    check_params(params, cfg)
    cfg = models.as_tuned(cfg, params)
    tensors: dict[str, ArrayLike] = {}
    for (path, spec), value in zip(table(cfg).items(), jax.tree.leaves(params), strict=True):
        for layer, name in enumerate(names_of(path, spec)):
            tensor = _official(value, spec, layer if spec.layers else None)
            tensors[name] = tensor if dtype is None else cast(name, tensor, dtype)
    return tensors


def expected(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes of an official checkpoint of `cfg`'s model, including version 7's unused
    v0, v1 and v2 of layer 0."""
    return {
        name: official_shape(spec)
        for path, spec in table(cfg).items()
        for name in names_of(path, spec)
    }


def check_params(params: Model[Array], cfg: ModelConfig) -> None:
    """Raises ValueError unless these are parameters of `cfg`'s model, stacked and of floating
    type."""
    if isinstance(params.blocks, tuple):
        raise ValueError("params are a tuple of layers: give rwkv_jax.stack(params)")
    for x in jax.tree.leaves(params):
        float_type(x.dtype)
    models.check_params(params, cfg)


def in_order(tensors: Mapping[str, ArrayLike]) -> dict[str, ArrayLike]:
    """The tensors sorted from the embedding through the layers to the head, so that the same model
    makes the same file whatever it was read from."""

    def place(name: str) -> tuple[int, int, bool, bool, str]:
        part, *rest = name.split(".")
        parts = ("emb", "blocks", "ln_out", "head")
        layer = int(rest[0]) if part == "blocks" and rest and rest[0].isdigit() else 0
        # PyPI rwkv reads names in order and has to find out the version before it reads a decay.
        recurrent, mix = ".time_" in name, ".time_maa" in name
        return parts.index(part) if part in parts else len(parts), layer, recurrent, not mix, name

    return {name: tensors[name] for name in sorted(tensors, key=place)}


TIED = "; if its head is its embedding, set tie_word_embeddings = true in the folder's config.json"
"""The remedy for a model without a head that may be whole."""


def optional(name: str) -> bool:
    """Whether a checkpoint is complete without this tensor."""
    return name.removeprefix("blocks.0.") in _UNUSED


def official_shape(spec: ParamSpec) -> tuple[int, ...]:
    """The shape of one layer's tensor."""
    shape = spec.shape[::-1] if spec.layout == "linear" else spec.shape
    return (1, 1, *shape) if spec.layout == "row" else shape


def _ours(array: ArrayLike, spec: ParamSpec) -> np.ndarray:
    """One layer's tensor in our shape."""
    values = np.asarray(array)
    values = values.T if spec.layout == "linear" else values
    return values.reshape(spec.shape)


def _copied(name: str, array: ArrayLike | None, spec: ParamSpec, dtype: Any) -> np.ndarray:
    """One layer's tensor in our shape and in `dtype`; None is zeros.

    Copied some rows at a time into aligned memory, which JAX takes over on a CPU: a large tensor is
    never held twice, and pieces that are transposed fit the L2 cache.
    """
    dtype = np.dtype(dtype)
    size = math.prod(spec.shape) * dtype.itemsize
    memory = (np.zeros if array is None else np.empty)(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    values = memory[start : start + size].view(dtype).reshape(spec.shape)
    if array is not None:
        target = values.T if spec.layout == "linear" else values
        source = np.asarray(array).reshape(target.shape)
        step = max(1, (1 << 16) * len(target) // target.size)
        for row in range(0, len(target), step):
            rows = slice(row, row + step)
            target[rows] = np.asarray(cast(name, source[rows], dtype))
    return values


def _check_divides(name: str, spec: ParamSpec, sharding: Any) -> None:
    """Raises WeightsError for a sharding that a parameter does not divide over."""
    try:
        if sharding is not None:
            sharding.shard_shape(spec.full_shape)
    except ValueError:
        raise WeightsError(
            f"{name} of shape {list(spec.full_shape)} does not divide over the sharding {sharding};"
            " give a Model of shardings (rwkv_jax.sharding), or replicate it"
        ) from None


def _placed(sources: Sequence[ArrayLike], spec: ParamSpec, sharding: Any) -> Array:
    """The parameter, put on its devices; without a sharding on the default device, uncommitted, so
    that it can be used on any mesh."""
    kind = sources[0].dtype
    shape = spec.full_shape
    one_device = sharding is None or len(sharding.device_set) == 1
    if one_device and spec.layers and np.prod(shape) * np.dtype(kind).itemsize >= LARGE:
        value = jnp.zeros(shape, kind, device=sharding)
        for layer, source in enumerate(sources):
            values = c_order(_ours(source, spec))
            value = _set_layer(value, jax.device_put(values, sharding), layer)
        return value

    def part(index: Any) -> np.ndarray:
        if not spec.layers:
            return c_order(_ours(sources[0], spec)[index])
        layers = range(*index[0].indices(spec.layers))
        each = [_ours(sources[i], spec)[index[1:]] for i in layers]
        together = np.empty((len(each), *each[0].shape), kind)
        for layer, values in enumerate(each):
            copy_into(together[layer], values)
        return together

    if sharding is None:
        return jax.device_put(part((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, part)


@partial(jax.jit, donate_argnums=0)
def _set_layer(into: Array, layer: Array, index: Any) -> Array:
    return lax.dynamic_update_index_in_dim(into, layer, index, 0)


def _official(value: Array, spec: ParamSpec, layer: int | None) -> Deferred:
    """One layer's tensor in the official shape."""
    shape = official_shape(spec)

    def fetch() -> np.ndarray:
        whole = np.asarray(value) if is_on_host(value) else value
        values = np.asarray(whole if layer is None else whole[layer])
        return (values.T if spec.layout == "linear" else values).reshape(shape)

    return Deferred(shape, value.dtype, fetch)


def is_on_host(value: Array) -> bool:
    """Whether numpy sees all of an array without a copy."""
    return [device.platform for device in value.devices()] == ["cpu"]


def names_of(path: str, spec: ParamSpec) -> list[str]:
    """The official names of a parameter, one for each layer."""
    suffix = ".weight" if spec.layout in ("linear", "table") else ""
    if not spec.layers:
        home = "blocks.0." if path.startswith("ln0.") else ""
        return [home + path + suffix]
    rest = path.removeprefix("blocks.")
    return [f"blocks.{layer}.{rest}{suffix}" for layer in range(spec.layers)]


def config_of(tensors: Mapping[str, ArrayLike]) -> ModelConfig:
    """Version and sizes, from the names and shapes of an official checkpoint.

    Raises WeightsError if it is not a checkpoint of a version that this package knows.
    """
    for mark, model in _UNKNOWN.items():
        if mark in tensors:
            raise WeightsError(f"{mark}: {model}")
    if tensors and all(name.endswith(".att.time_state") for name in tensors):
        raise WeightsError(
            "holds tuned states and no model; give it with --state, beside its model"
        )
    if "emb.weight" not in tensors or "blocks.0.att.key.weight" not in tensors:
        raise WeightsError(
            "emb.weight or blocks.0.att.key.weight is missing: not an RWKV checkpoint; give an"
            " official one, or a folder of Hugging Face's"
        )
    try:
        return _config(tensors)
    except (KeyError, ConfigError, WeightsError) as error:
        ours = isinstance(error, ConfigError | WeightsError)
        problem = error if ours else f"{shown(error)} is missing"
        raise WeightsError(
            f"not a complete RWKV checkpoint: {problem}; take the whole file"
        ) from error


_UNKNOWN = {
    "blocks.0.rosa.x_q": "an RWKV-8 ROSA model; this release reads versions 4 to 7a",
    "blocks.0.qkv.k_emb.weight": "an RWKV-7b model; this release reads versions 4 to 7a",
    "blocks.0.qkv.kkup.weight": "an RWKV-8 preview; this release reads versions 4 to 7a",
    "blocks.0.ffn.enn.weight": "an RWKV-8 preview; this release reads versions 4 to 7a",
    "blocks.0.att.time_maa_rkvw_w1": "an RWKV-6b or 6c experiment; take a version 6 (x060) model",
    "blocks.0.att.gate_w1": "an RWKV-6a experiment; take a version 6 (x060) model",
    "blocks.0.att.tiny_q.weight": "an RWKV-4a model; take a version 4 one",
}
"""Tensors that only models of unknown versions have."""


def _layers(names: Iterable[str]) -> int:
    """The number of layers named. Raises WeightsError if one is named but not all before it."""
    numbers: dict[int, str] = {}
    for name in names:
        if match := re.match(r"blocks\.(0|[1-9][0-9]{0,8})\.", name):
            numbers.setdefault(int(match[1]), name)
    gap = next(layer for layer in range(len(numbers) + 1) if layer not in numbers)
    if beyond := [layer for layer in numbers if layer > gap]:
        after = min(beyond)
        missing = f"layer {gap} is" if after == gap + 1 else f"layers {gap} to {after - 1} are"
        raise WeightsError(f"{shown(numbers[after])} exists, but {missing} missing")
    return gap


def _config(tensors: Mapping[str, ArrayLike]) -> ModelConfig:
    def size(name: str, axis: int, axes: int = 0) -> int:
        """Of a tensor with exactly so many axes, if given."""
        shape = tensors[name].shape
        if not -len(shape) <= axis < len(shape) or (axes and len(shape) != axes) or not shape[axis]:
            raise WeightsError(f"{name} has the impossible shape {list(shape)}")
        return shape[axis]

    def first(name: str) -> bool:
        return f"blocks.0.{name}" in tensors

    def fits(version: _Version) -> bool:
        decay = f"{last}att.time_decay"
        return all(map(first, version.marks)) and (
            not version.per_channel or any(n > 1 for n in tensors[decay].shape[1:])
        )

    vocab, width = (size("emb.weight", axis, 2) for axis in (0, 1))
    layers = _layers(tensors)
    last = f"blocks.{layers - 1}."  # layer 0 may lack version 7's v0, v1, v2
    found: dict[str, Any] = {"layers": layers, "width": width, "vocab_size": vocab}
    found["ln0"] = first("ln0.weight") or first("ln0.bias")
    found["ffn_width"] = size("blocks.0.ffn.key.weight", 0)
    found["version"] = next(name for name, version in _VERSIONS.items() if fits(version))
    version = _VERSIONS[found["version"]]
    for setting, (name, axis) in version.sizes.items():
        missing = optional(last + name) and last + name not in tensors
        found[setting] = 0 if missing else size(last + name, axis)
    tunable = "state_tuned" in VERSION_SETTINGS[found["version"]].optional
    found["state_tuned"] = tunable and first("att.time_state")
    if "heads" in found:
        found["head_size"] = width // found.pop("heads")
    return ModelConfig(**found)
