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

import numpy as np

from rwkv_jax.checkpoint import huggingface, store
from rwkv_jax.checkpoint.errors import WeightsError, shown
from rwkv_jax.checkpoint.files import ArrayLike, cast, float_type, replacing, writing
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

PILE_FILE = "20B_tokenizer.json"
"""What official repositories call that vocabulary."""

KNOWN = {WorldTokenizer.vocab_size: "world", ByteTokenizer.vocab_size: "bytes"}
"""Embeddings of models with a vocabulary that needs no file beside them, and its name."""

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
    try:
        if path.is_dir():
            found = _read_folder(path)
        elif path.suffix in SAFETENSORS or (path.is_file() and _begins(path)[8:9] == b"{"):
            found = _named(path, "safetensors", read_safetensors(path))
        else:
            found = _named(path, "pth", read_pth(path))
    except OSError as error:
        raise WeightsError(
            f"{error.filename or path}: cannot be read ({error.strerror}); name one that is there"
            " and that you may read"
        ) from error
    return replace(found, tensors=plain(found.tensors))


def load(
    path: Path | str, *, dtype: Any = None, sharding: Any = None
) -> tuple[Model[Array], ModelConfig]:
    """Parameters and config of any weights: a `.pth`, a `.safetensors`, a Hugging Face folder, or
    one of our runs (its newest checkpoint). Version and all sizes are read from the file.

    Parameters keep the type they are stored in, mostly bfloat16, or get `dtype`, a floating one; a
    function computes in its own `dtype` whatever theirs is. `sharding` is where they go: one
    `jax.sharding.Sharding`, or a `Model` of them. Raises `UserError`, one line, for a file that
    cannot be read, or has numbers too large for `dtype`.

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
            with naming(path):
                params, cfg = from_official(to_official(params, cfg), dtype=dtype)
        return params, cfg, found
    weights = read(path)
    with naming(path):
        sizes = config_of(weights.tensors)
        found = find_tokenizer(weights, sizes.vocab_size, tokenizer)
        return *from_official(weights.tensors, dtype=dtype), found


def find_tokenizer(weights: Weights, vocab_size: int, name: str = "") -> Tokenizer:
    """The tokenizer of a model with so many embeddings: the one named (`world`, `bytes`, or a
    `tokenizer.json`); else the run's own; else the `tokenizer.json` or `20B_tokenizer.json` beside
    the weights, whichever fits; else the World vocabulary, or bytes, if their size is the model's.

    Raises `UserError` if there is none, or it is of another size than the model's, up to padding.
    """
    if not name:
        if found := _beside(weights, vocab_size):
            return found[1]
        name = KNOWN.get(vocab_size, "")
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


def _beside(weights: Weights, vocab_size: int) -> tuple[Path, Tokenizer] | None:
    """The tokenizer that came with the weights, and the file that holds it; None if there is none
    of the model's size. One that does not fit is another model's: a folder often has several."""
    if weights.format == "run":
        folder = weights.path / store.TOKENIZER
        return folder / HF_FILE, load_tokenizer(folder)
    folder = weights.path if weights.path.is_dir() else weights.path.parent
    for path in (folder / HF_FILE, folder / PILE_FILE):
        if path.is_file() and _fits(tokenizer := open_tokenizer(str(path)), vocab_size):
            return path, tokenizer
    return None


def tokenizer_files(weights: Weights, vocab_size: int, target: Path) -> dict[str, bytes]:
    """What `find_tokenizer` and Hugging Face's libraries need of the tokenizer of `weights` beside
    `target`, or in it if that is a folder: names and contents, for `write`.

    Raises `UserError` if another model's tokenizer is there and would be taken for this one's, or
    the tokenizer cannot be read.
    """
    found = _beside(weights, vocab_size)
    kind = found[1].kind if found else KNOWN.get(vocab_size, "")
    own = found[0].read_bytes() if found and kind in ("bpe", "file") else b""
    if not is_file(target):
        files = {HF_FILE: own} if own else {}
        files |= {WORLD_FILE: world_vocabulary().read_bytes()} if kind == "world" else {}
        if config := huggingface.tokenizer_config(kind, vocab_size):
            files["tokenizer_config.json"] = _json(config)
        return files
    there = _beside(Weights(target, "", {}), vocab_size) if kind else None
    if there and there[0].read_bytes() == own:
        return {}
    place = target.with_name(found[0].name) if found and own else None
    if there or (place and place.exists()):
        raise WeightsError(
            f"{there[0] if there else place}: another model's tokenizer; convert into a folder of"
            " its own"
        )
    return {place.name: own} if place else {}


def save(path: Path | str, params: Model[Array], cfg: ModelConfig, *, dtype: Any = None) -> None:
    """Writes the parameters, in their own type or in `dtype`: as PyTorch's state dict if `path`
    ends in .pth, as safetensors if it ends in .safetensors (both in official names), and otherwise
    as a Hugging Face folder.

    What was there before is replaced when all is written. Raises `WeightsError`; and `ValueError`
    if `cfg` is not that of `params`, or `dtype` no floating type of 16, 32 or 64 bits.
    """
    write(path, to_official(params, cfg, dtype=dtype))


def write(
    path: Path | str,
    tensors: Mapping[str, ArrayLike],
    *,
    dtype: Any = None,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Writes tensors in official names as `save` does, one after the other. Files that go `beside`
    them, or into their folder, appear with them or not at all."""
    path, tensors, beside = Path(path).expanduser(), in_order(tensors), beside or {}
    if dtype is not None:
        kind = float_type(dtype)
        tensors = {name: cast(name, x, kind) for name, x in tensors.items()}
    if not is_file(path):
        _write_folder(path, tensors, beside)
        return
    if path.suffix not in (*PTH, *SAFETENSORS):
        raise WeightsError(
            f"{path}: {path.suffix} is no format; end the name in .pth or .safetensors, or in"
            " nothing for a Hugging Face folder"
        )
    with contextlib.ExitStack() as stack:
        for name, content in beside.items():
            file = stack.enter_context(replacing(path.with_name(name)))
            file.write(content)
            file.flush()
        with naming(path):
            (write_pth if path.suffix in PTH else write_safetensors)(path, tensors)


