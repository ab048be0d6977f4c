"""Between our trees and official checkpoints: names, transposes and shapes, read off the spec
table.

Official files are flat: `blocks.3.att.receptance.weight` -> array. Linear weights are [out, in]
there and [in, out] here; shift mixes are [1, 1, c] there and [c] here; layers are separate there
and stacked here.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax.config import ModelConfig
from rwkv_jax.errors import UserError
from rwkv_jax.models import Model, specs
from rwkv_jax.params import ParamSpec, is_spec, path_name

_UNUSED = ("v0", "v1", "v2")
"""Version 7: layer 0 has no value to mix with, so most files leave these out there."""


def from_official(tensors: Mapping[str, np.ndarray]) -> tuple[Model, ModelConfig]:
    """Float32 parameters and their config from official names; every size is read from the shapes.

    Raises `UserError` for a tensor that is missing, unexpected or of another shape.
    """
    tensors = {name.removeprefix("_forward_module."): x for name, x in tensors.items()}
    cfg = config_of(tensors)
    table = specs(cfg)
    used: set[str] = set()

    def fetch(path: tuple, spec: ParamSpec) -> jax.Array:
        layers = []
        for name in _names(path_name(path), spec):
            if name not in tensors and name.startswith("blocks.0.") and name.endswith(_UNUSED):
                layers.append(np.zeros(spec.shape, np.float32))
                continue
            if name not in tensors:
                raise UserError(f"{name} is missing: not a whole RWKV-{cfg.version} checkpoint")
            used.add(name)
            array = np.asarray(tensors[name]).astype(np.float32)
            array = array.T if spec.layout == "linear" else array
            if array.size != np.prod(spec.shape) or array.squeeze().shape != _squeezed(spec):
                raise UserError(f"{name} has shape {list(array.shape)}, not {list(spec.shape)}")
            layers.append(array.reshape(spec.shape))
        return jnp.asarray(np.stack(layers) if spec.layers else layers[0])

    params = jax.tree_util.tree_map_with_path(fetch, table, is_leaf=is_spec)
    extra = sorted(set(tensors) - used)
    if extra:
        raise UserError(f"{extra[0]} is no parameter of RWKV-{cfg.version}")
    return params, cfg


def to_official(params: Model, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Float32 arrays under official names and shapes. Inverse of `from_official`."""
    tensors: dict[str, np.ndarray] = {}

    def put(path: tuple, spec: ParamSpec, value: jax.Array) -> None:
        array = np.asarray(value, np.float32)
        layers = array if spec.layers else array[None]
        for name, layer in zip(_names(path_name(path), spec), layers, strict=True):
            layer = layer.T if spec.layout == "linear" else layer
            tensors[name] = layer.reshape(1, 1, -1) if spec.layout == "row" else layer

    jax.tree_util.tree_map_with_path(put, specs(cfg), params, is_leaf=is_spec)
    return tensors


def _squeezed(spec: ParamSpec) -> tuple[int, ...]:
    return tuple(size for size in spec.shape if size != 1)


def _names(path: str, spec: ParamSpec) -> list[str]:
    """Official names of a parameter, one a layer."""
    suffix = ".weight" if spec.layout in ("linear", "table") else ""
    if not spec.layers:
        home = "blocks.0." if path.startswith("ln0.") else ""
        return [home + path + suffix]
    rest = path.removeprefix("blocks.")
    return [f"blocks.{layer}.{rest}{suffix}" for layer in range(spec.layers)]


def config_of(tensors: Mapping[str, np.ndarray]) -> ModelConfig:
    """Version and sizes, from the names and shapes of an official checkpoint.

    Raises `UserError` if it is no checkpoint of a version that this package knows.
    """
    if "emb.weight" not in tensors or "blocks.0.att.key.weight" not in tensors:
        raise UserError("emb.weight or blocks.0.att.key.weight is missing: not an RWKV checkpoint")
    vocab, width = tensors["emb.weight"].shape
    layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    ffn = tensors["blocks.0.ffn.key.weight"].shape[0]
    sizes = {"layers": layers, "width": width, "vocab_size": vocab, "ffn_width": ffn}
    if "blocks.0.att.r_k" in tensors:
        last = f"blocks.{layers - 1}.att."
        ranks = {f"rank_{x}": tensors[f"{last}{x}1"].shape[1] for x in "wag"}
        rank_v = tensors[f"{last}v1"].shape[1] if f"{last}v1" in tensors else 0
        head_size = tensors["blocks.0.att.r_k"].shape[1]
        return ModelConfig(version="7", head_size=head_size, rank_v=rank_v, **ranks, **sizes)
    if "blocks.0.att.ln_x.weight" in tensors:
        raise UserError("the checkpoint is of version 5 or 6: this release reads versions 4 and 7")
    return ModelConfig(version="4", **sizes)
