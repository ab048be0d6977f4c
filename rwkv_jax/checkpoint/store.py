"""Checkpoints of a run, and a run's folder read back for sampling.

    RUN/config.toml        the resolved config
    RUN/tokenizer/         the tokenizer it was trained with
    RUN/checkpoints/STEP/  `params`, `rest` (step, optimizer) and `meta` (JSON)
    RUN/metrics.jsonl, RUN/loss.png

A checkpoint appears under its name only when all of it is on disk, so a kill leaves the earlier
ones whole; what an interrupted save left behind is removed at the next start. Parameters are an
item of their own: sampling reads them without the optimizer's moments, which are twice as large.
"""

import contextlib
import copy
import dataclasses
import errno
import functools
import importlib.metadata
import itertools
import os
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from rwkv_jax import disk, models, tuning
from rwkv_jax.checkpoint import orbax_quirks
from rwkv_jax.checkpoint.checksums import changed, checksums
from rwkv_jax.config import Config, ConfigError, ModelConfig
from rwkv_jax.data.tokenizers import Tokenizer, load_tokenizer
from rwkv_jax.errors import UserError
from rwkv_jax.params import abstract as abstract_of
from rwkv_jax.params import path_name
from rwkv_jax.toml import load_config
from rwkv_jax.typing import PyTree

CONFIG, TOKENIZER, CHECKPOINTS = "config.toml", "tokenizer", "checkpoints"
TREES, META = ("params", "rest"), "meta"
"""The items of a checkpoint: trees of arrays, and JSON."""


class StoreError(UserError):
    """A run or a checkpoint that cannot be read or written."""


class DamagedError(StoreError):
    """A checkpoint that is not what was saved."""


