"""Files of adapters: read, written, and merged into a model's tensors.

Read:

    peft      a folder of Hugging Face's library, `adapter_config.json` and
              `adapter_model.safetensors` or `.bin`: LoRA, rsLoRA, DoRA, MiSS, and PiSSA that was
              converted when it was saved. Its modules have the names of any layout of
              `huggingface.py`, or official ones
    .pth      of RWKV-PEFT before it used that library, and of Blealtan/RWKV-LM-LoRA: official
              names with `.lora_A` and `.lora_B`, or `.bone`, `.disha`, and whole tensors; alpha is
              not in it
    a run     of ours that has trained an adapter, or one of its checkpoints

Written: a `peft` folder, in the names of `rwkv7-hf` for version 7 and in official ones for others.

    BASE.lora_A.weight [rank, in], .lora_B.weight [out, rank]     W + alpha / rank B A
    BASE.lora_magnitude_vector [out]                              DoRA
    BASE.miss_block [rank, out]     W[:, j] + block[j mod rank], which is LoRA with a fixed A

PiSSA takes its first B A out of the weights that it trains on: W + B A - B0 A0 is read as LoRA of
twice the rank. Sources: peft 0.21 (tuners/lora, tuners/miss, utils/save_and_load.py); RWKV-PEFT
(merge/merge.py, merge/merge_pissa.py).
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rwkv_jax import disk, tuning
from rwkv_jax.checkpoint import huggingface, store
from rwkv_jax.checkpoint.errors import WeightsError, escaped, shown
from rwkv_jax.checkpoint.files import (
    ArrayLike,
    Deferred,
    cast,
    float_type,
    json_text,
    naming,
    new_folder,
    replacing,
)
from rwkv_jax.checkpoint.keymaps import names_of, official_shape, optional, sizes, table
from rwkv_jax.checkpoint.names import plain_name
from rwkv_jax.checkpoint.safetensors import read_metadata, write_safetensors
from rwkv_jax.checkpoint.shards import PTH, SAFETENSORS, read_model
from rwkv_jax.config import ModelConfig
from rwkv_jax.nn import LowRank
from rwkv_jax.params import ParamSpec
from rwkv_jax.tuning import STATE, Adapter, Dora
from rwkv_jax.typing import Array

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
"""What peft puts before the path of a module."""

PISSA = "init_pissa.pth"
"""Where RWKV-PEFT keeps the A and B that PiSSA started from, beside the trained ones."""

_MERGE_THERE = "merge it where it was trained (peft: merge_and_unload), and give the merged model"


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


@dataclass
class _Part:
    """The change of one matrix, as it is stored. `scale` None is not known."""

    down: ArrayLike | None = None  # [rank, in]
    up: ArrayLike | None = None  # [out, rank]
    scale: float | None = None
    magnitude: ArrayLike | None = None  # [out]
    shared: bool = False
    """Whether `up` has fewer rows, which the outputs share in turn."""


@dataclass
class _Stored:
    """A file's content under official names."""

    path: Path
    method: str = "lora"
    alpha: float | None = None
    parts: dict[str, _Part] = field(default_factory=dict)
    """By `blocks.3.att.key`."""
    whole: dict[str, ArrayLike] = field(default_factory=dict)
    base: str = ""
    base_name: str = ""
    dropped: list[str] = field(default_factory=list)


def is_adapter(path: Path | str) -> bool:
    """Whether a path is that of an adapter, not of a model or of nothing."""
    path = Path(path).expanduser()
    if run := store.find_run(path):
        return store.read_config(run.folder).tune.method == "lora"
    if _peft_folder(path):
        return True
    if not path.is_file() or path.suffix not in (*PTH, *SAFETENSORS):
        return False
    try:
        return any(_PART.fullmatch(name) for name in read_model(path))
    except WeightsError:  # what is wrong, the reader of models says
        return False


