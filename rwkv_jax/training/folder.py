"""The folder of a run: made once, taken up again by the same run only, one process at a time."""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from rwkv_jax.checkpoint.keymaps import check
from rwkv_jax.checkpoint.store import CHECKPOINTS, CONFIG, TOKENIZER, read_config
from rwkv_jax.checkpoint.weights import check_tokenizer, naming, read
from rwkv_jax.config import Config, ModelConfig, literal
from rwkv_jax.data.loader import Loader, open_loader
from rwkv_jax.data.sources import Data
from rwkv_jax.errors import UserError
from rwkv_jax.toml import TYPED, to_toml

FREE = {
    "train.output",
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.eval_tokens",
    "train.checkpoint_every",
    "train.keep",
    "train.tensorboard",
    "train.accumulate",
    "train.remat",
    "train.wkv",
    "data.cache",
}
"""What a run may change when it goes on, beside `sample.*` and `mesh.*`: its length, what it
reports and keeps, and how (not what) a step computes. The schedule is then that of the new
length."""

LOCK = ".lock"


class RunError(UserError):
    """A run that cannot be started or taken up in this folder."""


def adopt(cfg: Config, stated: Mapping[str, str]) -> Config:
    """The config with the model of the weights in `train.init`, if it names any.

    `stated` says where settings come from (`load_stated`): the version must be that of the weights
    wherever it was stated, sizes where they were typed; those of a file make way. Raises
    `UserError` for one that is not, and for weights that can't be read.
    """
    if not cfg.train.init:
        return cfg
    folder = Path(cfg.train.output).expanduser()
    if (folder / CONFIG).is_file() and _trained(folder):
        run = read_config(folder)  # going on needs the weights no more
        if run.train.init == cfg.train.init:  # otherwise it is another run, and `claim` says so
            _check_agrees(cfg.model, stated, str(folder), run.model)
        return dataclasses.replace(cfg, model=run.model)
    weights = read(cfg.train.init)
    with naming(weights.path):
        found = check(weights.tensors)
    _check_agrees(cfg.model, stated, cfg.train.init, found)
    return dataclasses.replace(cfg, model=found)


def _check_agrees(
    asked: ModelConfig, stated: Mapping[str, str], name: str, found: ModelConfig
) -> None:
    """Raises `RunError` if what was stated of the model is not so in the one called `name`."""
    for key in dataclasses.fields(found):
        setting = f"model.{key.name}"
        want, there = getattr(asked, key.name), getattr(found, key.name)
        where = stated.get(setting)
        binding = where == TYPED or (where and key.name == "version")
        if not binding or want == there or (want == 0 and type(want) is int):  # 0: automatic
            continue
        remedy = f"add {setting}={there}" if where != TYPED else f"say {setting}={there}"
        raise RunError(
            f"{setting} = {literal(want)} ({where}), and {name} has {literal(there)}; {remedy}, or"
            " start from other weights"
        )


def resolve(cfg: Config, tokens: Data) -> tuple[Config, Loader]:
    """The config, vocabulary size and number of steps filled in, and its batches.

    Raises `RunError` if the tokenizer needs more, or is not that of `train.init`, and `CorpusError`
    for data that its order cannot read.
    """
    if cfg.train.init:
        check_tokenizer(
            tokens.tokenizer, cfg.model.vocab_size, f"data.tokenizer = {cfg.data.tokenizer}"
        )
    needed, given = tokens.tokenizer.vocab_size, cfg.model.vocab_size
    if given and given < needed:
        raise RunError(
            f"model.vocab_size = {given}: the tokenizer (data.tokenizer = {cfg.data.tokenizer})"
            f" has {needed} ids; give at least that, or 0"
        )
    model = dataclasses.replace(cfg.model, vocab_size=given or needed)
    train, data = cfg.train, cfg.data
    loader = open_loader(
        tokens.streams,
        seed=train.seed,
        batch=train.batch,
        context=train.context,
        vocab_size=model.vocab_size,
        sampler=data.sampler,
        packing=data.packing,
        reset=data.reset,
    )
    if not train.steps:
        steps = -(-data.exit_tokens // (train.batch * train.context))
        if data.sampler == "magic_prime":
            steps = min(steps, loader.epoch[0] // train.batch)  # where the official trainer stops
        if not steps:
            raise RunError(
                f"train.batch = {train.batch} is more than the {loader.epoch[0]:,} samples of the"
                " official order; lower it, or state train.steps"
            )
        train = dataclasses.replace(train, steps=steps)
    return dataclasses.replace(cfg, model=model, train=train), loader


@contextlib.contextmanager
def claim(cfg: Config, tokens: Data) -> Iterator[Path]:
    """The folder `train.output`, ours while the context lasts.

    `cfg` is resolved. Raises `RunError` if the folder holds anything but this run, or another
    process trains in it; nothing in it is touched then.
    """
    folder = Path(cfg.train.output).expanduser()
    with contextlib.ExitStack() as stack:
        with writing(folder):
            _check_free(folder, cfg)
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / LOCK).open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"{folder}: another process is training in it; wait for it,"
                " or choose another train.output"
            ) from None
        with writing(folder):
            _check_free(folder, cfg)  # once more: another process may just have finished here
        yield folder


def describe(folder: Path, cfg: Config, tokens: Data) -> None:
    """Writes the resolved config and the tokenizer into the run's folder.

    At every start: a kill may have left half of them, and what a run may change has to be kept.
    """
    with writing(folder):
        new = folder / f"{CONFIG}.tmp"
        new.write_text(to_toml(cfg), encoding="utf-8")
        os.replace(new, folder / CONFIG)
        tokens.tokenizer.save(folder / TOKENIZER)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns a failure of the file system into one line."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # a TimeoutError that is no file's
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space and start again" if full else "choose another train.output"
        raise RunError(f"{error.filename or folder}: {error.strerror}; {remedy}") from error


def _check_free(folder: Path, cfg: Config) -> None:
    """Raises `RunError` unless the folder is empty, not there, this run's, or that of a run
    without a checkpoint."""
    if not folder.exists():
        return
    if not (folder / CONFIG).is_file():
        strangers = [
            path.name for path in folder.iterdir() if path.name not in (LOCK, f"{CONFIG}.tmp")
        ]
        if strangers:
            raise RunError(
                f"{folder}: not empty and not a run ({strangers[0]}); choose another train.output"
            )
        return
    found = read_config(folder)
    if (folder / TOKENIZER).is_dir() and not _trained(folder):
        return  # whatever stopped that run, nothing of it would be lost
    for name, there, here in differences(found, cfg):
        if name not in FREE and not name.startswith(("sample.", "mesh.")):
            raise RunError(
                f"{folder}: holds another run ({name} is {there!r} there, {here!r} here);"
                f" choose another train.output, or delete {folder} to start over"
            )


def _trained(folder: Path) -> bool:
    return any(path.name.isdigit() for path in (folder / CHECKPOINTS).glob("*"))


def differences(there: Config, here: Config) -> Iterator[tuple[str, object, object]]:
    """The settings in which two configs differ: name and both values."""
    for section in dataclasses.fields(Config):
        one, other = (getattr(cfg, section.name) for cfg in (there, here))
        for key in dataclasses.fields(one):
            values = getattr(one, key.name), getattr(other, key.name)
            if values[0] != values[1]:
                yield f"{section.name}.{key.name}", *values


def fingerprint(tokens: Data) -> str:
    """Equal for runs that read the same ids of the same tokenizer, split alike."""
    parts = [tokens.tokenizer.identity(), tokens.train_tokens, len(tokens.heldout), tokens.digest]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()
