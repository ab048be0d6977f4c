"""What files of adapters hold, under official names.

Read:

    peft      a folder of Hugging Face's library, `adapter_config.json` and
              `adapter_model.safetensors` or `.bin`: LoRA, rsLoRA, DoRA, MiSS, and PiSSA that was
              converted when it was saved. Its modules have the names of any layout of
              `huggingface.py`, or official ones
    .pth      of RWKV-PEFT before it used that library, and of Blealtan/RWKV-LM-LoRA: official
              names with `.lora_A` and `.lora_B`, or `.bone`, `.disha`, and whole tensors; alpha is
              not in it

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
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_jax import disk
from rwkv_jax.checkpoint import huggingface
from rwkv_jax.checkpoint.errors import WeightsError, escaped, shown
from rwkv_jax.checkpoint.files import ArrayLike
from rwkv_jax.checkpoint.names import plain_name
from rwkv_jax.checkpoint.safetensors import read_metadata
from rwkv_jax.checkpoint.shards import read_model

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
"""What peft puts before the path of a module."""

PISSA = "init_pissa.pth"
"""Where RWKV-PEFT keeps the A and B that PiSSA started from, beside the trained ones."""

_MERGE_THERE = "merge it where it was trained (peft: merge_and_unload), and give the merged model"


@dataclass
class Part:
    """The change of one matrix, as it is stored. `scale` None is not known."""

    down: ArrayLike | None = None  # [rank, in]
    up: ArrayLike | None = None  # [out, rank]
    scale: float | None = None
    magnitude: ArrayLike | None = None  # [out]
    shared: bool = False
    """Whether `up` has fewer rows, which the outputs share in turn."""


@dataclass
class Stored:
    """A file's content under official names."""

    path: Path
    method: str = "lora"
    alpha: float | None = None
    parts: dict[str, Part] = field(default_factory=dict)
    """By `blocks.3.att.key`."""
    whole: dict[str, ArrayLike] = field(default_factory=dict)
    base: str = ""
    base_name: str = ""
    dropped: list[str] = field(default_factory=list)


def layer_of(name: str) -> int | None:
    """The layer that an official name is of; None outside of the layers."""
    match = re.match(r"blocks\.(\d{1,6})\.", name)
    return int(match[1]) if match else None


def rank_of(part: Part) -> int:
    """Of `up`, as MiSS has no `down` at first."""
    return 0 if part.up is None else part.up.shape[1]


def as_float32(x: ArrayLike) -> np.ndarray:
    return np.asarray(x).astype(np.float32)


def peft_folder(path: Path) -> Path | None:
    """The folder that a path to it, or to its file of tensors, names."""
    folder = path.parent if path.name in FILES else path
    return folder if (folder / CONFIG).is_file() else None


def read(path: Path, alpha: float | None) -> Stored:
    """What a file or a folder holds; `alpha` is that of a `.pth`. Raises WeightsError."""
    with disk.reading(path, "name one that exists and is readable", WeightsError):
        if folder := peft_folder(path):
            stored = _read_peft(folder)
        elif path.is_file():
            stored = _read_old(path, alpha)
        elif path.exists():
            raise WeightsError(f"neither a run nor a folder of peft's (no {CONFIG}); name another")
        else:
            raise WeightsError("no such file or folder; name an adapter's")
    _check_pairs(stored)
    return stored


PART = re.compile(
    r"(?P<module>.+?)\.(?P<kind>(?:init_)?lora_[A-Z]|lora_magnitude_vector|lora_embedding_[AB]"
    r"|miss_block|miss|bone_block|bone|disha)(?:\.weight)?"
)


def _sorted_out(
    stored: Stored, tensors: Mapping[str, ArrayLike]
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
        if (match := PART.fullmatch(inner)) is None:
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


def _read_old(path: Path, alpha: float | None) -> Stored:
    """RWKV-PEFT's and Blealtan's files."""
    stored = Stored(path, alpha=alpha)
    found, _ = _sorted_out(stored, read_model(path))
    beside = path.with_name(PISSA)
    initial = {}
    if path.name != PISSA and beside.is_file():
        initial, _ = _sorted_out(Stored(beside), read_model(beside))
        stored.method = "pissa"
    for module, kinds in found.items():
        if block := [kind for kind in kinds if kind in ("bone", "disha", "miss")]:
            stored.method = "miss"
            stored.parts[module] = _from_block(module, kinds.pop(block[0]))
        else:
            part = Part(kinds.pop("lora_A", None), kinds.pop("lora_B", None))
            if initial:
                part = _without_start(module, part, initial.get(module, {}))
            elif alpha is not None and part.down is not None:
                part.scale = alpha / part.down.shape[0]
            stored.parts[module] = part
        _check_used(module, kinds)
    if stored.method == "miss":
        stored.alpha = None
    return stored


def _without_start(module: str, part: Part, start: Mapping[str, Any]) -> Part:
    """What PiSSA has learned: B A - B0 A0, of twice the rank. RWKV-PEFT does not scale it."""
    down, up = start.get("init_lora_A"), start.get("init_lora_B")
    if down is None or up is None or part.down is None or part.up is None:
        raise WeightsError(
            f"{module} lacks A or B, here or in {PISSA} beside it; give both files whole, or move"
            " that one away if it is of another run"
        )
    a, a0, b, b0 = (as_float32(x) for x in (part.down, down, part.up, up))
    if a.shape != a0.shape or b.shape != b0.shape:
        raise WeightsError(
            f"{module}: other shapes than in {PISSA}, which is of another run; move it away"
        )
    return Part(np.concatenate([a, a0]), np.concatenate([b, -b0], 1), 1.0)


def _from_block(module: str, block: ArrayLike, shared: bool = False) -> Part:
    """MiSS as LoRA: `up` is the block; `down`, stacked identities, is made when its width is
    known."""
    if len(block.shape) != 2:
        raise WeightsError(
            f"{module}: a block of shape {list(block.shape)} (Bat), which programs read in two"
            f" different ways; {_MERGE_THERE}"
        )
    return Part(None, np.asarray(block).T, 1.0, shared=shared)


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


def _read_peft(folder: Path) -> Stored:
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
    stored = Stored(folder, base=metadata.get("base", ""), base_name=escaped(str(name or "")))
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
            part = Part(kinds.pop("lora_A", None), kinds.pop("lora_B", None))
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


def _check_pairs(stored: Stored) -> None:
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