def states_alpha(path: Path | str) -> bool:
    """Whether an adapter says its alpha, or needs none."""
    path = Path(path).expanduser()
    if store.find_run(path):
        return True
    with naming(path):
        return all(part.scale is not None for part in _read(path, None).parts.values())


def describe(path: Path | str) -> AdapterInfo:
    """What an adapter is, without its model. Raises WeightsError as `load`."""
    path = Path(path).expanduser()
    if store.find_run(path):
        return _load_run(path, None)[1]
    with naming(path):
        return _info(_read(path, None))


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
        stored = _read(path, alpha)
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
    mask = np.isin(np.arange(model.layers), layers).astype(np.float32)[:, None, None]
    if len(layers) < model.layers:  # what the others started from is of no use
        kept = {path: replace(x, down=x.down * mask) for path, x in adapter.low_rank.items()}
        adapter = replace(adapter, low_rank=kept)
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


def _info(stored: _Stored) -> AdapterInfo:
    names = [*stored.parts, *(re.sub(r"\.(weight|bias)$", "", name) for name in stored.whole)]
    factors = [x for part in stored.parts.values() for x in (part.down, part.up, part.magnitude)]
    arrays = [x for x in factors if x is not None]
    return AdapterInfo(
        stored.path,
        stored.method if stored.parts else "whole",
        max((_rank(part) for part in stored.parts.values()), default=0),
        stored.alpha,
        tuple(dict.fromkeys(re.sub(r"^blocks\.\d+\.", "", name) for name in names)),
        tuple(sorted({layer for name in stored.parts if (layer := _layer(name)) is not None})),
        sum(math.prod(x.shape) for x in (*arrays, *stored.whole.values())),
        stored.base,
        stored.base_name,
        tuple(stored.dropped),
    )


def _layer(name: str) -> int | None:
    match = re.match(r"blocks\.(\d{1,6})\.", name)
    return int(match[1]) if match else None


def _rank(part: _Part) -> int:
    return 0 if part.up is None else part.up.shape[1]


# Reading


def _peft_folder(path: Path) -> Path | None:
    """The folder that a path to it, or to its file of tensors, names."""
    folder = path.parent if path.name in FILES else path
    return folder if (folder / CONFIG).is_file() else None


def _read(path: Path, alpha: float | None) -> _Stored:
    with disk.reading(path, "name one that exists and is readable", WeightsError):
        if folder := _peft_folder(path):
            stored = _read_peft(folder)
        elif path.is_file():
            stored = _read_old(path, alpha)
        elif path.exists():
            raise WeightsError(f"neither a run nor a folder of peft's (no {CONFIG}); name another")
        else:
            raise WeightsError("no such file or folder; name an adapter's")
    _check_pairs(stored)
    return stored


_PART = re.compile(
    r"(?P<module>.+?)\.(?P<kind>(?:init_)?lora_[A-Z]|lora_magnitude_vector|lora_embedding_[AB]"
    r"|miss_block|miss|bone_block|bone|disha)(?:\.weight)?"
)