class Store:
    """The newest `keep` checkpoints in a folder, and those that are `marked`; `keep` 0 opens them
    for reading only.

    A checkpoint is a tree of arrays for each name of `TREES`, and a JSON object. Saving is
    asynchronous: its errors are raised by the next `save`, `wait` or `close`.
    """

    def __init__(self, folder: Path, keep: int = 0):
        self.folder = folder.absolute()
        self.marked: set[int] = set()
        """Steps that are kept however old they are."""
        items = (*TREES, META)
        with _writing(self.folder):
            self._manager = orbax_quirks.open_manager(self.folder, keep, items, self.marked)
            self._reader = self._manager
            if jax.process_count() > 1:
                self._reader = orbax_quirks.open_reader(self.folder, items)

    def save(self, step: int, trees: Mapping[str, PyTree], meta: dict[str, Any]) -> None:
        """Starts to write a checkpoint; arrays may be donated, and `meta` changed, as soon as this
        returns.

        Raises `StoreError` if it, or the one before it, cannot be written.
        """
        # A copy: Orbax turns it into JSON in the background, while the next steps change it.
        items: dict[str, Any] = {META: ocp.args.JsonSave(copy.deepcopy(meta))}
        items |= {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        with _writing(self.folder):
            # Orbax would silently skip the second of two concurrent saves.
            self._manager.wait_until_finished()
            self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, abstract: Mapping[str, PyTree], step: int) -> dict[str, PyTree]:
        """The named trees of a step; `abstract` gives their shapes, types and shardings.

        Raises `StoreError` if they cannot be read, `DamagedError` if they do not fit.
        """
        with _reading(self.path(step)):
            older = _lacks_new_fields(self.path(step))
            wanted = {name: _without_new_fields(x) if older else x for name, x in abstract.items()}
            items = {name: ocp.args.StandardRestore(_placed(x)) for name, x in wanted.items()}
            found = self._reader.restore(step, args=ocp.args.Composite(**items))
            return {name: _with_new_fields(x, found[name]) for name, x in abstract.items()}

    def meta(self, step: int, *needed: str) -> dict[str, Any]:
        """The JSON object of a step.

        Raises `StoreError` if it cannot be read, `DamagedError` if it lacks a `needed` key.
        """
        items = ocp.args.Composite(**{META: ocp.args.JsonRestore()})
        with _reading(self.path(step)):
            found = self._reader.restore(step, args=items)[META]
            for name in needed:
                if name not in found:
                    raise ValueError(f"its meta has no {name}")
            return found

    def latest(self, before: int | None = None) -> int | None:
        """The step of the newest complete checkpoint, or of the newest `before` a step."""
        if before is None:
            return self._manager.latest_step()
        return max((step for step in self._manager.all_steps() if step < before), default=None)

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints."""
        return sorted(self._manager.all_steps())

    def path(self, step: int) -> Path:
        """The folder of a checkpoint."""
        return self.folder / str(step)

    def set_aside(self, step: int) -> Path:
        """Renames a damaged checkpoint so that it no longer counts as one; returns its new path.

        Of several processes the first one calls it, and then all of them `reload`.
        """
        names = (f"damaged-{step}{'-' * bool(n)}{n or ''}" for n in itertools.count())
        aside = next(self.folder / name for name in names if not (self.folder / name).exists())
        with _writing(self.folder):
            self.path(step).rename(aside)
        return aside

    def reload(self) -> None:
        """Reads the folder's list of checkpoints again."""
        self._manager.reload()

    def wait(self) -> None:
        """Returns when everything is on disk. Raises `StoreError` if it cannot be."""
        with _writing(self.folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being written, then closes the folder."""
        with _writing(self.folder):
            self._manager.close()
            if self._reader is not self._manager:
                self._reader.close()


NEW_FIELD = "time_state"
"""Of a time mix of versions 5 and 7, since December 2026; mostly None. Orbax wants the fields that
were saved, no more and no less."""


def _lacks_new_fields(checkpoint: Path) -> bool:
    """Whether a checkpoint was saved before `NEW_FIELD` was there."""
    handler: Any = ocp.StandardCheckpointHandler()
    saved = handler.metadata(checkpoint / "params").tree
    return "blocks" in saved and NEW_FIELD not in saved["blocks"]["att"]


def _is_model(x: object) -> bool:
    return isinstance(x, models.Model)


def _without_new_fields(tree: PyTree) -> PyTree:
    """The tree with models as nested dictionaries, as Orbax stores them."""

    def fields(model: PyTree) -> PyTree:
        if not _is_model(model):
            return model
        nested: dict[str, Any] = {}
        for path, x in jax.tree_util.tree_leaves_with_path(model, is_leaf=lambda x: x is None):
            *homes, name = path_name(path).split(".")
            if name != NEW_FIELD:
                functools.reduce(lambda at, home: at.setdefault(home, {}), homes, nested)[name] = x
        return nested

    return jax.tree.map(fields, tree, is_leaf=_is_model)


def _with_new_fields(like: PyTree, tree: PyTree) -> PyTree:
    """The inverse: the tree with models where `like` has them."""

    def model(one: PyTree, found: PyTree) -> PyTree:
        if not _is_model(one) or _is_model(found):
            return found
        paths = [path_name(path).split(".") for path, _ in jax.tree.leaves_with_path(one)]
        leaves = [functools.reduce(lambda at, key: at[key], path, found) for path in paths]
        return jax.tree.unflatten(jax.tree.structure(one), leaves)

    return jax.tree.map(model, like, tree, is_leaf=_is_model)


def sweep(folder: Path) -> None:
    """Removes what interrupted saves left in a folder of checkpoints."""
    with _writing(folder):
        for left in folder.glob(f"*{orbax_quirks.UNFINISHED}*"):
            shutil.rmtree(left)


def _placed(abstract: PyTree) -> PyTree:
    """The tree with a sharding for every array: its own, or the first device. Arrays may have been
    saved with other ones."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or first), abstract
    )


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns a failure of the file system into a `StoreError`."""
    with (
        disk.writing(
            folder,
            "choose another train.output",
            full="free some space and start again; earlier checkpoints are whole",
            error=StoreError,
        ),
        orbax_quirks.file_errors(folder),
    ):
        yield


@contextlib.contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    """Turns whatever a damaged checkpoint raises into a `DamagedError`. Lack of memory passes as it
    is, and a failing disk is a `StoreError`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise
        number = getattr(error, "errno", None)
        if number not in (None, errno.ENOENT):
            raise StoreError(
                f"{checkpoint}: cannot be read ({os.strerror(number)}); check that the disk is"
                " connected and that you may read it"
            ) from error
        cause: BaseException = error
        while inner := cause.__cause__ or cause.__context__:
            cause = inner
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        reason = textwrap.shorten(reason, 120, placeholder=" ...")
        raise DamagedError(
            f"{checkpoint}: damaged or of another shape ({reason}); restore it from a copy, or"
            " move it away to use the checkpoint before it"
        ) from error


