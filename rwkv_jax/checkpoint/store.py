"""Checkpoints of a run (Orbax), and a run's folder read back for sampling.

    RUN/config.toml        the resolved config
    RUN/tokenizer/         the tokenizer it was trained with
    RUN/checkpoints/STEP/  `params`, `rest` (step, optimizer) and `meta` (JSON)
    RUN/metrics.jsonl, RUN/loss.png

A checkpoint appears under its name only when all of it is on disk, so whatever kills the process
leaves the ones before it whole; what an interrupted save left behind is swept up at the next start.
Parameters are an item of their own: sampling reads them and not the optimizer's moments, which are
twice as large.
"""

import contextlib
import dataclasses
import errno
import importlib.metadata
import inspect
import itertools
import logging
import os
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from orbax.checkpoint import multihost
from orbax.checkpoint.checkpoint_managers import preservation_policy

from rwkv_jax import models
from rwkv_jax.config import Config, ConfigError, ModelConfig
from rwkv_jax.data.tokenizers import Tokenizer, load_tokenizer
from rwkv_jax.errors import UserError
from rwkv_jax.toml import load_config
from rwkv_jax.training.state import TrainState
from rwkv_jax.typing import Array, PyTree

CONFIG, TOKENIZER, CHECKPOINTS = "config.toml", "tokenizer", "checkpoints"
ITEMS = ("params", "rest", "meta")
UNFINISHED = ".orbax-checkpoint-tmp"
"""In the name of a checkpoint until all of it is on disk."""


class StoreError(UserError):
    """A run or a checkpoint that cannot be read or written."""


class DamagedError(StoreError):
    """A checkpoint that is not what was saved."""


class Store:
    """The newest `keep` checkpoints of one run; `keep` 0 opens them for reading only.

    Saving is asynchronous: an error in one shows at the next `save`, `wait` or `close`.
    """

    def __init__(self, folder: Path, keep: int = 0):
        self.folder = folder.absolute()
        # Orbax tells absl at length what it does; what fails is raised as well.
        absl_logging.set_verbosity(absl_logging.FATAL)
        _ignore_stragglers()
        options = ocp.CheckpointManagerOptions(read_only=True)
        if keep:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.LatestN(keep),
                async_options=ocp.AsyncOptions(barrier_sync_fn=_meeting()),
            )
        with _writing(self.folder):
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=ITEMS)
            self._reader = self._manager if jax.process_count() == 1 else _own_reader(self.folder)

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Starts to write a checkpoint; `state` may be changed or donated as soon as this returns.

        Raises `StoreError` if it, or the one before it, cannot be written.
        """
        rest = _rest(state)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            rest=ocp.args.StandardSave(rest),
            meta=ocp.args.JsonSave(meta),
        )
        with _writing(self.folder):
            # Of two saves at once the second would be skipped without a word.
            self._manager.wait_until_finished()
            self._manager.save(step, args=items)

    def wait(self) -> None:
        """Returns when everything is on disk. Raises `StoreError` if it cannot be."""
        with _writing(self.folder):
            self._manager.wait_until_finished()

    def latest(self, before: int | None = None) -> int | None:
        """The step of the newest complete checkpoint, or of the newest `before` a step."""
        if before is None:
            return self._manager.latest_step()
        return max((step for step in self._manager.all_steps() if step < before), default=None)

    def set_aside(self, step: int) -> Path:
        """Renames a checkpoint that cannot be read, so that it is one no more; returns where it is
        then. Of several processes the first one calls it, and all of them `reload`."""
        names = (f"damaged-{step}{'-' * bool(n)}{n or ''}" for n in itertools.count())
        aside = next(self.folder / name for name in names if not (self.folder / name).exists())
        with _writing(self.folder):
            self.path(step).rename(aside)
        return aside

    def reload(self) -> None:
        """Looks at the folder again."""
        self._manager.reload()

    def path(self, step: int) -> Path:
        """The folder of a checkpoint."""
        return self.folder / str(step)

    def meta(self, step: int, *needed: str) -> dict[str, Any]:
        """What was saved beside the arrays.

        Raises `StoreError` if it cannot be read, or something `needed` is not in it.
        """
        items = ocp.args.Composite(meta=ocp.args.JsonRestore())
        with _reading(self.path(step)):
            found = self._reader.restore(step, args=items)["meta"]
            for name in needed:
                if name not in found:
                    raise ValueError(f"its meta has no {name}")
            return found

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """The training state of a step; `abstract` gives its shapes.

        Raises `StoreError` if it cannot be read or does not fit.
        """
        rest = _rest(abstract)
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(_placed(abstract.params)),
            rest=ocp.args.StandardRestore(_placed(rest)),
        )
        with _reading(self.path(step)):
            found = self._reader.restore(step, args=items)
        return TrainState(params=found["params"], **found["rest"])

    def restore_params(self, abstract: PyTree, step: int) -> PyTree:
        """Only the parameters of a step. Raises `StoreError` as `restore` does."""
        items = ocp.args.Composite(params=ocp.args.StandardRestore(_placed(abstract)))
        with _reading(self.path(step)):
            return self._reader.restore(step, args=items)["params"]

    def close(self) -> None:
        """Waits for what is being written, then lets go of the folder."""
        with _writing(self.folder):
            self._manager.close()
            if self._reader is not self._manager:
                self._reader.close()


def sweep(folder: Path) -> None:
    """Removes what interrupted saves left in a folder of checkpoints."""
    with _writing(folder):
        for left in folder.glob(f"*{UNFINISHED}*"):
            shutil.rmtree(left)


def _rest(state: TrainState) -> dict[str, Any]:
    """What is saved beside the parameters."""
    rest = {"step": state.step, "opt_state": state.opt_state}
    return rest if state.carried is None else rest | {"carried": state.carried}


def _placed(abstract: PyTree) -> PyTree:
    """Where the arrays shall be, which need not be where they were saved: as they say, or on the
    first device."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or first), abstract
    )


