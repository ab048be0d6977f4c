"""Reads and writes RWKV weights in every format, under official names.

Read: an official `.pth`, a `.safetensors` in official names, web-rwkv's `.st`, a Hugging Face
folder (version 4 of transformers, versions 5 to 7 in the layouts of `huggingface.py`), any of them
in shards (`shards.py`) and with longer names (`names.py`), the folder of one of our runs.
Written: `.pth`, `.safetensors`, a Hugging Face folder (versions 4 and 7).

Files are mapped, not read: a tensor is in memory while it is used. No code in a file is run.
"""

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rwkv_jax import disk, tuning
from rwkv_jax.checkpoint import huggingface, store
from rwkv_jax.checkpoint.errors import ZERO, WeightsError, escaped, shown
from rwkv_jax.checkpoint.files import (
    ArrayLike,
    cast,
    float_type,
    json_text,
    naming,
    new_folder,
    replacing,
)
from rwkv_jax.checkpoint.fingerprint import fingerprint, fingerprint_of
from rwkv_jax.checkpoint.keymaps import config_of, from_official, in_order, to_official
from rwkv_jax.checkpoint.names import refuse
from rwkv_jax.checkpoint.pth import write_pth
from rwkv_jax.checkpoint.safetensors import write_safetensors
from rwkv_jax.checkpoint.shards import PTH, SAFETENSORS, STANDARD, models_in, read_model
from rwkv_jax.config import Config, ModelConfig
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
from rwkv_jax.errors import remark
from rwkv_jax.models import Model, as_tuned
from rwkv_jax.typing import Array

PILE = (50277, 50304)
"""Embedding rows of models with the Pile's (GPT-NeoX's) vocabulary: exact, and padded."""

PILE_FILE = "20B_tokenizer.json"
"""The Pile's vocabulary in official repositories."""

KNOWN = {WorldTokenizer.vocab_size: "world", ByteTokenizer.vocab_size: "bytes"}
"""Vocabularies that need no file, by the embedding rows of their models."""

PADDING = 128
"""Fewer than this many of a model's embedding rows are padding, which no token uses, if nobody has
said that the tokenizer is the model's."""


@dataclass(frozen=True)
class Weights:
    """The tensors of a file under official names, in their stored types."""

    path: Path
    format: str
    """`pth`, `safetensors`, a layout of `huggingface.LAYOUTS`, or `run`."""
    tensors: Mapping[str, ArrayLike]


def read(path: Path | str) -> Weights:
    """The tensors of any file or folder of weights.

    Raises WeightsError, one line that names the file, if it holds no weights or is damaged. Whether
    they are a complete model is checked by `from_official`.
    """
    if not str(path) or "\0" in str(path):
        raise WeightsError(f"no file can be called {str(path)!r}; give a file or folder")
    try:
        return _read(str(path), Path(path).expanduser())
    except WeightsError as error:
        raise type(error)(escaped(str(error))) from error


def _read(name: str, path: Path) -> Weights:
    with disk.reading(path, "name one that exists and is readable", WeightsError):
        if path.is_dir() or is_run(path):
            return _read_folder(path)
        if not path.exists() and (command := _download(name)):
            raise WeightsError(
                f"{name}: no such file or folder here; if it is on the Hugging Face hub, download"
                f" it first (or one file of it, named after the repository): {command}"
            )
        if _ZERO_PART.search(path.name):
            raise WeightsError(f"{path}: {ZERO}")
        return _official(path, read_model(path))


