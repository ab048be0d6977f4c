"""Adapters in files: loaded for a model, and saved.

Loaded: what `adapter_files.py` reads, and runs of ours that have trained an adapter, or one of
their checkpoints. Saved: a `peft` folder, in the names of `rwkv7-hf` for version 7 and in official
ones for others.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from rwkv_jax import tuning
from rwkv_jax.checkpoint import huggingface, store
from rwkv_jax.checkpoint.adapter_files import (
    CONFIG,
    FILES,
    PART,
    PREFIX,
    Part,
    Stored,
    as_float32,
    layer_of,
    peft_folder,
    rank_of,
    read,
)
from rwkv_jax.checkpoint.errors import WeightsError, shown
from rwkv_jax.checkpoint.files import ArrayLike, json_text, naming, new_folder, replacing
from rwkv_jax.checkpoint.keymaps import names_of, official_shape, optional, sizes, table
from rwkv_jax.checkpoint.safetensors import write_safetensors
from rwkv_jax.checkpoint.shards import PTH, SAFETENSORS, read_model
from rwkv_jax.config import ModelConfig
from rwkv_jax.nn import LowRank
from rwkv_jax.params import ParamSpec
from rwkv_jax.tuning import STATE, Adapter, Dora
from rwkv_jax.typing import Array


@dataclass(frozen=True)
class AdapterInfo:
    """What the file of an adapter says of it."""

    path: Path
    method: str
    """`lora`, `rslora`, `dora`, `miss`, `pissa`; `whole` if there are whole tensors alone."""
    rank: int
    """The largest; 0 without low-rank changes."""
    alpha: float | None
    """None if the file does not say it, or the method has none."""
    targets: tuple[str, ...]
    """The matrices that are changed, and the parameters that are replaced: `att.key`."""
    layers: tuple[int, ...]
    """Those whose matrices are changed."""
    numbers: int
    base: str
    """The fingerprint of the weights that it was trained on; empty if unknown."""
    base_name: str
    dropped: tuple[str, ...]
    """Tensors of the file that are copies of the model's, and are not read."""


def is_adapter(path: Path | str) -> bool:
    """Whether a path is that of an adapter, not of a model or of nothing."""
    path = Path(path).expanduser()
    if run := store.find_run(path):
        return store.read_config(run.folder).tune.method == "lora"
    if peft_folder(path):
        return True
    if not path.is_file() or path.suffix not in (*PTH, *SAFETENSORS):
        return False
    try:
        return any(PART.fullmatch(name) for name in read_model(path))
    except WeightsError:  # what is wrong, the reader of models says
        return False


def states_alpha(path: Path | str) -> bool:
    """Whether an adapter says its alpha, or needs none."""
    path = Path(path).expanduser()
    if store.find_run(path):
        return True
    with naming(path):
        return all(part.scale is not None for part in read(path, None).parts.values())


def describe(path: Path | str) -> AdapterInfo:
    """What an adapter is, without its model. Raises WeightsError as `load`."""
    path = Path(path).expanduser()
    if store.find_run(path):
        return _load_run(path, None)[1]
    with naming(path):
        return _info(read(path, None))


def load(
    path: Path | str, cfg: ModelConfig, alpha: float | None = None
) -> tuple[Adapter[Array], AdapterInfo]:
    """The adapter of a file, a folder or a run, for a model of `cfg`, in float32.

    `alpha` is that of a `.pth`, which does not hold it. Ranks that differ between layers are padded
    with zeros, and scales that differ are multiplied into `up`. Raises UserError, one line, for a
    file that is damaged, of another model or of an unknown kind, or has a tensor without a use.
    """
    path = Path(path).expanduser()
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise WeightsError(f"alpha = {alpha}: must be a finite number above 0")
    if alpha is not None and states_alpha(path):
        raise WeightsError(f"{path}: has its own scale; leave alpha out")
    if store.find_run(path):
        return _load_run(path, cfg)
    with naming(path):
        stored = read(path, alpha)
        return _adapter(stored, cfg), _info(stored)