def _sorted_out(
    stored: _Stored, tensors: Mapping[str, ArrayLike]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """By official module, what a file has of it by kind, and its path in the file; whole tensors go
    into `stored`."""
    found: dict[str, dict[str, Any]] = {}
    paths: dict[str, str] = {}
    for name, x in tensors.items():
        inner = plain_name(name.removeprefix(PREFIX))
        if ".base_layer." in inner:  # beside an adapter of the head, peft keeps the head
            stored.dropped.append(name)
            continue
        if (match := _PART.fullmatch(inner)) is None:
            official, form = _official(inner, name)
            stored.whole[official] = form.read(np.asarray(x))
            continue
        module, kind = match["module"], match["kind"]
        official, form = _official(f"{module}.weight", name)
        short = official.removesuffix(".weight")
        if form is not huggingface.SAME or not official.endswith(".weight"):
            raise WeightsError(
                f"{shown(name)}: changes {short}, one of the model's own low-rank pairs, whose"
                " numbers other programs read past an adapter: it would only act once merged; leave"
                " these modules out of target_modules"
            )
        if kind == "lora_M":
            raise WeightsError(
                f"{shown(name)}: OpenMOSE's own kind of DoRA, with norms along the other axis;"
                " merge it with the program that trained it"
            )
        if kind.startswith("lora_embedding") or official in ("emb.weight", "head.weight"):
            raise WeightsError(
                f"{shown(name)}: a low-rank change of {short}; only matrices of layers can have one"
                f" here; {_MERGE_THERE}"
            )
        found.setdefault(short, {})[kind] = x
        paths[short] = name.removeprefix(PREFIX).rsplit(f".{kind}", 1)[0]
    return found, paths


@cache
def _places() -> tuple[dict[str, tuple[str, huggingface.Form]], set[str]]:
    """Official name and form by the plain name in a layout, with `{}` for the layer, and all the
    official names. Names of packed tensors, which stand for several, are left out."""
    found: dict[str, tuple[str, huggingface.Form]] = {}
    several: set[str] = set()
    official: set[str] = set()
    for layout in huggingface.LAYOUTS.values():
        seen: set[str] = set()
        for sources in layout.sources.values():
            for source in sources:
                official.add(source.official)
                if source.when is None:
                    there = plain_name(source.there)
                    (several if there in seen else seen).add(there)
                    found.setdefault(there, (source.official, source.form))
    return {there: place for there, place in found.items() if there not in several}, official


def _official(inner: str, name: str) -> tuple[str, huggingface.Form]:
    """The official name of a tensor, and how it becomes official. Raises WeightsError for `name` if
    there is none."""
    known, official = _places()
    match = re.match(r"(blocks|layers)\.(\d{1,6})\.(.+)", inner)
    for template in (inner, f"{match[1]}.{{}}.{match[3]}" if match else inner):
        if template in known:
            there, form = known[template]
            return there.format(match[2] if match else 0), form
        if template in official or re.fullmatch(r"blocks\.\{\}\.(att|ffn)\..+", template):
            return inner, huggingface.SAME
    raise WeightsError(
        f"{shown(name)}: has no place in an RWKV model, so merging would leave it out; the adapter"
        " is of another model, or of a kind that this release does not know"
    )


def _read_old(path: Path, alpha: float | None) -> _Stored:
    """RWKV-PEFT's and Blealtan's files."""
    stored = _Stored(path, alpha=alpha)
    found, _ = _sorted_out(stored, read_model(path))
    beside = path.with_name(PISSA)
    initial = {}
    if path.name != PISSA and beside.is_file():
        initial, _ = _sorted_out(_Stored(beside), read_model(beside))
        stored.method = "pissa"
    for module, kinds in found.items():
        if block := [kind for kind in kinds if kind in ("bone", "disha", "miss")]:
            stored.method = "miss"
            stored.parts[module] = _from_block(module, kinds.pop(block[0]))
        else:
            part = _Part(kinds.pop("lora_A", None), kinds.pop("lora_B", None))
            if initial:
                part = _without_start(module, part, initial.get(module, {}))
            elif alpha is not None and part.down is not None:
                part.scale = alpha / part.down.shape[0]
            stored.parts[module] = part
        _check_used(module, kinds)
    if stored.method == "miss":
        stored.alpha = None
    return stored


def _without_start(module: str, part: _Part, start: Mapping[str, Any]) -> _Part:
    """What PiSSA has learned: B A - B0 A0, of twice the rank. RWKV-PEFT does not scale it."""
    down, up = start.get("init_lora_A"), start.get("init_lora_B")
    if down is None or up is None or part.down is None or part.up is None:
        raise WeightsError(
            f"{module} lacks A or B, here or in {PISSA} beside it; give both files whole, or move"
            " that one away if it is of another run"
        )
    a, a0, b, b0 = (_float(x) for x in (part.down, down, part.up, up))
    if a.shape != a0.shape or b.shape != b0.shape:
        raise WeightsError(
            f"{module}: other shapes than in {PISSA}, which is of another run; move it away"
        )
    return _Part(np.concatenate([a, a0]), np.concatenate([b, -b0], 1), 1.0)


def _from_block(module: str, block: ArrayLike, shared: bool = False) -> _Part:
    """MiSS as LoRA: `up` is the block; `down`, stacked identities, is made when its width is
    known."""
    if len(block.shape) != 2:
        raise WeightsError(
            f"{module}: a block of shape {list(block.shape)} (Bat), which programs read in two"
            f" different ways; {_MERGE_THERE}"
        )
    return _Part(None, np.asarray(block).T, 1.0, shared=shared)


_READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "peft_type"}
_NEUTRAL = {
    *("task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "lora_dropout", "miss_dropout", "megatron_core", "qalora_group_size"),
    *("bias", "init_lora_weights", "init_weights", "mini_r", "eva_config", "runtime_config"),
    *("ensure_weight_tying", "corda_config", "lora_ga_config", "loftq_config"),
}
"""Settings that act in training only, or whose effect is in the tensors' names; those of them that
change the result are checked by `_check_settings`."""

_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""`init_lora_weights` that leave the model's weights as they are."""


def _check_settings(config: Mapping[str, Any]) -> None:
    """Raises WeightsError for an adapter that is computed in an unknown way."""
    kind = config.get("peft_type")
    if kind not in ("LORA", "MISS"):
        raise WeightsError(
            f"{CONFIG}: peft_type = {shown(kind)}: this release reads LORA and MISS; {_MERGE_THERE}"
        )
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise WeightsError(
            f"{CONFIG}: init_lora_weights = {shown(start)} has changed the model's weights, and how"
            " is not in the folder: save it with path_initial_model_for_weight_conversion, which"
            " makes it LoRA"
        )
    blocks = config.get("init_weights")
    if kind == "MISS" and blocks not in (True, False, None, "mini"):
        raise WeightsError(
            f"{CONFIG}: init_weights = {shown(blocks)} (Bat) is read in two ways; {_MERGE_THERE}"
        )
    if config.get("bias") not in (None, "none"):
        raise WeightsError(
            f"{CONFIG}: bias = {shown(config['bias'])}: RWKV's matrices have none; {_MERGE_THERE}"
        )
    for key in sorted(config.keys() - _READ - _NEUTRAL):
        if config[key]:
            raise WeightsError(
                f"{CONFIG}: {shown(key)} = {shown(config[key])}: this release does not know what"
                f" that changes; {_MERGE_THERE}"
            )


def _read_peft(folder: Path) -> _Stored:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise WeightsError(f"{CONFIG}: cannot be read ({shown(error)}); restore it") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{CONFIG}: not a JSON object; restore it")
    _check_settings(config)
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise WeightsError(f"{FILES[0]} is missing: fetch it")
    tensors = read_model(file)
    metadata = read_metadata(file) if file.suffix == ".safetensors" else {}
    name = config.get("base_model_name_or_path")
    stored = _Stored(folder, base=metadata.get("base", ""), base_name=escaped(str(name or "")))
    miss = config["peft_type"] == "MISS"
    rslora = "rslora" if config.get("use_rslora") else "lora"
    stored.method = "miss" if miss else "dora" if config.get("use_dora") else rslora
    found, modules = _sorted_out(stored, tensors)
    if not miss and found:
        stored.alpha = _number(config, "lora_alpha", 8.0)
    for module, kinds in found.items():
        if miss:
            if "miss_block" in kinds:
                shared = config.get("init_weights") == "mini"
                stored.parts[module] = _from_block(module, kinds.pop("miss_block"), shared)
        else:
            part = _Part(kinds.pop("lora_A", None), kinds.pop("lora_B", None))
            if part.down is not None and part.down.shape[0]:
                part.scale = _scale(config, modules[module], part.down.shape[0])
            if stored.method == "dora":
                part.magnitude = kinds.pop("lora_magnitude_vector", None)
                if part.magnitude is None:
                    raise WeightsError(f"{module} has no lora_magnitude_vector; save it again")
            stored.parts[module] = part
        _check_used(module, kinds)
    return stored


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise WeightsError(f"{CONFIG}: {key} = {shown(value)}: must be a finite number; correct it")
    return float(value)


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank of a module, which patterns may set. Raises WeightsError if the rank is not what
    the config says."""
    said = _patterned(config, "rank_pattern", "r", 8.0, module)
    if said != rank:
        raise WeightsError(
            f"{module}: of rank {rank}, but {CONFIG} says {said:g}; take both files of one save"
        )
    alpha = _patterned(config, "alpha_pattern", "lora_alpha", 8.0, module)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _patterned(
    config: Mapping[str, Any], patterns: str, key: str, default: float, module: str
) -> float:
    """A setting of a module: of the first pattern that matches it, as peft's `get_pattern_key`."""
    given = config.get(patterns) or {}
    if not isinstance(given, dict):
        raise WeightsError(f"{CONFIG}: {patterns} = {shown(given)}: must be a table; correct it")
    for pattern in given:
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return _number(given, pattern, default)
        except re.error as error:
            raise WeightsError(
                f"{CONFIG}: {patterns}: {shown(pattern)} is no pattern ({shown(error)}); correct it"
            ) from error
    return _number(config, key, default)


def _check_used(module: str, left: Mapping[str, Any]) -> None:
    if left:
        raise WeightsError(
            f"{module}.{', .'.join(map(shown, left))}: not a part of this kind of adapter, so"
            " merging would leave it out; the file is damaged, or of a kind that this release does"
            " not know"
        )


def _check_pairs(stored: _Stored) -> None:
    """Raises WeightsError for an adapter that is empty, or has half of a pair."""
    if stored.whole and not stored.parts and all(x.endswith(".time_state") for x in stored.whole):
        raise WeightsError("holds tuned states and no adapter; give it with --state")
    if not stored.parts and not stored.whole:
        raise WeightsError("holds no adapter: it has no tensors; take the file that training wrote")
    for module, part in stored.parts.items():
        if part.up is None or (part.down is None and stored.method != "miss"):
            raise WeightsError(f"{module} has only one of A and B; the file is damaged")
        arrays = (x for x in (part.down, part.up) if x is not None)
        if any(len(x.shape) != 2 or not all(x.shape) for x in arrays):
            raise WeightsError(f"{module}: its A or B is no matrix; the file is damaged")


def _float(x: ArrayLike) -> np.ndarray:
    return np.asarray(x).astype(np.float32)


def _adapter(stored: _Stored, cfg: ModelConfig) -> Adapter[Array]:
    """The stacked adapter of a model."""
    known = table(cfg)
    grouped: dict[str, dict[int, _Part]] = {}
    for module, part in stored.parts.items():
        layer = _layer(module)
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


def _fitted(module: str, part: _Part, spec: ParamSpec) -> _Part:
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


def _stacked(parts: Mapping[int, _Part], spec: ParamSpec) -> LowRank[Array]:
    layers, (wide, out), rank = spec.layers, spec.shape, max(map(_rank, parts.values()))
    scales = {part.scale for part in parts.values()}
    scale = scales.pop() if len(scales) == 1 else None
    down = np.zeros((layers, wide, rank), np.float32)
    up = np.zeros((layers, rank, out), np.float32)
    magnitude = np.zeros((layers, out), np.float32)
    for layer, part in parts.items():
        assert part.down is not None and part.up is not None and part.scale is not None
        down[layer, :, : _rank(part)] = _float(part.down).T
        up[layer, : _rank(part)] = _float(part.up).T * (1 if scale is not None else part.scale)
        if part.magnitude is not None:
            magnitude[layer] = _float(part.magnitude).ravel()
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
    values = _float(x)
    return (values.T if spec.layout == "linear" else values).reshape(spec.shape)


# Writing


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
        layer = _layer(name) or 0
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


# Merging


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