def load(
    path: Path | str, *, dtype: Any = None, sharding: Any = None
) -> tuple[Model[Array], ModelConfig]:
    """Parameters and config of any weights: a `.pth`, a `.safetensors`, a Hugging Face folder, or
    one of our runs: its newest checkpoint, or the one named (`runs/demo/checkpoints/200`). Version
    and all sizes are read from the file.

    Parameters keep their stored type, mostly bfloat16, or are rounded to the floating type `dtype`;
    functions compute in their own `dtype` either way, and convert parameters of another at every
    call. In a loop over single tokens on a CPU that takes several times as long as the rest: give
    it `dtype="float32"` (sampling converts once, by itself).

    `sharding` is one `jax.sharding.Sharding`, or a `Model` of them. Raises UserError, one line, for
    a file that cannot be read, or has numbers too large for `dtype`.

    >>> params, cfg = load("RWKV-x070-World-0.1B.pth")  # doctest: +SKIP
    """
    weights = read(path)
    with naming(weights.path):
        return from_official(weights.tensors, dtype=dtype, sharding=sharding)


def load_base(cfg: Config, beside: Path | None = None) -> tuple[Model[Array], ModelConfig]:
    """The frozen weights of a run that tunes (`tune.method`), in the type that `tune.base` says.

    Raises WeightsError if they are no longer where `train.init` says.
    """
    path = Path(cfg.train.init).expanduser()
    if not path.exists():
        run = f"{beside}: " if beside else ""
        raise WeightsError(
            f"{run}train.init = {cfg.train.init}: the weights that the run tunes are not there"
            f" (looked for {path.absolute()}); put them back, start from the folder where the run"
            " was started, or name their place in the run's config.toml"
        )
    return load(path, dtype=None if cfg.tune.base == "stored" else cfg.tune.base)


def load_with_tokenizer(
    path: Path | str, tokenizer: str = "", *, dtype: Any = None
) -> tuple[Model[Array], ModelConfig, Tokenizer]:
    """`load` together with the model's tokenizer: the one named, or that of `find_tokenizer`. With
    `rwkv_jax.generate(*load_with_tokenizer(path), "text")` a model writes.

    Raises UserError also if none is found or it does not fit the model.
    """
    path = Path(path).expanduser()
    if not tokenizer and is_run(path):
        params, cfg, found = load_run(path)
        if dtype is not None:
            with naming(path):
                params, cfg = from_official(to_official(params, cfg), dtype=dtype)
        return params, cfg, found
    weights, found = read_with_tokenizer(path, tokenizer)
    with naming(path):
        return *from_official(weights.tensors, dtype=dtype), found


def load_run(path: Path | str) -> tuple[Model[Array], ModelConfig, Tokenizer]:
    """The parameters of a run's newest checkpoint, or of the one that is named, its model and its
    tokenizer. Where the run tunes, its adapter is merged into the weights in `train.init`;
    matrices that it changes are float32 then, so that rounding takes nothing of a small change.

    Raises `UserError` if one of them is missing, damaged, or does not belong to the others.
    """
    saved = store.load_saved(path)
    if saved.config.tune.method == "full":
        return saved.params, saved.config.model, saved.tokenizer
    base, model = load_base(saved.config, saved.folder)
    if (found := fingerprint(base, model)) != saved.base:
        raise WeightsError(
            f"{saved.folder}: tunes other weights ({saved.base}) than train.init ="
            f" {saved.config.train.init} has now ({found}); put those back"
        )
    merged = tuning.merge(base, saved.params, dtype=jnp.float32)
    return merged, as_tuned(model, merged), saved.tokenizer


def is_run(path: Path) -> bool:
    """Whether a path is that of one of our runs, or of one of its checkpoints."""
    return store.find_run(path) is not None


def read_with_tokenizer(path: Path | str, tokenizer: str = "") -> tuple[Weights, Tokenizer]:
    """`read` together with the model's tokenizer, as `load_with_tokenizer`."""
    weights = read(path)
    with naming(weights.path):
        sizes = config_of(weights.tensors)
        return weights, find_tokenizer(weights, sizes.vocab_size, tokenizer)


def tokenizer_name(weights: Weights, vocab_size: int) -> str:
    """The name by which `open_tokenizer` opens the tokenizer that `find_tokenizer` finds for the
    weights; empty if there is none."""
    found = _beside(weights, vocab_size)
    if found and found[1].kind in ("world", "bytes"):
        return found[1].kind
    return (
        str(found[0].parent if found[1].kind == "bpe" else found[0])
        if found
        else (KNOWN.get(vocab_size, ""))
    )