def _own_reader(folder: Path) -> ocp.CheckpointManager:
    """What reads for this process alone: others would wait for it where its part of a checkpoint is
    damaged, and theirs is not."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"reader_{me}"
    )
    options = ocp.CheckpointManagerOptions(read_only=True, multiprocessing_options=alone)
    return ocp.CheckpointManager(folder, options=options, item_names=ITEMS)


def _meeting() -> Callable[..., None] | None:
    """How several processes wait for each other while they write: one that has failed goes on to
    say so. Orbax would have it wait for the others, and them for it."""
    if jax.process_count() == 1:
        return None
    meet = multihost.get_barrier_sync_fn()

    def unless_failed(*, key: str, timeout_ms: int) -> None:
        if error := sys.exc_info()[1]:
            raise error
        meet(key=key, timeout_ms=timeout_ms)

    return unless_failed


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns a failure of the file system, whatever exception it arrives as, into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # What else was being written is given up, and says so whenever it is collected.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        # The library that writes arrays raises ValueError with the number in its text.
        told = re.search(r"os_error_code='(\d+)'", str(error))
        number = int(told[1]) if told else getattr(error, "errno", None)
        full = number in (errno.ENOSPC, errno.EDQUOT)
        if full or any(sign in str(error) for sign in ("No space left", "Disk quota")):
            raise StoreError(
                f"{folder}: no space left on the disk for a checkpoint; the ones before are whole:"
                " free some space and start again"
            ) from error
        if number:
            raise StoreError(
                f"{folder}: cannot be written ({os.strerror(number)}); choose another train.output"
            ) from error
        raise


@contextlib.contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    """Turns whatever a damaged checkpoint raises into one line; what is not its fault stays."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise
        number = getattr(error, "errno", None)
        if number not in (None, errno.ENOENT):
            raise StoreError(
                f"{checkpoint}: cannot be read ({os.strerror(number)}); see that the disk is there"
                " and you may read it"
            ) from error
        cause: BaseException = error
        while inner := cause.__cause__ or cause.__context__:
            cause = inner
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        reason = textwrap.shorten(reason, 120, placeholder=" ...")
        raise DamagedError(
            f"{checkpoint}: damaged or of another shape ({reason}); take a copy of it, or"
            " move it away to use the checkpoint before it"
        ) from error


