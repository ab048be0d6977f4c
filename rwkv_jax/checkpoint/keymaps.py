"""Between our trees and official checkpoints: names, transposes and shapes, read off the spec
table.

Official files are flat: `blocks.3.att.receptance.weight` -> array. Linear weights are [out, in]
there and [in, out] here; shift mixes are [1, 1, c] there and [c] here; layers are separate there
and stacked here. Numbers are neither computed nor rounded, so both ways lead back.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rwkv_jax.checkpoint.errors import WeightsError, shown
from rwkv_jax.checkpoint.files import ArrayLike, Deferred, cast, float_type
from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.models import Model, specs
from rwkv_jax.params import ParamSpec, is_spec, path_name
from rwkv_jax.typing import Array

_UNUSED = ("v0", "v1", "v2")
"""Version 7: layer 0 has no value to mix with, so most files leave these out there."""

LARGE = 64 << 20
"""Bytes from which on a parameter is put on the device layer by layer."""


def from_official(
    tensors: Mapping[str, ArrayLike], *, dtype: Any = None, sharding: Any = None
) -> tuple[Model[Array], ModelConfig]:
    """Parameters and their config from official names; every size is read from the shapes.

    They keep the dtype they are stored in unless `dtype` is given. `sharding` is where they go: one
    `jax.sharding.Sharding` for all, or a `Model` of them; None is the default device. Tensors are
    read one after the other, so the host holds about one at a time besides what its devices do.

    Raises `WeightsError` for a tensor that is missing, unexpected, or of another shape or type, or
    has numbers too large for `dtype`.
    """
    dtype = None if dtype is None else jax.dtypes.canonicalize_dtype(float_type(dtype))
    tensors = plain(tensors)
    cfg = config_of(tensors)
    table = specs(cfg)
    found = _find(tensors, cfg, dtype)
    # All is checked before the first tensor is read.
    leaves, tree = jax.tree.flatten(table, is_leaf=is_spec)
    sources = tree.flatten_up_to(found)
    one = sharding is None or isinstance(sharding, jax.sharding.Sharding)
    places = [sharding] * len(leaves) if one else tree.flatten_up_to(sharding)
    arrays = [
        _placed(source, spec, place)
        for source, spec, place in zip(sources, leaves, places, strict=True)
    ]
    return jax.tree.unflatten(tree, arrays), cfg


def plain(tensors: Mapping[str, ArrayLike]) -> dict[str, ArrayLike]:
    """The tensors without what DeepSpeed puts in front of their names."""
    return {name.removeprefix("_forward_module."): x for name, x in tensors.items()}


def check(tensors: Mapping[str, ArrayLike]) -> ModelConfig:
    """The config of a whole official checkpoint. Raises `WeightsError` as `from_official` does,
    without looking at a number."""
    tensors = plain(tensors)
    cfg = config_of(tensors)
    _find(tensors, cfg)
    return cfg


def _find(
    tensors: Mapping[str, ArrayLike], cfg: ModelConfig, dtype: Any = None
) -> Model[list[ArrayLike]]:
    """Each parameter's tensors, one a layer and of one type; all are there, none is left over."""
    for fault, more in faults(tensors, cfg):
        raise WeightsError(fault + more)

    def find(path: tuple, spec: ParamSpec) -> list[ArrayLike]:
        layers = {name: tensors.get(name) for name in _names(path_name(path), spec)}
        kinds = {np.dtype(x.dtype) for x in layers.values() if x is not None} or {np.dtype("f4")}
        # What JAX has for each: it warns of float64, unless that is switched on.
        kind = dtype or jnp.result_type(*map(jax.dtypes.canonicalize_dtype, kinds))
        return [
            _zeros(spec, kind) if x is None else cast(name, x, kind) for name, x in layers.items()
        ]

    return jax.tree_util.tree_map_with_path(find, specs(cfg), is_leaf=is_spec)