def find_tokenizer(weights: Weights, vocab_size: int, name: str = "") -> Tokenizer:
    """The tokenizer of a model with `vocab_size` embedding rows: the one named (`world`, `bytes`,
    or a `tokenizer.json`); else the run's own; else the `tokenizer.json` or `20B_tokenizer.json`
    beside the weights, whichever fits; else World or bytes, if the size is theirs.

    Raises UserError if there is none, or it has more tokens than the model.
    """
    if not name:
        if found := _beside(weights, vocab_size):
            return found[1]
        name = KNOWN.get(vocab_size, "")
    if not name:
        pile = " (the Pile's; its models need 20B_tokenizer.json)" if vocab_size in PILE else ""
        raise WeightsError(
            f"no known vocabulary has {vocab_size:,} tokens{pile}: name a tokenizer.json with"
            " --tokenizer, or put it beside the weights"
        )
    tokenizer = open_tokenizer(name, "--tokenizer ")
    check_tokenizer(tokenizer, vocab_size, f"--tokenizer {name}")
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int, called: str) -> None:
    """Checks a tokenizer that the user has named for a model with `vocab_size` embedding rows.

    A vocabulary may be padded to any multiple, so a smaller one passes, with a remark if the
    difference is large. Raises WeightsError for a larger one; and for a much smaller BPE of our
    own, which is trained for one vocabulary.
    """
    if _fits(tokenizer, vocab_size):
        return
    sizes = f"{called} has {tokenizer.vocab_size:,} tokens, but the model has {vocab_size:,}"
    if tokenizer.vocab_size > vocab_size or tokenizer.kind == "bpe":
        raise WeightsError(f"{sizes} embeddings: they do not belong together; name the model's own")
    remark(f"{sizes} embeddings: right if these are padded; the spare ones are never drawn")


def _fits(tokenizer: Tokenizer, vocab_size: int, padding: int = PADDING) -> bool:
    return 0 <= vocab_size - tokenizer.vocab_size < padding


def _beside(weights: Weights, vocab_size: int) -> tuple[Path, Tokenizer] | None:
    """The tokenizer beside the weights, and its file; None if there is none of the model's size.
    One of another size belongs to another model: a folder often holds several."""
    if run := store.find_run(weights.path):
        folder = run.folder / store.TOKENIZER
        found = load_tokenizer(folder)
        return folder / (WORLD_FILE if found.kind == "txt" else HF_FILE), found
    own = weights.path.is_dir()  # everything in a folder belongs to its model
    folder = weights.path if own else weights.path.parent
    padding = vocab_size if own else PADDING
    for path in (folder / HF_FILE, folder / PILE_FILE, folder / WORLD_FILE):
        if path.is_file():
            tokenizer = open_tokenizer(str(path))
            needed = tokenizer.kind != "world"  # which is known by its size
            if needed and _fits(tokenizer, vocab_size, padding):
                return path, tokenizer
    return None


def tokenizer_kind(weights: Weights, vocab_size: int) -> str:
    """The kind of the tokenizer that `find_tokenizer` finds; empty if there is none."""
    found = _beside(weights, vocab_size)
    return found[1].kind if found else KNOWN.get(vocab_size, "")


