"""Any file of RWKV weights, in and out, under official names.

In: an official `.pth`, a `.safetensors` in official names, a Hugging Face folder (version 4 of
transformers, versions 5 to 7 in the layouts of `huggingface.py`), the folder of one of our runs.
Out: `.pth`, `.safetensors`, a Hugging Face folder (versions 4 and 7).

Files are mapped, not read: a tensor is in memory while it is looked at. Nothing in a file is run.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rwkv_jax.checkpoint import huggingface, store
from rwkv_jax.checkpoint.errors import WeightsError, shown
from rwkv_jax.checkpoint.files import ArrayLike, Deferred, replacing
from rwkv_jax.checkpoint.keymaps import config_of, from_official, in_order, plain, to_official
from rwkv_jax.checkpoint.pth import read_pth, write_pth
from rwkv_jax.checkpoint.safetensors import read_safetensors, write_safetensors
from rwkv_jax.config import ModelConfig
from rwkv_jax.data.tokenizers import (
    HF_FILE,
    WORLD_FILE,
    ByteTokenizer,
    Tokenizer,
    WorldTokenizer,
    load_tokenizer,
    open_tokenizer,
    world_vocabulary,
)
from rwkv_jax.models import Model
from rwkv_jax.typing import Array

PTH, SAFETENSORS = (".pth", ".pt", ".bin", ".ckpt"), (".safetensors",)
FORMATS = {
    "pth": "PyTorch",
    "safetensors": "safetensors",
    "huggingface": "Hugging Face",
    "run": "run",
}


PILE = (50277, 50304)
"""Embeddings of models with the Pile's (GPT-NeoX's) vocabulary: its own number, and padded."""

PADDING = 128
"""Models may have up to so many embeddings more than tokens, less one."""


@dataclass(frozen=True)
class Weights:
    """What a file holds: its tensors under official names, as they are stored."""

    path: Path
    format: str
    """`pth`, `safetensors`, a layout of `huggingface.LAYOUTS`, or `run`."""
    tensors: Mapping[str, ArrayLike]


def read(path: Path | str) -> Weights:
    """The tensors of any file or folder of weights.

    Raises `WeightsError`, one line that names the file, if it is none or damaged. Whether they are
    those of a whole model `from_official` finds out.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        found = _read_folder(path)
    elif path.suffix in SAFETENSORS or (path.is_file() and _begins(path)[8:9] == b"{"):
        found = _named(path, "safetensors", read_safetensors(path))
    else:
        found = _named(path, "pth", read_pth(path))
    return replace(found, tensors=plain(found.tensors))


def load(
    path: Path | str, *, dtype: Any = None, sharding: Any = None
) -> tuple[Model[Array], ModelConfig]:
    """Parameters and config of any weights: a `.pth`, a `.safetensors`, a Hugging Face folder, or
    one of our runs (its newest checkpoint). Version and all sizes are read from the file.

    Parameters keep the type they are stored in, mostly bfloat16, or get `dtype`; a function
    computes in its own `dtype` whatever theirs is. `sharding` is where they go: one
    `jax.sharding.Sharding`, or a `Model` of them. Raises `UserError`, one line, for a file that
    cannot be read.

    >>> params, cfg = load("RWKV-x070-World-0.1B.pth")  # doctest: +SKIP
    """
    weights = read(path)
    with naming(weights.path):
        return from_official(weights.tensors, dtype=dtype, sharding=sharding)


def load_with_tokenizer(
    path: Path | str, tokenizer: str = "", *, dtype: Any = None
) -> tuple[Model[Array], ModelConfig, Tokenizer]:
    """`load`, and the tokenizer that belongs to it: `find_tokenizer`, unless one is named.

    Raises `UserError` too if none is found or it does not belong to the model.
    """
    path = Path(path).expanduser()
    if not tokenizer and (path / store.CONFIG).is_file():
        params, cfg, found = store.load_run(path)
        if dtype is not None:
            params = jax.tree.map(lambda x: x.astype(dtype), params)
        return params, cfg, found
    weights = read(path)
    with naming(path):
        sizes = config_of(weights.tensors)
        found = find_tokenizer(weights, sizes.vocab_size, tokenizer)
        return *from_official(weights.tensors, dtype=dtype), found