def faults(tensors: Mapping[str, ArrayLike], cfg: ModelConfig) -> Iterator[tuple[str, str]]:
    """What keeps tensors from being a whole checkpoint of `cfg`'s model; of each, what goes on with
    the remedy."""
    needed = expected(cfg)
    for name, shape in needed.items():
        if name not in tensors:
            if not optional(name):
                more = f": not a whole RWKV-{cfg.version} checkpoint; take the whole file"
                yield f"{name} is missing", more
            continue
        array = tensors[name]
        if sizes(array) != [size for size in shape if size != 1]:
            told = f"{name} has shape {list(array.shape)}, not {list(shape)}"
            yield told, "; the file is damaged, or of another model"
        if not jnp.issubdtype(array.dtype, jnp.floating):
            kind = np.dtype(array.dtype).name
            yield (
                f"{name} is of {kind}",
                "; only weights of 16, 32 or 64 bit floating point can be read",
            )
    for name in sorted(set(tensors) - set(needed)):
        told = f"{shown(name)} is no parameter of RWKV-{cfg.version}"
        yield told, "; this release does not know such a model"


def sizes(array: ArrayLike) -> list[int]:
    """A shape without its ones, in which files of one model may differ."""
    return [size for size in array.shape if size != 1]


def to_official(
    params: Model[Array], cfg: ModelConfig, *, dtype: Any = None
) -> dict[str, ArrayLike]:
    """The parameters under official names and in official shapes, in their own dtype or `dtype`;
    each is fetched when numpy asks for it. Inverse of `from_official`.

    Version 7 gets layer 0's unused v0, v1 and v2, as the current official trainer writes them.
    Raises `ValueError` if the parameters are not those of `cfg`'s model.
    """
    dtype = None if dtype is None else float_type(dtype)
    check_params(params, cfg)
    tensors: dict[str, ArrayLike] = {}

    def put(path: tuple, spec: ParamSpec, value: Array) -> None:
        for layer, name in enumerate(_names(path_name(path), spec)):
            tensor = _official(value, spec, layer if spec.layers else None)
            tensors[name] = tensor if dtype is None else cast(name, tensor, dtype)

    jax.tree_util.tree_map_with_path(put, specs(cfg), params, is_leaf=is_spec)
    return tensors