def _load_run(path: Path, cfg: ModelConfig | None) -> tuple[Adapter[Array], AdapterInfo]:
    saved = store.load_saved(path)
    tune, model = saved.config.tune, saved.config.model
    if tune.method != "lora":
        what = "a state; give it with --state" if tune.method == "state" else "a whole model"
        raise WeightsError(f"{path}: this run has no adapter, it trains {what}")
    if cfg is not None and replace(model, state_tuned=cfg.state_tuned) != cfg:
        raise WeightsError(
            f"{path}: changes a model of RWKV-{model.version}, {model.layers} layers of width"
            f" {model.width}, not of RWKV-{cfg.version}, {cfg.layers} of {cfg.width}; give its own"
        )
    layers, adapter = tuning.tuned_layers(model, tune), saved.params
    names = (*adapter.low_rank, *adapter.whole)
    low_rank = sum(x.down[0].size + x.up[0].size for x in adapter.low_rank.values())
    info = AdapterInfo(
        path,
        "rslora" if tune.rslora else "lora",
        tune.rank,
        tune.alpha,
        tuple(dict.fromkeys(re.sub(r"\.(weight|bias)$", "", tuning.short(x)) for x in names)),
        layers,
        low_rank * len(layers) + sum(x.size for x in adapter.whole.values()),
        saved.base,
        saved.config.train.init,
        (),
    )
    return adapter, info


def _info(stored: Stored) -> AdapterInfo:
    names = [*stored.parts, *(re.sub(r"\.(weight|bias)$", "", name) for name in stored.whole)]
    factors = [x for part in stored.parts.values() for x in (part.down, part.up, part.magnitude)]
    arrays = [x for x in factors if x is not None]
    return AdapterInfo(
        stored.path,
        stored.method if stored.parts else "whole",
        max((rank_of(part) for part in stored.parts.values()), default=0),
        stored.alpha,
        tuple(dict.fromkeys(re.sub(r"^blocks\.\d+\.", "", name) for name in names)),
        tuple(sorted({layer for name in stored.parts if (layer := layer_of(name)) is not None})),
        sum(math.prod(x.shape) for x in (*arrays, *stored.whole.values())),
        stored.base,
        stored.base_name,
        tuple(stored.dropped),
    )


def _adapter(stored: Stored, cfg: ModelConfig) -> Adapter[Array]:
    """The stacked adapter of a model."""
    known = table(cfg)
    grouped: dict[str, dict[int, Part]] = {}
    for module, part in stored.parts.items():
        layer = layer_of(module)
        path = re.sub(r"^blocks\.\d+\.", "blocks.", module)
        spec = known.get(path)
        if spec is None or not tuning.adaptable(path, spec) or layer is None:
            raise WeightsError(f"{module}: is no matrix of RWKV-{cfg.version}; give its own model")
        if layer >= cfg.layers:
            raise WeightsError(
                f"{module}: the model has layers 0 to {cfg.layers - 1} only; give the adapter's own"
            )
        if part.scale is None:
            raise WeightsError(
                "does not say its alpha; give the one that it was trained with (--alpha;"
                " RWKV-PEFT's default is 32)"
            )
        grouped.setdefault(path, {})[layer] = _fitted(module, part, spec)
    order = [path for path in known if path in grouped]
    low_rank = {path: _stacked(grouped[path], known[path]) for path in order}
    whole, state = _whole(stored.whole, cfg)
    return Adapter(low_rank, whole, state)