def is_file(target: Path) -> bool:
    """Whether a name asks for a file of weights, not a folder; `world-0.1b` has no ending."""
    return target.suffix in (*PTH, *SAFETENSORS) or bool(re.fullmatch(r"\.[a-z]+", target.suffix))


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


def _json(table: Mapping[str, Any]) -> bytes:
    return (json.dumps(table, indent=2) + "\n").encode()


def _write_folder(
    path: Path, tensors: Mapping[str, ArrayLike], others: Mapping[str, bytes]
) -> None:
    """A Hugging Face folder, complete when it appears."""
    with naming(path):
        named, config = huggingface.from_official(tensors)
    if path.is_file():
        raise WeightsError(f"{path}: is a file; name a new folder, or end in .pth or .safetensors")
    if path.exists() and any(path.iterdir()):
        raise WeightsError(f"{path}: is not empty; name a new folder")
    files = {
        "config.json": _json(config),
        "generation_config.json": _json(huggingface.generation_config(config)),
        **others,
    }
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    parents = [folder for folder in path.parents if not folder.exists()]  # the deepest first
    try:
        with naming(path), writing(path):
            temporary.mkdir(parents=True)
            write_safetensors(temporary / "model.safetensors", named, {"format": "pt"})
            for name, content in files.items():
                with replacing(temporary / name) as file:
                    file.write(content)
            os.replace(temporary, path)
    except WeightsError as error:  # nobody knows the folder by the name that it had
        raise WeightsError(str(error).replace(str(temporary), str(path))) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in parents:
            with contextlib.suppress(OSError):  # the folder is there, and in it
                folder.rmdir()
