"""Which files a model is in: one, several with an index, several without, or a folder's.

    model.safetensors                   a model in one file
    model.safetensors.index.json        {"weight_map": {NAME: SHARD, ...}}: a model in several
    model-00001-of-00002.safetensors    a shard, in the index or without one
    pytorch_model.bin, ...              the same in PyTorch's format
    model.fp16.safetensors, ...         the same with a variant in the name, or any other name

An index or any one shard stands for all of them.
"""

import re
from pathlib import Path

import numpy as np

from rwkv_jax.checkpoint import files
from rwkv_jax.checkpoint.errors import WeightsError, shown
from rwkv_jax.checkpoint.pth import read_pth
from rwkv_jax.checkpoint.safetensors import read_metadata, read_safetensors

PTH, SAFETENSORS = (".pth", ".pt", ".bin", ".ckpt"), (".safetensors", ".st")

STANDARD = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The names of a model in a Hugging Face folder, in the order in which its libraries look."""

_INDEX = re.compile(r".+\.index(\.\w+)?\.json")
_SHARD = re.compile(r"(.+)-(\d{1,6})-of-(\d{1,6})(\..+)")
_BESIDE = re.compile(r"\w[\w. -]*")
"""A file name that stays in its folder and is printable."""
_OTHERS = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state)\b.*|.*zero_pp_rank_.*")
"""What trainers save beside a model, and DeepSpeed's parts of one."""


def read_model(path: Path) -> dict[str, np.ndarray]:
    """The tensors of the model that a file, an index or a shard belongs to: read-only views of the
    files, which stay mapped as long as one of them is alive.

    Raises WeightsError, one line, for a file that is missing, cannot be read or is damaged.
    """
    tensors: dict[str, np.ndarray] = {}
    parts = _parts(path)
    indexed = {name for _, names in parts for name in names or ()}
    for file, names in parts:
        if names is not None and not file.exists():
            raise WeightsError(f"{path}: its shard {file.name} is missing; fetch it")
        found = _read_file(file)
        if names is not None and (omitted := sorted(found.keys() - indexed)):
            raise WeightsError(
                f"{file}: has {shown(omitted[0])}, which its index does not name; download both"
            )
        for name in found if names is None else names:
            if name not in found:
                raise WeightsError(
                    f"{file}: does not have {shown(name)}, unlike its index; download both"
                )
            if name in tensors:
                raise WeightsError(
                    f"{file}: {shown(name)} is in another shard too; download all of them again"
                )
            tensors[name] = found[name]
    return tensors


def files_of(path: Path) -> list[Path]:
    """The files that `read_model` reads; none of a folder."""
    return [file for file, _ in _parts(path)] if path.is_file() else []


def models_in(folder: Path) -> list[Path]:
    """The models in a folder, each by a file to open it by: those under Hugging Face's names, in
    the order in which its libraries look; only without one those under others, safetensors first.
    """
    names = sorted(x.name for x in folder.iterdir() if x.is_file())
    if standard := [name for name in STANDARD if name in names]:
        return [folder / name for name in standard]
    found = [name for name in names if _INDEX.fullmatch(name)]
    taken = {file.name for index in found for file, _ in _indexed(folder / index)}
    for name in names:
        if is_state(folder / name):
            continue
        if name in taken or _OTHERS.fullmatch(name) or not name.endswith((*PTH, *SAFETENSORS)):
            continue
        taken.update(x.name for x in _alike(folder / name))
        found.append(name)
    found.sort(key=lambda name: not re.search(r"\.(safetensors|st)\b", name))
    return [folder / name for name in found]


def is_state(path: Path) -> bool:
    """Whether a file is a state that `rwkv_jax.states` has saved."""
    try:
        return path.suffix == SAFETENSORS[0] and "state" in read_metadata(path).get("format", "")
    except WeightsError:
        return False


def _read_file(path: Path) -> dict[str, np.ndarray]:
    """By what a file is, if its name does not say."""
    if path.suffix == ".safetensors" or (path.is_file() and files.begins(path)[8:9] == b"{"):
        return read_safetensors(path)
    return read_pth(path)


def _parts(path: Path) -> list[tuple[Path, list[str] | None]]:
    """The files of a model, and the tensors to read from each; None: all."""
    if _INDEX.fullmatch(path.name):
        return _indexed(path)
    if not (match := _SHARD.fullmatch(path.name)) or not path.is_file():
        return [(path, None)]
    for index in sorted(path.parent.glob("*.json")):
        if _INDEX.fullmatch(index.name) and path in (parts := dict(_indexed(index))):
            return [*parts.items()]
    stem, number, count, end = match.groups()
    present = {int(x.name[len(stem) + 1 :].split("-")[0]): x for x in _alike(path)}
    expected = range(1, int(count) + 1) if 0 not in present else range(int(count))
    for other in expected:
        if other not in present:
            name = f"{stem}-{other:0{len(number)}}-of-{count}{end}"
            raise WeightsError(
                f"{path}: is one of {int(count)} shards, and {name} is missing; fetch it"
            )
    return [(present[other], None) for other in expected]


def _alike(path: Path) -> list[Path]:
    """All shards of one model, given one of them; of a file that is none, itself alone."""
    if not (match := _SHARD.fullmatch(path.name)):
        return [path]
    stem, _, count, end = map(re.escape, match.groups())
    other = re.compile(rf"{stem}-\d{{1,6}}-of-{count}{end}")
    return sorted(x for x in path.parent.iterdir() if other.fullmatch(x.name))


def _indexed(path: Path) -> list[tuple[Path, list[str] | None]]:
    """The shards that an index names, and the tensors that are in each."""
    shards: dict[str, list[str]] = {}
    with files.reading(path) as memory:
        places = files.json_object(memory, 0, len(memory)).get("weight_map")
        if not isinstance(places, dict):
            raise ValueError("no weight_map")
        for name, shard in places.items():
            if not isinstance(shard, str) or not _BESIDE.fullmatch(shard):
                raise WeightsError(
                    f"{shown(name)} is in {shown(shard)}, not a file beside it; correct the name"
                )
            shards.setdefault(shard, []).append(name)
    return [(path.parent / shard, names) for shard, names in shards.items()]