def versions() -> dict[str, str]:
    """The package versions that a checkpoint records, so that a later reader knows them."""
    found = {}
    for name in ("rwkv_jax", "jax", "orbax-checkpoint"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def read_config(folder: Path) -> Config:
    """The config of the run in `folder`.

    Raises `StoreError` if there is none, or this version of the package cannot read it.
    """
    if not folder.is_dir():
        raise StoreError(f"{folder}: no such folder; name the folder of a run (its train.output)")
    path = folder / CONFIG
    if not path.is_file():
        raise StoreError(f"{folder}: holds no run (no {CONFIG}); name the folder of a run")
    try:
        return load_config(path)
    except ConfigError as error:
        version = versions().get("rwkv_jax", "this one")
        raise StoreError(
            f"{error}; the run is of another version of rwkv_jax, or its config was edited: use the"
            f" version that made it (this is {version})"
        ) from error


class Run(NamedTuple):
    """A run as a model: its folder, and the step of a checkpoint; None: the newest one."""

    folder: Path
    step: int | None = None


def find_run(path: Path | str) -> Run | None:
    """What `RUN` or `RUN/checkpoints/STEP` names; None if it is neither."""
    path = Path(path).expanduser()
    if (path / CONFIG).is_file():
        return Run(path)
    folder = path.absolute()
    place, folder = folder.parent.name, folder.parent.parent
    if path.name.isdecimal() and place == CHECKPOINTS and (folder / CONFIG).is_file():
        return Run(folder, int(path.name))
    return None


class Saved(NamedTuple):
    """A checkpoint of a run: what it trained, the model's parameters or an adapter; its config and
    tokenizer; and the fingerprint of the weights that an adapter belongs to."""

    folder: Path
    params: Any
    config: Config
    tokenizer: Tokenizer
    base: str


def load_saved(path: Path | str) -> Saved:
    """A run's newest checkpoint, or the one that is named (`find_run`).

    Raises `UserError` if one of them is missing, damaged, or does not belong to the others.
    """
    folder, wanted = find_run(path) or Run(Path(path))
    cfg = read_config(folder)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    if not (folder / CHECKPOINTS).is_dir():
        raise _no_checkpoint(folder, cfg)
    with contextlib.closing(Store(folder / CHECKPOINTS)) as store:
        step = store.latest() if wanted is None else wanted
        if step is None:
            raise _no_checkpoint(folder, cfg)
        if not store.path(step).is_dir():
            raise StoreError(
                f"{store.path(step)}: no such checkpoint; the run has {store.steps() or 'none'}"
            )
        meta = store.meta(step, "model", "tokenizer")
        _check_belongs(folder, cfg, tokenizer, meta)
        specs = models.specs(cfg.model)
        if cfg.tune.method != "full":
            try:
                specs = tuning.specs(cfg.model, cfg.tune)
            except ValueError as error:
                raise StoreError(f"{folder / CONFIG}: {error}; set it back") from None
        abstract = {"params": abstract_of(specs)}
        trees = store.restore(abstract, step)
        if damage := changed_tree(trees, meta):
            raise DamagedError(f"{store.path(step)}: {damage}")
        return Saved(folder, trees["params"], cfg, tokenizer, meta.get("base", ""))


def checksums_of(trees: Mapping[str, PyTree]) -> dict[str, list[int]]:
    """The checksums that `meta` keeps of a checkpoint's trees. With a mesh in context on which the
    arrays are, a collective."""
    return {name: checksums(tree) for name, tree in trees.items()}


def changed_tree(trees: Mapping[str, PyTree], meta: Mapping[str, Any]) -> str:
    """What of a checkpoint is not what was saved, and the remedy; empty if all is, or if a
    version without checksums wrote it. A collective, as `checksums_of`."""
    for name, expected in meta.get("checksums", {}).items():
        if name in trees and (array := changed(trees[name], expected)):
            return (
                f"damaged since it was saved (the checksum of {name}.{array} differs); restore it"
                " from a copy, or move it away to use the checkpoint before it"
            )
    return ""


def load_moments(path: Path | str, abstract: PyTree) -> PyTree:
    """The optimizer's state of the checkpoint that a path names (`find_run`); `abstract` gives the
    shapes, types and shardings that it must have. Raises `StoreError` if it has others."""
    run = find_run(path)
    if run is None:
        raise StoreError(
            f"{path}: has no optimizer's moments: they are in the checkpoints of runs only; name"
            " one, or set train.init_moments = false"
        )
    with contextlib.closing(Store(run.folder / CHECKPOINTS)) as store:
        step = store.latest() if run.step is None else run.step
        if step is None:
            raise _no_checkpoint(run.folder, read_config(run.folder))
        try:
            trees = {"rest": {"step": jax.ShapeDtypeStruct((), "int32"), "opt_state": abstract}}
            found = store.restore(trees, step)
        except DamagedError as error:
            before = read_config(run.folder)
            raise StoreError(
                f"{store.path(step)}: its moments are damaged, or of another optimizer or other"
                f" parameters than optimizer.name = {before.optimizer.name}, train.freeze ="
                f" {before.train.freeze}, train.carry_state = {before.train.carry_state}: state"
                " these, or set train.init_moments = false"
            ) from error
        if damage := changed_tree(found, store.meta(step)):
            raise DamagedError(f"{store.path(step)}: {damage}")
        return found["rest"]["opt_state"]


def _no_checkpoint(folder: Path, cfg: Config) -> StoreError:
    return StoreError(
        f"{folder}: has no checkpoint yet; the run writes one every"
        f" {cfg.train.checkpoint_every} steps, and when it is stopped with Ctrl-C"
    )


def _check_belongs(folder: Path, cfg: Config, tokenizer: Tokenizer, meta: dict[str, Any]) -> None:
    """Raises `StoreError` if config or tokenizer differ from those of the checkpoint."""
    # A setting that is newer than the run had its default value then.
    defaults = {key.name: key.default for key in dataclasses.fields(ModelConfig)}
    saved, now = defaults | meta["model"], dataclasses.asdict(cfg.model)
    for key in sorted({*saved, *now}):
        if saved[key] != now.get(key):
            raise StoreError(
                f"{folder / CONFIG}: model.{key} = {now.get(key)!r}, but the checkpoint was made"
                f" with {saved[key]!r}; set it back"
            )
    if tokenizer.identity() != meta["tokenizer"] or tokenizer.vocab_size > cfg.model.vocab_size:
        raise StoreError(
            f"{folder / TOKENIZER}: {tokenizer.identity()} ({tokenizer.vocab_size} ids) is not the"
            f" tokenizer of the checkpoint, {meta['tokenizer']} ({cfg.model.vocab_size} ids);"
            " restore that one"
        )