def _fitted(module: str, part: Part, spec: ParamSpec) -> Part:
    """A part whose shapes are those of a matrix. Raises WeightsError if they are not."""
    wide, out = spec.shape
    down, up = part.down, part.up
    assert up is not None
    if down is None:  # MiSS: stacked identities, and columns that outputs share in turn
        rank = up.shape[1]
        down = np.tile(np.eye(rank, dtype=np.float32), (1, -(-wide // rank)))[:, :wide]
        if part.shared and out % up.shape[0] == 0:
            up = np.tile(np.asarray(up), (out // up.shape[0], 1))
    fits = down.shape == (up.shape[1], wide) and up.shape[0] == out
    if not fits or (part.magnitude is not None and sizes(part.magnitude) != [out]):
        found = f"A {list(down.shape)} and B {list(up.shape)}"
        raise WeightsError(
            f"{module}: {found} do not change a matrix of {wide} inputs and {out} outputs; the"
            " adapter is of another model"
        )
    return replace(part, down=down, up=up)


def _stacked(parts: Mapping[int, Part], spec: ParamSpec) -> LowRank[Array]:
    layers, (wide, out), rank = spec.layers, spec.shape, max(map(rank_of, parts.values()))
    scales = {part.scale for part in parts.values()}
    scale = scales.pop() if len(scales) == 1 else None
    down = np.zeros((layers, wide, rank), np.float32)
    up = np.zeros((layers, rank, out), np.float32)
    magnitude = np.zeros((layers, out), np.float32)
    for layer, part in parts.items():
        assert part.down is not None and part.up is not None and part.scale is not None
        down[layer, :, : rank_of(part)] = as_float32(part.down).T
        factor = part.scale if scale is None else 1.0
        up[layer, : rank_of(part)] = as_float32(part.up).T * factor
        if part.magnitude is not None:
            magnitude[layer] = as_float32(part.magnitude).ravel()
    scale = 1.0 if scale is None else float(scale)
    if any(part.magnitude is not None for part in parts.values()):
        return Dora(jnp.asarray(down), jnp.asarray(up), scale, jnp.asarray(magnitude))
    return LowRank(jnp.asarray(down), jnp.asarray(up), scale)


def _whole(
    tensors: Mapping[str, ArrayLike], cfg: ModelConfig
) -> tuple[dict[str, Array], Array | None]:
    """The parameters that are replaced, in our shapes, and the state."""
    h, n = cfg.heads, cfg.head_size
    known = table(cfg)
    if any(name.endswith(".time_state") for name in tensors):
        known[STATE] = ParamSpec((h, n, n), lambda key, shape, depth: jnp.zeros(shape), cfg.layers)
    found, used = {}, set()
    for path, spec in known.items():
        names = names_of(path, spec)
        if not any(name in tensors for name in names):
            continue
        for name in names:
            if name not in tensors and not optional(name):
                raise WeightsError(
                    f"{name} is missing beside those of other layers: a parameter is replaced in"
                    " all layers or in none; save it of all"
                )
            shape = official_shape(spec)
            if name in tensors and sizes(tensors[name]) != [x for x in shape if x != 1]:
                raise WeightsError(
                    f"{name} has shape {list(tensors[name].shape)}, not {list(shape)}: the adapter"
                    " is of another model"
                )
        used.update(names)
        each = [_ours(tensors[name], spec) if name in tensors else None for name in names]
        filled = [np.zeros(spec.shape, np.float32) if x is None else x for x in each]
        found[path] = jnp.asarray(np.stack(filled) if spec.layers else filled[0])
    if left := sorted(set(tensors) - used):
        raise WeightsError(
            f"{', '.join(map(shown, left[:3]))}{' ...' * (len(left) > 3)}: not in"
            f" RWKV-{cfg.version} with {cfg.layers} layers; the adapter is of another model"
        )
    state = found.pop(STATE, None)
    return found, state


def _ours(x: ArrayLike, spec: ParamSpec) -> np.ndarray:
    values = as_float32(x)
    return (values.T if spec.layout == "linear" else values).reshape(spec.shape)


def save(
    path: Path | str,
    adapter: Adapter[Array],
    cfg: ModelConfig,
    *,
    base: str = "",
    base_name: str = "",
) -> None:
    """Writes a folder that `peft` and `load` read; it appears once all of it is on disk.

    `base` is the fingerprint of the model's weights (`rwkv_jax.fingerprint`), `base_name` what to
    call them. Layers that change nothing are left out, unless none changes anything yet. Parameters
    that are no module of PyTorch's, and a state, have official names: `load` alone reads these.

    Raises WeightsError if it cannot be written; ValueError if the adapter is not of `cfg`'s model.
    """
    path = Path(path).expanduser()
    if not adapter.low_rank and not adapter.whole:
        what = "a state alone: save it as one" if adapter.state is not None else "empty"
        raise WeightsError(f"{path}: the adapter is {what}")
    dora = [isinstance(x, Dora) for x in adapter.low_rank.values()]
    if any(dora) and not all(dora):
        raise WeightsError(f"{path}: DoRA and LoRA in one adapter have no format; save two")
    known, there = table(cfg), _there(cfg)
    tensors: dict[str, ArrayLike] = {}
    targets: list[str] = []
    ranks, alphas = {}, {}
    layers = _changed_layers(adapter)
    for name, change in adapter.low_rank.items():
        spec = known.get(name)
        if spec is None or change.down.shape != (spec.layers, spec.shape[0], change.up.shape[1]):
            raise ValueError(f"{name}: not a change of this RWKV-{cfg.version}'s matrix")
        down, up = (np.asarray(x, np.float32) for x in (change.down, change.up))
        modules = [there(x).removesuffix(".weight") for x in names_of(name, spec)]
        for layer in layers[name]:
            module = PREFIX + modules[layer]
            tensors[f"{module}.lora_A.weight"] = down[layer].T
            tensors[f"{module}.lora_B.weight"] = up[layer].T
            if isinstance(change, Dora):
                tensors[f"{module}.lora_magnitude_vector"] = np.asarray(change.magnitude[layer])
        short = re.sub(r"^.*?(?:layers|blocks)\.\d+\.", "", modules[0])
        every = len(layers[name]) == spec.layers
        targets += [short] if every else [modules[layer] for layer in layers[name]]
        ranks[short] = down.shape[-1]
        alphas[short] = _alpha(change.scale, down.shape[-1])
    whole, modules_to_save = _whole_tensors(adapter, cfg, there)
    rank, alpha = max(ranks.values(), default=1), max(alphas.values(), default=1.0)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: x for name, x in ranks.items() if x != rank},
        "alpha_pattern": {name: x for name, x in alphas.items() if x != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
        "modules_to_save": modules_to_save or None,
        "use_dora": any(dora),
        "use_rslora": False,
        "init_lora_weights": True,
    }
    metadata = {"format": "pt", "rwkv_jax": store.versions().get("rwkv_jax", "")}
    metadata |= {"base": base} if base else {}
    with new_folder(path) as folder:
        write_safetensors(folder / FILES[0], tensors | whole, metadata)
        with replacing(folder / CONFIG) as file:
            file.write(json_text(config))


def _there(cfg: ModelConfig) -> Callable[[str], str]:
    """From an official name to the one that a folder has."""
    if cfg.version != "7":
        return lambda name: name
    sources = huggingface.LAYOUTS[huggingface.DEFAULTS["7"]].sources

    def there(name: str) -> str:
        layer = layer_of(name) or 0
        for template in (name, re.sub(r"^blocks\.\d+\.", "blocks.{}.", name)):
            if template in sources:
                return sources[template][0].there.format(layer)
        return name

    return there


def _changed_layers(adapter: Adapter[Array]) -> dict[str, list[int]]:
    """The layers of each matrix that are written."""
    given, moved = {}, {}
    for name, change in adapter.low_rank.items():
        parts = [change.magnitude] if isinstance(change, Dora) else [change.down, change.up]
        some = [np.asarray(x).reshape(len(x), -1).any(1) for x in parts]
        given[name] = [*map(int, np.flatnonzero(some[0]))]
        moved[name] = [*map(int, np.flatnonzero(np.all(some, 0)))]
    return moved if any(moved.values()) else given


def _alpha(scale: float, rank: int) -> float:
    """The alpha for which alpha / rank is the scale, to the bit where there is one."""
    alpha = scale * rank
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((x for x in near if x / rank == scale), alpha)


def _whole_tensors(
    adapter: Adapter[Array], cfg: ModelConfig, there: Callable[[str], str]
) -> tuple[dict[str, ArrayLike], list[str]]:
    """Whole tensors, and the modules that are complete, which peft replaces too."""
    known = table(cfg)
    tensors: dict[str, ArrayLike] = {}
    saved: dict[str, None] = {}
    siblings: dict[str, set[str]] = {}
    for path, spec in known.items():
        if names_of(path, spec)[0].endswith((".weight", ".bias")):
            siblings.setdefault(re.sub(r"\.(weight|bias)$", "", path), set()).add(path)
    for path, value in adapter.whole.items():
        spec = known.get(path)
        if spec is None or value.shape != spec.full_shape:
            raise ValueError(f"{path}: not a parameter of this RWKV-{cfg.version}")
        module = siblings.get(re.sub(r"\.(weight|bias)$", "", path))
        complete = module is not None and module <= adapter.whole.keys()
        for layer, name in enumerate(names_of(path, spec)):
            x = np.asarray(value[layer] if spec.layers else value, np.float32)
            x = (x.T if spec.layout == "linear" else x).reshape(official_shape(spec))
            tensors[PREFIX + there(name) if complete else name] = x
            if complete:
                full = re.sub(r"\.(weight|bias)$", "", there(name))
                saved[re.sub(r"^.*?(?:layers|blocks)\.\d+\.", "", full)] = None
    if adapter.state is not None:
        for layer, x in enumerate(np.asarray(adapter.state, np.float32)):
            tensors[STATE.replace("blocks.", f"blocks.{layer}.")] = x
    return tensors, list(saved)