def tokenizer_files(weights: Weights, vocab_size: int, target: Path) -> dict[str, bytes]:
    """The tokenizer files of `weights` that `find_tokenizer` and Hugging Face's libraries need
    beside `target`, or in it if that is a folder: names and contents, for `write`.

    Raises UserError if another model's tokenizer exists there and would be taken for this one's, or
    if the tokenizer cannot be read.
    """
    found = _beside(weights, vocab_size)
    kind = tokenizer_kind(weights, vocab_size)
    own = found[0].read_bytes() if found and kind in ("bpe", "file", "txt") else b""
    if not is_file(target):
        files = {WORLD_FILE if kind == "txt" else HF_FILE: own} if own else {}
        files |= {WORLD_FILE: world_vocabulary().read_bytes()} if kind == "world" else {}
        if config := huggingface.tokenizer_config(kind, vocab_size):
            files["tokenizer_config.json"] = json_text(config)
        return files
    existing = _beside(Weights(target, "", {}), vocab_size) if kind else None
    if existing and existing[0].read_bytes() == own:
        return {}
    place = target.with_name(found[0].name) if found and own else None
    if existing or (place and place.exists()):
        raise WeightsError(
            f"{existing[0] if existing else place}: another model's tokenizer; choose an empty"
            " folder"
        )
    return {place.name: own} if place else {}


def save(
    path: Path | str,
    params: Model[Array],
    cfg: ModelConfig,
    *,
    dtype: Any = None,
    layout: str = "",
) -> None:
    """Writes the parameters, in their own type or in `dtype`: as PyTorch's state dict if `path`
    ends in .pth, as safetensors if it ends in .safetensors (both in official names), and otherwise
    as a Hugging Face folder, which `transformers` (version 4) or `rwkv7_hf` (version 7) loads.
    `layout="official-rwkv7"` is the layout of the official folders of version 7 instead.

    An older file is replaced once all is written. Raises WeightsError; ValueError if `params` are
    not of `cfg`'s model, or `dtype` is not a floating type of 16, 32 or 64 bits.
    """
    write(path, to_official(params, cfg, dtype=dtype), layout=layout)