def expected(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes of an official checkpoint of `cfg`'s model, with version 7's unused v0,
    v1 and v2 of layer 0."""
    leaves = jax.tree_util.tree_leaves_with_path(specs(cfg), is_leaf=is_spec)
    return {
        name: _official_shape(spec)
        for path, spec in leaves
        for name in _names(path_name(path), spec)
    }


def check_params(params: Model[Array], cfg: ModelConfig) -> None:
    """Raises `ValueError` unless these are parameters of `cfg`'s model, stacked and of floating
    type."""
    if isinstance(params.blocks, tuple):
        raise ValueError("params are a tuple of layers: give rwkv_jax.stack(params)")
    found = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    table = jax.tree_util.tree_leaves_with_path(specs(cfg), is_leaf=is_spec)
    shapes = {path_name(path): spec.full_shape for path, spec in table}
    for name in sorted(shapes.keys() | found.keys()):
        have, want = (
            list(x) if x is not None else "missing"
            for x in (found[name].shape if name in found else None, shapes.get(name))
        )
        if have != want:
            raise ValueError(
                f"params.{name} is {have}, and in a model of cfg (RWKV-{cfg.version}, {cfg.layers}"
                f" layers, width {cfg.width}) {want}: give the cfg that params were made with"
            )
        float_type(found[name].dtype)


def in_order(tensors: Mapping[str, ArrayLike]) -> dict[str, ArrayLike]:
    """The tensors from the embedding through the layers to the head, wherever they came from, so
    that the same model makes the same file."""

    def place(name: str) -> tuple[int, int, bool, bool, str]:
        part, *rest = name.split(".")
        parts = ("emb", "blocks", "ln_out", "head")
        layer = int(rest[0]) if part == "blocks" and rest and rest[0].isdigit() else 0
        # PyPI rwkv reads names in order, and wants to know a version before its decays.
        recurrent, mix = ".time_" in name, ".time_maa" in name
        return parts.index(part) if part in parts else len(parts), layer, recurrent, not mix, name

    return {name: tensors[name] for name in sorted(tensors, key=place)}


def optional(name: str) -> bool:
    """Whether a checkpoint is whole without this tensor."""
    return name.startswith("blocks.0.att.") and name.endswith(_UNUSED)


def _official_shape(spec: ParamSpec) -> tuple[int, ...]:
    """Of one layer's tensor."""
    shape = spec.shape[::-1] if spec.layout == "linear" else spec.shape
    return (1, 1, *shape) if spec.layout == "row" else shape


def _zeros(spec: ParamSpec, dtype: Any) -> ArrayLike:
    shape = _official_shape(spec)
    return Deferred(shape, np.dtype(dtype), lambda: np.zeros(shape, dtype))


def _ours(array: ArrayLike, spec: ParamSpec) -> np.ndarray:
    """One layer's tensor as we have it."""
    values = np.asarray(array)
    values = values.T if spec.layout == "linear" else values
    return values.reshape(spec.shape)


def _placed(sources: Sequence[ArrayLike], spec: ParamSpec, sharding: Any) -> Array:
    """The parameter on its device or devices."""
    kind = sources[0].dtype
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shape = spec.full_shape
    one_device = len(sharding.device_set) == 1
    if one_device and spec.layers and np.prod(shape) * np.dtype(kind).itemsize >= LARGE:
        value = jnp.zeros(shape, kind, device=sharding)
        for layer, source in enumerate(sources):
            value = _set_layer(value, jax.device_put(_ours(source, spec), sharding), layer)
        return value

    def part(index: Any) -> np.ndarray:
        if not spec.layers:
            return np.ascontiguousarray(_ours(sources[0], spec)[index])
        layers = range(*index[0].indices(spec.layers))
        return np.stack([_ours(sources[i], spec)[index[1:]] for i in layers])

    return jax.make_array_from_callback(shape, sharding, part)


@partial(jax.jit, donate_argnums=0)
def _set_layer(into: Array, layer: Array, index: Any) -> Array:
    return lax.dynamic_update_index_in_dim(into, layer, index, 0)


def _official(value: Array, spec: ParamSpec, layer: int | None) -> Deferred:
    """One layer's tensor as official files have it."""
    shape = _official_shape(spec)

    def fetch() -> np.ndarray:
        values = np.asarray(value if layer is None else value[layer])
        return (values.T if spec.layout == "linear" else values).reshape(shape)

    return Deferred(shape, value.dtype, fetch)


def _names(path: str, spec: ParamSpec) -> list[str]:
    """Official names of a parameter, one a layer."""
    suffix = ".weight" if spec.layout in ("linear", "table") else ""
    if not spec.layers:
        home = "blocks.0." if path.startswith("ln0.") else ""
        return [home + path + suffix]
    rest = path.removeprefix("blocks.")
    return [f"blocks.{layer}.{rest}{suffix}" for layer in range(spec.layers)]


def config_of(tensors: Mapping[str, ArrayLike]) -> ModelConfig:
    """Version and sizes, from the names and shapes of an official checkpoint.

    Raises `WeightsError` if it is no checkpoint of a version that this package knows.
    """
    for sign, what in _OTHERS.items():
        if sign in tensors:
            raise WeightsError(f"{sign}: {what}")
    if tensors and all(name.endswith(".att.time_state") for name in tensors):
        raise WeightsError(
            "holds tuned states and no model; give it with --state, beside its model"
        )
    if "emb.weight" not in tensors or "blocks.0.att.key.weight" not in tensors:
        raise WeightsError(
            "emb.weight or blocks.0.att.key.weight is missing: no RWKV checkpoint; give an official"
            " one, or a folder of Hugging Face's"
        )
    try:
        return _config(tensors)
    except (KeyError, ConfigError, WeightsError) as error:
        ours = isinstance(error, ConfigError | WeightsError)
        told = error if ours else f"{shown(error)} is missing"
        raise WeightsError(f"no whole RWKV checkpoint: {told}; take the whole file") from error


_OTHERS = {
    "blocks.0.rosa.x_q": "an RWKV-8 ROSA model; this release reads versions 4 to 7a",
    "blocks.0.qkv.k_emb.weight": "an RWKV-7b model; this release reads versions 4 to 7a",
    "blocks.0.qkv.kkup.weight": "an RWKV-8 preview; this release reads versions 4 to 7a",
    "blocks.0.ffn.enn.weight": "an RWKV-8 preview; this release reads versions 4 to 7a",
    "blocks.0.att.time_maa_rkvw_w1": "an RWKV-6b or 6c experiment; take a version 6 (x060) model",
    "blocks.0.att.gate_w1": "an RWKV-6a experiment; take a version 6 (x060) model",
    "blocks.0.att.tiny_q.weight": "an RWKV-4a model; take a version 4 one",
}
"""Tensors that only models of other kinds have."""


def _layers(names: Iterable[str]) -> int:
    """How many the names speak of; one without those before it is a `WeightsError`."""
    numbers: dict[int, str] = {}
    for name in names:
        if match := re.match(r"blocks\.(0|[1-9][0-9]{0,8})\.", name):
            numbers.setdefault(int(match[1]), name)
    gap = next(layer for layer in range(len(numbers) + 1) if layer not in numbers)
    if beyond := [layer for layer in numbers if layer > gap]:
        after = min(beyond)
        told = f"layer {gap} is" if after == gap + 1 else f"layers {gap} to {after - 1} are"
        raise WeightsError(f"{shown(numbers[after])} is there, and {told} missing")
    return gap


def _config(tensors: Mapping[str, ArrayLike]) -> ModelConfig:
    def size(name: str, axis: int, axes: int = 0) -> int:
        """Of a tensor that has so many axes, or enough."""
        shape = tensors[name].shape
        if len(shape) <= axis or (axes and len(shape) != axes) or not shape[axis]:
            raise WeightsError(f"{name} has shape {list(shape)}, which cannot be")
        return shape[axis]

    vocab, width = (size("emb.weight", axis, 2) for axis in (0, 1))
    layers = _layers(tensors)
    ffn = size("blocks.0.ffn.key.weight", 0)
    sizes: dict = {"layers": layers, "width": width, "vocab_size": vocab, "ffn_width": ffn}
    last = f"blocks.{layers - 1}.att."  # layer 0 may lack version 7's v0, v1, v2

    def has(name: str) -> bool:
        return f"blocks.0.{name}" in tensors

    if has("att.r_k"):
        sizes |= {f"rank_{x}": size(f"{last}{x}1", 1) for x in "wag"}
        # A model of one layer has no use for these, and mostly doesn't have them.
        sizes["rank_v"] = size(f"{last}v1", 1) if layers > 1 or f"{last}v1" in tensors else 0
        sizes["head_size"] = size(f"{last}r_k", 1)
        if has("ffn.s_emb.weight"):
            rank = size("blocks.0.ffn.s1", 1)
            return ModelConfig(version="7a", rank_embed=rank, **sizes)
        return ModelConfig(version="7", **sizes)
    if has("att.time_maa_x"):
        sizes["head_size"] = size(f"{last}time_faaaa", 1)
        sizes["rank_mix"] = size(f"{last}time_maa_w2", 1)
        sizes["rank_w"] = size(f"{last}time_decay_w1", 1)
        return ModelConfig(version="6", state_tuned=has("att.time_state"), **sizes)
    if has("att.ln_x.weight"):
        heads = size(f"{last}time_decay", 0)
        by_channel = tensors[f"{last}time_decay"].shape[1:] > (1,)
        version = "5.0" if not has("att.gate.weight") else "5.2" if by_channel else "5.1"
        return ModelConfig(version=version, head_size=width // heads, **sizes)
    return ModelConfig(version="4", **sizes)