def find_tokenizer(weights: Weights, vocab_size: int, name: str = "") -> Tokenizer:
    """The tokenizer of a model with so many embeddings: the one named (`world`, `bytes`, or a
    `tokenizer.json`); else the run's own; else the `tokenizer.json` or `20B_tokenizer.json` beside
    the weights; else the World vocabulary, or bytes, if their size is the model's.

    Raises `UserError` if there is none, or it is of another size than the model's, up to padding.
    """
    if not name and weights.format == "run":
        return load_tokenizer(weights.path / store.TOKENIZER)
    beside = _beside(weights)
    if not name and beside is not None:
        tokenizer = open_tokenizer(str(beside))
        if _fits(tokenizer, vocab_size):
            return tokenizer
        # It is another model's: one folder often has several.
    if not name:
        name = {WorldTokenizer.vocab_size: "world", ByteTokenizer.vocab_size: "bytes"}.get(
            vocab_size, ""
        )
    if not name:
        pile = " (the Pile's; models of it want 20B_tokenizer.json)" if vocab_size in PILE else ""
        raise WeightsError(
            f"no known vocabulary has {vocab_size:,} tokens{pile}: name a tokenizer.json with"
            " --tokenizer, or put it beside the weights"
        )
    tokenizer = open_tokenizer(name, "--tokenizer ")
    check_tokenizer(tokenizer, vocab_size, f"--tokenizer {name}")
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int, called: str) -> None:
    """Raises `WeightsError` unless a model of so many embeddings may be of this tokenizer."""
    if not _fits(tokenizer, vocab_size):
        raise WeightsError(
            f"{called} has {tokenizer.vocab_size:,} tokens, and the model {vocab_size:,}"
            " embeddings: they do not belong together; name the model's own"
        )


def _fits(tokenizer: Tokenizer, vocab_size: int) -> bool:
    return 0 <= vocab_size - tokenizer.vocab_size < PADDING


def _beside(weights: Weights) -> Path | None:
    """The tokenizer.json that came with the weights."""
    if weights.format == "run":
        folder, names = weights.path / store.TOKENIZER, [HF_FILE]
    else:
        folder = weights.path if weights.path.is_dir() else weights.path.parent
        names = [HF_FILE, "20B_tokenizer.json"]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def check_tokenizer_place(target: Path, weights: Weights) -> None:
    """Raises `WeightsError` if another model's tokenizer is where `write_tokenizer` would put that
    of `weights`."""
    source = _beside(weights)
    folder = target if target.is_dir() else target.parent
    if source is None or target.suffix not in (*PTH, *SAFETENSORS):
        return
    place = folder / source.name
    if place.exists() and place.read_bytes() != source.read_bytes():
        raise WeightsError(f"{place}: another model's tokenizer; convert into a folder of its own")


def write_tokenizer(target: Path, weights: Weights, vocab_size: int) -> Path | None:
    """Puts what `find_tokenizer` and Hugging Face's libraries need of the tokenizer of `weights`
    beside `target`, and says where; None if nothing is needed, or it is there.
    """
    source, folder = _beside(weights), target if target.is_dir() else target.parent
    if target.is_dir():
        kind = "file" if source else "world" if vocab_size == WorldTokenizer.vocab_size else ""
        if config := huggingface.tokenizer_config(kind, vocab_size):
            _write_json(folder / "tokenizer_config.json", config)
        if kind == "world":
            shutil.copyfile(world_vocabulary(), folder / WORLD_FILE)
            return folder / WORLD_FILE
    if source is None:
        return None
    place = folder / source.name
    if place.exists():
        return None
    with replacing(place) as file:
        file.write(source.read_bytes())
    return place


