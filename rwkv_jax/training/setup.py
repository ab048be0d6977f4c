"""Everything before the first step: the model and data of a run, its folder, and where it resumes.

Functions that read or write files are called through `run_on_all`, so that a process that cannot
read its files does not leave the others waiting.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from rwkv_jax import sharding
from rwkv_jax.checkpoint.fingerprint import fingerprint as model_fingerprint
from rwkv_jax.checkpoint.keymaps import check
from rwkv_jax.checkpoint.store import (
    CHECKPOINTS,
    CONFIG,
    TOKENIZER,
    DamagedError,
    Store,
    changed_tree,
    load_moments,
    read_config,
    sweep,
)
from rwkv_jax.checkpoint.weights import (
    check_tokenizer,
    load,
    load_base,
    naming,
    read,
    tokenizer_name,
)
from rwkv_jax.config import Config, ModelConfig, literal
from rwkv_jax.data.loader import Batching, Loader, open_loader
from rwkv_jax.data.sources import Data
from rwkv_jax.data.tokenizers import NAMES, open_tokenizer
from rwkv_jax.toml import TYPED
from rwkv_jax.training import hosts
from rwkv_jax.training.evaluations import NamedSets
from rwkv_jax.training.folder import RunError, claim, describe, is_trained, settings
from rwkv_jax.training.optimizer import from_the_start, optimizer_for
from rwkv_jax.training.state import (
    TrainState,
    abstract_train_state,
    from_trees,
    init_train_state,
    placed,
    to_trees,
)
from rwkv_jax.training.trainable import trained_by


@dataclass(frozen=True)
class Setup:
    """What stays the same during a run."""

    cfg: Config
    """With the vocabulary size and the number of steps filled in."""
    data: Data
    loader: Loader
    mesh: Mesh | None
    folder: Path
    sets: NamedSets = field(default_factory=NamedSets)

    @property
    def tokens_per_step(self) -> int:
        return self.cfg.train.batch * self.cfg.train.context


class _SharedRunError(RunError, hosts.SharedError):
    """A `RunError` that all processes raise."""


def shared_settings(cfg: Config) -> dict[str, str]:
    """The settings that all processes must agree on: paths of text and cache may differ."""
    own = {"data.source", "data.mixture", "data.cache"}
    return {name: literal(value) for name, value in settings(cfg).items() if name not in own}


def adopt(cfg: Config, stated: Mapping[str, str]) -> Config:
    """The config with the model and the tokenizer of the weights in `train.init`, if it names any.

    `stated` says where settings come from (`load_stated`). A version, if stated, and sizes from the
    command line must be those of the weights; sizes in a config file are overridden. So is a
    `data.tokenizer = "bpe"` in one, which would train a new tokenizer; any other that is stated
    must be the model's, if that is known. Raises `UserError` for one that differs, and for weights
    that cannot be read.
    """
    if not cfg.train.init and cfg.tune.method != "full":
        raise RunError(f'tune.method = "{cfg.tune.method}" tunes a model: name it in train.init')
    if not cfg.train.init:
        return cfg
    folder = Path(cfg.train.output).expanduser()
    if (folder / CONFIG).is_file() and is_trained(folder):
        run = read_config(folder)  # a run resumes without the weights
        if run.train.init == cfg.train.init:  # else it is another run, which `claim` rejects
            _check_agrees(cfg.model, stated, str(folder), run.model)
        own = run.data.tokenizer
        if own not in NAMES and not Path(own).expanduser().exists():
            own = str(folder / TOKENIZER)  # the weights, and a tokenizer beside them, may be gone
        name = _tokenizer(cfg.data.tokenizer, stated, str(folder), own)
        return _with(cfg, run.model, name)
    weights = read(cfg.train.init)
    with naming(weights.path):
        model = check(weights.tensors)
    _check_agrees(cfg.model, stated, cfg.train.init, model)
    own = tokenizer_name(weights, model.vocab_size)
    return _with(cfg, model, _tokenizer(cfg.data.tokenizer, stated, cfg.train.init, own))


def _with(cfg: Config, model: ModelConfig, tokenizer: str) -> Config:
    data = dataclasses.replace(cfg.data, tokenizer=tokenizer)
    return dataclasses.replace(cfg, model=model, data=data)


def _tokenizer(asked: str, stated: Mapping[str, str], name: str, own: str) -> str:
    """The tokenizer to train with: `own`, that of the weights `name`, if there is one. Raises
    `RunError` if another one was stated, or none is known."""
    where = stated.get("data.tokenizer")
    if asked == own or (asked == "bpe" and own and where != TYPED):
        return own
    if asked == "bpe":
        raise RunError(
            f"data.tokenizer = bpe: it would be a new one, whose ids mean nothing to {name};"
            + (" leave it out" if own else " name the one that the weights were trained with")
        )
    if own and where and _identity(own) != _identity(asked):
        raise RunError(
            f"data.tokenizer = {asked} ({where}) is {open_tokenizer(asked).identity()}, and the"
            f" tokenizer of {name} is {open_tokenizer(own).identity()}; leave data.tokenizer out"
        )
    return asked if where or not own else own


def _identity(name: str) -> str:
    """Equal for tokenizers that encode alike, whichever way they were opened."""
    return open_tokenizer(name).identity().split()[-1]


def _check_agrees(
    asked: ModelConfig, stated: Mapping[str, str], name: str, model: ModelConfig
) -> None:
    """Raises `RunError` if what was stated of the model differs from the one in `name`."""
    for key in dataclasses.fields(model):
        setting = f"model.{key.name}"
        wanted, found = getattr(asked, key.name), getattr(model, key.name)
        where = stated.get(setting)
        binding = where == TYPED or (where and key.name == "version")
        if not binding or wanted == found or (wanted == 0 and type(wanted) is int):  # 0: automatic
            continue
        remedy = f"add {setting}={found}" if where != TYPED else f"set {setting}={found}"
        raise RunError(
            f"{setting} = {literal(wanted)} ({where}), and {name} has {literal(found)}; {remedy},"
            " or start from other weights"
        )


def chosen_length(cfg: Config, stated: Mapping[str, str]) -> Config:
    """The config with one length: `train.epochs`, unless only `train.steps` was typed. Raises
    `RunError` if both were."""
    typed = [name for name in ("train.steps", "train.epochs") if stated.get(name) == TYPED]
    if len(typed) == 2:
        raise RunError("train.steps and train.epochs are both the run's length: leave one out")
    if typed == ["train.steps"]:
        cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, epochs=0.0))
    return cfg


def resolve(cfg: Config, data: Data) -> tuple[Config, Loader]:
    """The config with vocabulary size and number of steps filled in, and its batches.

    Raises `RunError` if the tokenizer has more ids than the model, or is not that of `train.init`,
    or for parameters to train that the model does not have, and `CorpusError` for data that
    `data.sampler` cannot read.
    """
    if cfg.train.init:
        check_tokenizer(
            data.tokenizer, cfg.model.vocab_size, f"data.tokenizer = {cfg.data.tokenizer}"
        )
    needed, given = data.tokenizer.vocab_size, cfg.model.vocab_size
    if given and given < needed:
        raise RunError(
            f"model.vocab_size = {given}: the tokenizer (data.tokenizer = {cfg.data.tokenizer})"
            f" has {needed} ids; give at least that, or 0"
        )
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, vocab_size=given or needed),
        data=dataclasses.replace(cfg.data, field=data.field or cfg.data.field),
    )
    trained_by(cfg)  # refuses names that the model does not have
    train = cfg.train
    batching = Batching(
        seed=train.seed,
        batch=train.batch,
        context=train.context,
        vocab_size=cfg.model.vocab_size,
        sampler=cfg.data.sampler,
        packing=cfg.data.packing,
        reset=cfg.data.reset,
    )
    loader = open_loader(data.streams, batching)
    if (train.keep_best or train.patience) and not len(data.heldout) and not cfg.eval.texts:
        raise RunError(
            "train.keep_best and train.patience compare evaluations on held-out text, and there is"
            f" none (data.heldout = {cfg.data.heldout}); hold some out, or give eval.texts"
        )
    if train.epochs:
        steps = max(1, round(train.epochs * sum(loader.epoch) / train.batch))
        cfg = dataclasses.replace(cfg, train=dataclasses.replace(train, steps=steps))
    elif not train.steps:
        steps = -(-cfg.data.exit_tokens // (train.batch * train.context))
        if cfg.data.sampler == "magic_prime":
            steps = min(steps, loader.epoch[0] // train.batch)  # where the official trainer stops
        if not steps:
            raise RunError(
                f"train.batch = {train.batch} is more than the {loader.epoch[0]:,} samples of the"
                " official order; lower it, or state train.steps"
            )
        cfg = dataclasses.replace(cfg, train=dataclasses.replace(train, steps=steps))
    if train.evaluations:
        every = max(1, cfg.train.steps // train.evaluations)
        resolved = dataclasses.replace(cfg.train, eval_every=every, evaluations=0)
        cfg = dataclasses.replace(cfg, train=resolved)
    return cfg, loader


def fingerprint(data: Data) -> str:
    """Equal for runs that read the same ids of the same tokenizer, split alike."""
    parts = [data.tokenizer.identity(), data.train_tokens, len(data.heldout), data.digest]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()


@contextlib.contextmanager
def open_folder(cfg: Config, data: Data) -> Iterator[tuple[Path, Store]]:
    """The run's folder, which the first process locks, and its checkpoints.

    At the end, waits for checkpoints being written, unless this process alone has failed: the
    others do not know of that, and would not take part.
    """
    with contextlib.ExitStack() as stack:
        folder = hosts.run_on_all(_claim, cfg, data, stack)
        store = Store(folder / CHECKPOINTS, cfg.train.keep)
        try:
            yield folder, store
            hosts.wait_for_all()  # no process exits while another still writes
        except BaseException as error:
            if hosts.is_shared(error):
                store.close()
            raise
        store.close()


def _claim(cfg: Config, data: Data, stack: contextlib.ExitStack) -> Path:
    if not hosts.is_primary():
        return Path(cfg.train.output).expanduser()
    folder = stack.enter_context(claim(cfg))
    if not (folder / CONFIG).exists():
        describe(folder, cfg, data)  # first of all, so that a kill at any moment leaves a run
    sweep(folder / CHECKPOINTS)
    return folder


def schedule_change(folder: Path, cfg: Config, step: int) -> str:
    """What happens to the learning rate if a run resumes after `step` with another schedule than it
    had; empty if nothing does."""
    before = read_config(folder)
    if before.train.steps == cfg.train.steps:
        return ""
    was, now = (f"{float(optimizer_for(x).learning_rate(step)):.3g}" for x in (before, cfg))
    changed = f"{now}, not {was}" if was != now else f"{now} as before"
    return (
        f"ends at step {cfg.train.steps:,} now, not at {before.train.steps:,}: the rate of step"
        f" {step + 1:,} is {changed}"
    )


def start_or_resume(
    setup: Setup, store: Store, console: Console
) -> tuple[int, TrainState, dict[str, Any]]:
    """Step, training state and meta of the newest readable checkpoint, or those of a new run."""
    cfg, step = setup.cfg, store.latest()
    if step is None:
        given, base = hosts.run_on_all(_given, cfg)
        state = init_train_state(cfg, given, setup.mesh)
        if cfg.train.init_moments:
            wanted = abstract_train_state(cfg, setup.mesh).opt_state
            moments = hosts.run_on_all(load_moments, cfg.train.init, wanted)
            state = dataclasses.replace(state, opt_state=from_the_start(moments))
        return 0, state, {"base": base}
    step, state, meta = _restore(setup, store, step, console)
    if meta["data"] != fingerprint(setup.data):
        raise _SharedRunError(
            f"{setup.folder}: was trained on other text than data.source = {cfg.data.source} gives"
            " now, or with another tokenizer; restore that text, or choose another train.output"
            + _older_mask(cfg)
        )
    if step > cfg.train.steps:
        length = f"train.epochs = {cfg.train.epochs}: " if cfg.train.epochs else ""
        raise _SharedRunError(
            f"{length}train.steps = {cfg.train.steps}: {setup.folder} is at step {step} already;"
            " give more of them, or choose another train.output"
        )
    return step, state, meta


def _given(cfg: Config, needed: str = "") -> tuple[Any, str]:
    """The parameters in `train.init`, on the host's default device, or None if it is empty; and,
    for an adapter, their fingerprint, which must be the one that is `needed`."""
    if not cfg.train.init:
        return None, ""
    if cfg.tune.method == "full":
        return load(cfg.train.init, dtype=jnp.float32)[0], ""
    params, model = load_base(cfg)
    found = model_fingerprint(params, model)
    if needed and needed != found:
        raise RunError(
            f"train.init = {cfg.train.init}: these are other weights ({found}) than the run tunes"
            f" ({needed}); name those, or choose another train.output"
        )
    return params, found


def _older_mask(cfg: Config) -> str:
    """How a run resumes whose replies were trained without what ends them."""
    data = cfg.data
    if (data.train_on != "answers" and data.template != "flower") or not data.train_stops:
        return ""
    return " (a run of before December 2026 resumes with data.train_stops=false)"


def _with_base(setup: Setup, state: TrainState, meta: dict[str, Any]) -> TrainState:
    """A state that was restored, with the frozen weights that an adapter belongs to."""
    cfg = setup.cfg
    if cfg.tune.method == "full":
        return state
    base, _ = hosts.run_on_all(_given, cfg, meta.get("base", ""))
    return dataclasses.replace(state, base=placed(base, cfg, setup.mesh))


def _restore(
    setup: Setup, store: Store, step: int, console: Console
) -> tuple[int, TrainState, dict[str, Any]]:
    """The newest checkpoint that all processes can read; damaged ones after it are set aside.

    Raises `RunError` if there is none.
    """

    abstract = abstract_train_state(setup.cfg, setup.mesh)

    def read() -> tuple[dict[str, Any], dict[str, Any]] | DamagedError:
        try:
            trees = store.restore(to_trees(abstract), step)
            return trees, store.meta(step, "data", "window", "seconds")
        except DamagedError as error:
            return error

    while True:
        found = hosts.run_on_all(read)
        reports = hosts.allgather_text(str(found) if isinstance(found, DamagedError) else "")
        damage = next(filter(None, reports), "")
        if not damage:
            assert not isinstance(found, DamagedError)
            trees, meta = found
            with sharding.use_mesh(setup.mesh):
                damage = changed_tree(trees, meta)
            if not damage:
                return step, _with_base(setup, from_trees(trees), meta), meta
            damage = f"{store.path(step)}: {damage}"
        before = store.latest(before=step)
        if before is None:
            raise _SharedRunError(damage)
        aside = hosts.run_on_primary(store.set_aside, step)
        store.reload()
        text = f"{damage.rpartition(';')[0]}\nkept as {aside}; resuming from step {before:,}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        step = before