@cache
def _ignore_stragglers() -> None:
    """Keeps quiet the other reads or writes of a checkpoint when one has failed: Orbax does not
    await them, and Python reports them, pages long, when they are collected."""
    report = sys.unraisablehook

    def hook(what: Any) -> None:
        file = what.object.cr_code.co_filename if inspect.iscoroutine(what.object) else ""
        if "orbax" not in file and "Event loop is closed" not in str(what.exc_value):
            report(what)

    def not_a_straggler(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not ("never retrieved" in text and ("tensorstore" in text or "orbax" in text))

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(not_a_straggler)


def versions() -> dict[str, str]:
    """The versions that a checkpoint names, for whoever has to read it later."""
    found = {}
    for name in ("rwkv_jax", "jax", "orbax-checkpoint"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def read_config(folder: Path) -> Config:
    """The config of the run in `folder`.

    Raises `StoreError` if there is no run, or one that this version of the package cannot read.
    """
    if not folder.is_dir():
        raise StoreError(f"{folder}: no such folder; give that of a run (its train.output)")
    path = folder / CONFIG
    if not path.is_file():
        raise StoreError(f"{folder}: holds no run (no {CONFIG}); give the folder of a run")
    try:
        return load_config(path)
    except ConfigError as error:
        version = versions().get("rwkv_jax", "this one")
        raise StoreError(
            f"{error}; the run is of another version of rwkv_jax, or its config was edited: use the"
            f" version that made it (here: {version})"
        ) from error


def load_run(folder: Path | str) -> tuple[models.Model[Array], ModelConfig, Tokenizer]:
    """The parameters of a run's newest checkpoint, its model and its tokenizer.

    Raises `UserError`, one line, if any of them is missing, damaged, or does not belong to the
    rest.
    """
    folder = Path(folder)
    cfg = read_config(folder)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    if not (folder / CHECKPOINTS).is_dir():
        raise _no_checkpoint(folder, cfg)
    with contextlib.closing(Store(folder / CHECKPOINTS)) as store:
        step = store.latest()
        if step is None:
            raise _no_checkpoint(folder, cfg)
        _check_belongs(folder, cfg, tokenizer, store.meta(step, "model", "tokenizer"))
        return store.restore_params(models.abstract_params(cfg.model), step), cfg.model, tokenizer


def _no_checkpoint(folder: Path, cfg: Config) -> StoreError:
    return StoreError(
        f"{folder}: has no checkpoint yet; the run writes one every"
        f" {cfg.train.checkpoint_every} steps and when it is stopped with Ctrl-C"
    )


def _check_belongs(folder: Path, cfg: Config, tokenizer: Tokenizer, meta: dict[str, Any]) -> None:
    """Raises `StoreError` if config or tokenizer are not those the checkpoint was made with."""
    # A setting that is younger than the run had its default's meaning.
    defaults = {key.name: key.default for key in dataclasses.fields(ModelConfig)}
    saved, now = defaults | meta["model"], dataclasses.asdict(cfg.model)
    for key in sorted({*saved, *now}):
        if saved[key] != now.get(key):
            raise StoreError(
                f"{folder / CONFIG}: model.{key} = {now.get(key)!r}, but the checkpoint was made"
                f" with {saved[key]!r}; put it back"
            )
    if tokenizer.identity() != meta["tokenizer"] or tokenizer.vocab_size > cfg.model.vocab_size:
        raise StoreError(
            f"{folder / TOKENIZER}: {tokenizer.identity()} ({tokenizer.vocab_size} ids) is not the"
            f" tokenizer of the checkpoint, {meta['tokenizer']} ({cfg.model.vocab_size} ids);"
            " put that one back"
        )