def save(path: Path | str, params: Model[Array], cfg: ModelConfig, *, dtype: Any = None) -> None:
    """Writes the parameters, in their own type or in `dtype`: as PyTorch's state dict if `path`
    ends in .pth, as safetensors if it ends in .safetensors (both in official names), and otherwise
    as a Hugging Face folder.

    What was there before is replaced when all is written. Raises `WeightsError`.
    """
    write(path, to_official(params, cfg, dtype=dtype))


def write(path: Path | str, tensors: Mapping[str, ArrayLike], *, dtype: Any = None) -> None:
    """Writes tensors in official names as `save` does, one after the other."""
    path, tensors = Path(path).expanduser(), in_order(tensors)
    if dtype is not None:
        tensors = {name: _cast(x, np.dtype(dtype)) for name, x in tensors.items()}
    if path.suffix in PTH:
        write_pth(path, tensors)
    elif path.suffix in SAFETENSORS:
        write_safetensors(path, tensors)
    elif re.fullmatch(r"\.[a-z]+", path.suffix):  # not that of `world-0.1b`
        raise WeightsError(
            f"{path}: {path.suffix} is no format; end the name in .pth or .safetensors, or in"
            " nothing for a Hugging Face folder"
        )
    else:
        _write_folder(path, tensors)


def _cast(array: ArrayLike, dtype: np.dtype) -> ArrayLike:
    return Deferred(array.shape, dtype, lambda: np.asarray(array))


def _begins(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


def _read_folder(path: Path) -> Weights:
    if (path / store.CONFIG).is_file():
        params, cfg, _ = store.load_run(path)
        return Weights(path, "run", to_official(params, cfg))
    if not (path / "config.json").is_file():
        files = sorted(x.name for x in path.iterdir() if x.suffix in (*PTH, *SAFETENSORS))
        hint = f"; it has {files[0]}: name that file" if files else "; name a file of weights"
        raise WeightsError(
            f"{path}: neither a run nor a Hugging Face folder (no config.json){hint}"
        )
    config = _config(path / "config.json")
    if (path / "pytorch_model.bin").is_file():
        tensors = read_pth(path / "pytorch_model.bin")
    else:
        tensors = read_safetensors(path)
    with naming(path):
        if not huggingface.is_huggingface(tensors):
            return Weights(path, "safetensors", tensors)
        layout = huggingface.layout_of(tensors, config)
        return Weights(path, layout, huggingface.to_official(tensors, config))


def _named(path: Path, kind: str, tensors: Mapping[str, np.ndarray]) -> Weights:
    """A single file: official names, or Hugging Face's with the config.json beside it."""
    with naming(path):
        if not huggingface.is_huggingface(tensors):
            return Weights(path, kind, tensors)
        config = _config(path.with_name("config.json"))
        layout = huggingface.layout_of(tensors, config)
        return Weights(path, layout, huggingface.to_official(tensors, config))


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read ({shown(error)}); restore it") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path}: no table of settings; restore it")
    return config


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the file's name in front of what is wrong in it."""
    try:
        yield
    except WeightsError as error:
        if str(error).startswith(str(path)):
            raise
        raise WeightsError(f"{path}: {error}") from error


def _write_json(path: Path, table: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def _write_folder(path: Path, tensors: Mapping[str, ArrayLike]) -> None:
    """A Hugging Face folder, complete when it appears."""
    with naming(path):
        named, config = huggingface.from_official(tensors)
    if path.is_file():
        raise WeightsError(f"{path}: is a file; name a new folder, or end in .pth or .safetensors")
    if path.exists() and any(path.iterdir()):
        raise WeightsError(f"{path}: is not empty; name a new folder")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        write_safetensors(temporary / "model.safetensors", named, {"format": "pt"})
        _write_json(temporary / "config.json", config)
        _write_json(temporary / "generation_config.json", huggingface.generation_config(config))
        os.replace(temporary, path)
    except OSError as error:
        raise WeightsError(
            f"{path}: cannot be written ({error.strerror}); choose another place"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