def write(
    path: Path | str,
    tensors: Mapping[str, ArrayLike],
    *,
    dtype: Any = None,
    layout: str = "",
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Writes tensors in official names as `save` does, one after the other. The files `beside`
    them, or in their folder, appear with them or not at all."""
    path, tensors, beside = Path(path).expanduser(), in_order(tensors), beside or {}
    if dtype is not None:
        kind = float_type(dtype)
        tensors = {name: cast(name, x, kind) for name, x in tensors.items()}
    if not is_file(path):
        _write_folder(path, tensors, layout, beside)
        return
    if layout:
        raise WeightsError(f"{path}: layout {layout} is one of folders; leave it out for a file")
    if path.suffix not in (*PTH, ".safetensors"):
        raise WeightsError(
            f"{path}: {path.suffix} is not a format; end the name in .pth or .safetensors, or give"
            " one without an ending for a Hugging Face folder"
        )
    with contextlib.ExitStack() as stack:
        for name, content in beside.items():
            file = stack.enter_context(replacing(path.with_name(name)))
            file.write(content)
            file.flush()
        with naming(path):
            (write_pth if path.suffix in PTH else write_safetensors)(path, tensors)


def is_file(target: Path) -> bool:
    """Whether a name means a file of weights, not a folder; `world-0.1b` has no ending."""
    return target.suffix in (*PTH, *SAFETENSORS) or bool(re.fullmatch(r"\.[a-z]+", target.suffix))


_HUB = re.compile(
    r"(?:https?:/+(?:www\.)?(?:huggingface\.co|hf\.co)/|hf:/*)?"
    r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:/(?:blob|resolve|tree)/[^/]+)?(?:/(?P<file>[^?]*\w))?/?"
    r"(?:\?.*)?"
)

_ZERO_PART = re.compile(r"zero_pp_rank_\d|_optim_states\.pt$")
"""In the names of files that hold a part of each tensor."""


def _download(name: str) -> str:
    """The command that downloads what a name says, if it may be one of the Hugging Face hub."""
    match = _HUB.fullmatch(name)
    if not match or (":" not in name and Path(name.split("/")[0]).is_dir()):
        return ""  # a slip of the pen in a path
    repository, file = match["repository"], match["file"]
    if re.search(r"/checkpoints/\d+/?$", name):
        return ""  # of a run
    if repository.endswith((*PTH, *SAFETENSORS)):
        return ""
    folder = repository.split("/")[1]
    return f"hf download {repository}{f' {file}' if file else ''} --local-dir {folder}"


def _read_folder(path: Path) -> Weights:
    if is_run(path):
        params, cfg, _ = load_run(path)
        return Weights(path, "run", to_official(params, cfg))
    config = _config(path / "config.json")
    if not (models := models_in(path)):
        raise WeightsError(f"{path}: {_what_instead(path)}")
    first, *others = models
    if first.name not in STANDARD and others:
        names = ", ".join(x.name for x in models[:4]) + (", ..." if len(models) > 4 else "")
        raise WeightsError(f"{path}: holds several models ({names}); name one of these files")
    found = _official(first, read_model(first), config)
    for other in others:
        with contextlib.suppress(WeightsError):  # a damaged file is none
            tensors = read_model(other)
            if _is_same(found, other, tensors, config):
                continue
            remark(
                f"{path}: {first.name} and {other.name} hold different models;"
                f" {first.name} is read (name the other file to read that)"
            )
    return replace(found, path=path)


def _is_same(
    found: Weights, other: Path, tensors: Mapping[str, np.ndarray], config: dict[str, Any]
) -> bool:
    """Whether another file of a folder holds the same model."""
    try:
        official = _official(other, tensors, config).tensors
    except WeightsError:  # not of the model that config.json describes
        return False
    return fingerprint_of(official) == fingerprint_of(found.tensors)


def _what_instead(path: Path) -> str:
    """Why a folder without a model has none."""
    parts = ("zero_to_fp32.py", "*zero_pp_rank_*", "*/*zero_pp_rank_*", "*/mp_rank_*")
    if any(any(path.glob(part)) for part in parts):
        return ZERO
    if (path / ".metadata").is_file() or any(path.glob("*.distcp")):
        return (
            "a checkpoint of torch.distributed; make one file of it: python -m"
            f" torch.distributed.checkpoint.format_utils dcp_to_torch {path} model.pth"
        )
    return "neither a run nor a folder with weights; name a file of weights"


def _official(
    path: Path, tensors: Mapping[str, np.ndarray], config: dict[str, Any] | None = None
) -> Weights:
    """Tensors in official names. `config` is by default the `config.json` beside the file; it does
    not count for files in official names if it describes another model, as is often so where
    several lie in one folder."""
    with naming(path):
        if any(name.startswith("state.") for name in tensors):
            raise WeightsError("a saved state, not a model: name its model, and --state this file")
        renamed = huggingface.is_huggingface(tensors)
        prefixed = any(name.startswith("rwkv7.") for name in tensors)
        config = _config(path.with_name("config.json")) if config is None else config
        if not renamed and not prefixed and not huggingface.describes(config, tensors):
            config = {}
        if renamed:
            refuse(tensors, config)  # an adapter, rather than an unknown layout
            layout = huggingface.layout_of(tensors, config)
            found = huggingface.to_official(tensors, config)
        else:
            pth = path.name.endswith(PTH) or ".bin." in path.name  # or an index of such files
            layout = huggingface.OFFICIAL if prefixed else "pth" if pth else "safetensors"
            found = huggingface.with_official_names(tensors, config)
        huggingface.check_agreement(found, config)
        return Weights(path, layout, found)


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read ({shown(error)}); restore it") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path}: not a JSON object; restore it")
    return config


def _write_folder(
    path: Path, tensors: Mapping[str, ArrayLike], layout: str, others: Mapping[str, bytes]
) -> None:
    """A Hugging Face folder, which appears once it is complete."""
    with naming(path):
        named, config = huggingface.from_official(tensors, layout=layout)
    files = {
        "config.json": json_text(config),
        "generation_config.json": json_text(huggingface.generation_config(config)),
        **others,
    }
    with new_folder(path) as temporary:
        write_safetensors(temporary / "model.safetensors", named, {"format": "pt"})
        for name, content in files.items():
            with replacing(temporary / name) as file:
                file.write(content)
