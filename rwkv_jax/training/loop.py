"""The training loop: set-up, resume, steps, checkpoints, evaluations, and a final sample.

The loop dispatches a step, reads the next batch while the device computes, and then looks at the
report of the step before: the device never waits for the host. Everything that decides what comes
next is in the checkpoint (arrays, and a few numbers beside them), and batches follow from seed and
step. So a run that is stopped anywhere and started again equals, bit for bit, one that never
stopped.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from rwkv_jax import console as show
from rwkv_jax import sharding
from rwkv_jax.checkpoint.store import CHECKPOINTS, Store, checksums_of, load_saved, versions
from rwkv_jax.config import Config
from rwkv_jax.data.loader import prefetched
from rwkv_jax.data.sources import open_data
from rwkv_jax.errors import within_memory
from rwkv_jax.evaluation import bits, tasks
from rwkv_jax.interrupts import StopRequest, stop_requests
from rwkv_jax.training import hosts
from rwkv_jax.training.evaluations import open_sets
from rwkv_jax.training.export import export
from rwkv_jax.training.folder import describe, writing
from rwkv_jax.training.mesh import LocalRows, gather_to_host, make_mesh, with_stop_vote
from rwkv_jax.training.objective import Objective, implementation, objective
from rwkv_jax.training.report import Report, print_sample
from rwkv_jax.training.setup import (
    Setup,
    adopt,
    chosen_length,
    fingerprint,
    open_folder,
    resolve,
    schedule_change,
    shared_settings,
    start_or_resume,
)
from rwkv_jax.training.state import TrainState, to_trees
from rwkv_jax.training.step import Metrics, describe_nonfinite, make_train_step
from rwkv_jax.training.tracer import Tracer
from rwkv_jax.training.trainable import trained_by

LESS_MEMORY = "lower train.batch or model.width, raise train.accumulate, or set train.remat=block"


class NonFiniteError(hosts.SharedError):
    """Training diverged: a loss or a gradient is infinite or not a number."""


def train(
    cfg: Config,
    *,
    stated: Mapping[str, str] | None = None,
    console: Console | None = None,
    profile: bool = False,
    objective: Objective = objective,
) -> Path:
    """Trains as `cfg` says, and resumes the run in `train.output` if there is one; returns that
    folder.

    With `train.init` its weights determine the model, not `cfg.model`; `stated`, from
    `load_stated`, holds the settings that the user wrote, which must match. With `profile` some
    steps are traced into `profile` of that folder. `objective` is minimised
    (`rwkv_jax.training.objective`).

    Raises `UserError` for whatever the user can fix (`NonFiniteError` if training diverged), and
    `Interrupted` after the first SIGINT or SIGTERM, once a checkpoint is saved.
    """
    console = console or show.LastingConsole(quiet=not hosts.is_primary())
    hosts.check_equal(shared_settings(cfg), "start all with the same settings")
    cfg = hosts.run_on_all(adopt, chosen_length(cfg, stated or {}), stated or {})
    mesh = hosts.run_on_all(make_mesh, cfg)
    data = hosts.run_on_all(open_data, cfg.data, progress=hosts.is_primary())
    cfg, loader = hosts.run_on_all(resolve, cfg, data)
    sets = hosts.run_on_all(open_sets, cfg, data.tokenizer)
    texts = {"text": fingerprint(data), "eval.texts": sets.digest}
    hosts.check_equal(texts, "give all of them the same text")
    with open_folder(cfg, data) as (folder, store), within_memory(LESS_MEMORY):
        setup = Setup(cfg, data, loader, mesh, folder, sets)
        step, state, meta = start_or_resume(setup, store, console)
        change = hosts.run_on_primary(schedule_change, folder, cfg, step) if step else ""
        hosts.run_on_primary(describe, folder, cfg, data)
        report = hosts.run_on_all(Report, setup, console, step, meta)
        best = Best(*meta.get("best", ()))
        if cfg.train.keep_best and best.step and best.step not in store.steps():
            best = Best()  # the run did not keep it then
        store.marked |= {best.step} & {*store.steps()} if cfg.train.keep_best else set()
        pending = meta.get("owed", not step and bool(cfg.train.init))
        run = Run(setup, store, report, state, step, pending, best, meta.get("base", ""))
        with contextlib.closing(report):
            report.header(step, change or "")
            with writing(folder), stop_requests() as stop:
                _train_steps(run, make_train_step(cfg, objective), stop, profile)
            try:
                _finish(run, console)
            except KeyboardInterrupt:
                raise hosts.Interrupted(
                    f"Stopped after the last step, which is saved in {folder};"
                    " the same command evaluates it."
                ) from None
    return folder


@dataclass
class Run:
    """A run that can be resumed from here: its setup, stores and the state after a step."""

    setup: Setup
    store: Store
    report: Report
    state: TrainState
    step: int
    eval_pending: bool
    """An evaluation was due where the run was stopped, or before its first step."""
    best: "Best"
    base: str = ""
    """The fingerprint of the weights that an adapter is made for."""

    @property
    def exhausted(self) -> bool:
        """Whether evaluations have got no better for so long that the run ends."""
        patience = self.setup.cfg.train.patience
        return bool(patience) and self.best.since >= patience

    @property
    def why_it_ends(self) -> str:
        """Why the run is `exhausted`."""
        return (
            f"no evaluation was better than that of step {self.best.step} in the last"
            f" {self.best.since}: the run ends (train.patience ="
            f" {self.setup.cfg.train.patience})"
        )

    @property
    def measures(self) -> bool:
        """Whether there is anything to evaluate on."""
        sets = self.setup.sets
        return bool(self.setup.data.heldout_bytes or sets.texts or sets.questions)


@dataclass
class Best:
    """The best evaluation so far."""

    count: int = 0
    """Evaluations so far."""
    step: int = 0
    value: float = math.inf
    since: int = 0
    """Evaluations after it."""

    def add(self, step: int, value: float) -> bool:
        """Counts one more; whether it is the best."""
        better = value < self.value
        self.count, self.since = self.count + 1, 0 if better else self.since + 1
        if better:
            self.step, self.value = step, value
        return better


def _train_steps(run: Run, train_step: Callable, stop: StopRequest, profile: bool) -> None:
    train, mesh, report = run.setup.cfg.train, run.setup.mesh, run.report
    several, first = jax.process_count() > 1, run.step
    if mesh and several:
        step = with_stop_vote(train_step, mesh)
    else:
        step = lambda state, batch, _: (*train_step(state, batch), 0)  # noqa: E731
    eval_every = train.eval_every if run.measures else 0
    folder = run.setup.folder / "profile" if profile else None
    tracer = Tracer(folder, train.steps - first, report.ticker)
    read = run.setup.loader.read if mesh is None else LocalRows(run.setup.loader, mesh).read
    coming = prefetched(read, range(first, train.steps))
    pending: tuple[int, Metrics, Any] | None = None
    if run.eval_pending and run.measures and not run.exhausted:
        _evaluate(run, limit=train.eval_tokens)
    if run.exhausted:
        report.ticker.line(f"{run.why_it_ends}; raise it to resume")
        return
    with (
        report.ticker.running(first),
        contextlib.closing(coming),
        contextlib.closing(tracer),
    ):
        for batch in report.timer.batches(coming):
            with sharding.use_mesh(mesh):
                run.state, metrics, votes = step(run.state, batch, stop.requested)
            run.step += 1
            tracer.step(run.step - first, run.state)
            # Several processes stop at the same step: the one after that which counted the votes.
            stops = bool(not several and stop.requested)
            if pending:
                stops |= _record(run, *pending)
            pending = run.step, metrics, votes
            last = run.step == train.steps
            compares = bool(train.keep_best or train.patience) and run.measures
            evaluates = compares if last else _is_due(run.step, eval_every)
            saves = last or stops or _is_due(run.step, train.checkpoint_every)
            if not (evaluates or saves):
                continue
            _record(run, *pending)
            pending = None
            if evaluates and not stops:
                report.ticker.activity("evaluating")
                with report.timer.pause("evaluating"):
                    best = _evaluate(run, limit=train.eval_tokens)
                saves |= run.exhausted or (best and train.keep_best)
            if saves:
                with report.timer.pause("saving"):
                    _save(run, eval_pending=evaluates and stops)
            if run.exhausted and not stops:
                run.store.wait()
                report.ticker.line(run.why_it_ends)
                return
            if stops:
                run.store.wait()
                then = "evaluates it" if last else "resumes from there"
                raise hosts.Interrupted(
                    f"Stopped after step {run.step:,} of {train.steps:,}, saved in"
                    f" {run.setup.folder}; the same command {then}.",
                    shared=True,
                )


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _record(run: Run, step: int, metrics: Metrics, votes: Any) -> bool:
    """Reports a step, waiting until it is done; returns whether a process asked to stop."""
    metrics, votes = jax.device_get((metrics, votes))
    if not metrics.finite:
        raise NonFiniteError(_diverged(run, step, metrics))
    run.report.step(step, metrics)
    return bool(votes > 0)


def _diverged(run: Run, step: int, metrics: Metrics) -> str:
    run.store.wait()
    cfg = run.setup.cfg
    trained = trained_by(cfg).take(run.state.params)
    saved = "no checkpoint was saved yet"
    if (good := run.store.latest()) is not None:
        saved = f"the last good checkpoint is {run.setup.folder / CHECKPOINTS / str(good)}"
    return (
        f"step {step}: {describe_nonfinite(metrics, trained)}; {saved}:"
        " lower optimizer.peak_lr (another train.output), or raise optimizer.warmup_steps"
    )


def _save(run: Run, eval_pending: bool) -> None:
    """Starts to write a checkpoint, and draws the curve."""
    cfg, data = run.setup.cfg, run.setup.data
    meta = {
        "step": run.step,
        "seed": cfg.train.seed,
        "data": fingerprint(data),
        **run.report.meta(),
        "owed": eval_pending,
        "best": list(dataclasses.astuple(run.best)),
        "base": run.base,
        "model": dataclasses.asdict(cfg.model),
        "tokenizer": data.tokenizer.identity(),
        "versions": versions(),
    }
    if run.store.latest() != run.step:
        trees = to_trees(run.state)
        with sharding.use_mesh(run.setup.mesh):
            meta["checksums"] = checksums_of(trees)
        run.store.save(run.step, trees, meta)
    run.report.curve()


def _evaluate(
    run: Run,
    *,
    limit: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **extra: Any,
) -> bool:
    """Evaluates on about `limit` held-out tokens (0: all) and the sets of `[eval]`, and reports it;
    returns whether it is the best evaluation so far."""
    cfg, data = run.setup.cfg, run.setup.data
    settings = bits.Settings(
        cfg.model,
        rows=cfg.train.batch // cfg.train.accumulate,
        window=cfg.train.context,
        dtype=cfg.train.dtype,
        implementation=implementation(cfg.train),
    )
    result = None
    with sharding.use_mesh(run.setup.mesh):
        model = run.state.model
        if data.heldout_bytes:
            result = bits.evaluate(model, data, settings, limit=limit, report=progress)
        texts = {
            name: bits.evaluate(model, text, settings)
            for name, text in run.setup.sets.texts.items()
        }
    questions = _answers(run, settings)
    run.report.evaluation(run.step, result, texts, questions, **extra)
    if "final" in extra or not (result or texts):
        return False
    compared = [result] if result else [*texts.values()]
    values = [x.trained_loss if x.trained_tokens else x.bits_per_byte for x in compared]
    is_best = run.best.add(run.step, sum(values) / len(values))
    if is_best and cfg.train.keep_best:
        run.store.marked.clear()
        run.store.marked.add(run.step)
    return is_best


def _merged(run: Run) -> Any:
    with sharding.use_mesh(run.setup.mesh):
        return run.state.merged


def _answers(run: Run, settings: bits.Settings) -> dict[str, tasks.Result]:
    """The scores on files of questions. A collective; of several processes the first one knows."""
    sets = run.setup.sets.questions
    if not sets:
        return {}
    params = _merged(run)
    if run.setup.mesh is not None:
        params = gather_to_host(params)
        if not hosts.is_primary():
            return {}
    tokenizer = run.setup.data.tokenizer
    return {
        name: score(params, questions, settings, tokenizer=tokenizer)
        for name, (score, questions) in sets.items()
    }


def _export(run: Run) -> None:
    """Writes what was tuned for others to read: the best that was kept (by a single process), or
    the last step's."""
    setup, step, state = run.setup, run.step, run.state
    if setup.cfg.train.keep_best and run.best.step and jax.process_count() == 1:
        step = run.best.step
        kept = load_saved(setup.folder / CHECKPOINTS / str(step)).params
        place = lambda x, like: jax.device_put(x, like.sharding)  # noqa: E731
        state = dataclasses.replace(state, params=jax.tree.map(place, kept, state.params))
    with sharding.use_mesh(setup.mesh):
        tuned = state.change
    tuned = tuned if setup.mesh is None else gather_to_host(tuned)
    with writing(setup.folder):
        path = hosts.run_on_primary(export, setup.folder, setup.cfg, tuned, run.base)
    run.report.ticker.line(f"what step {step:,} has tuned, for other programs: {path}")


def _finish(run: Run, console: Console) -> None:
    """Evaluates on all held-out text, beside compressors, and prints a summary and a sample."""
    setup, report = run.setup, run.report
    if run.measures:
        marks = {}
        whole = setup.data.heldout_bytes and setup.data.heldout_mask is None
        if hosts.is_primary() and whole:  # else not all is learnt
            with console.status("compressing the held-out text with gzip -9 and xz -9"):
                marks = bits.compressors(setup.data.heldout_text())
        with (
            report.timer.pause("evaluating"),
            show.counting(console, "evaluating", "held-out tokens") as progress,
        ):
            _evaluate(run, progress=progress, final=True, compressors=marks)
        name = f"RWKV-{setup.cfg.model.version} (this run)"
        if marks:
            show.comparison(console, {name: report.heldout_bpb, **marks}, best=name)
    report.summary()
    if setup.cfg.train.keep_best and run.best.count:
        path = setup.folder / CHECKPOINTS / str(run.best.step)
        kept = f"that of step {run.best.step:,}, kept as {path}"
        of_init = "that of the weights it started from"
        report.ticker.line(f"the best evaluation is {kept if run.best.step else of_init}")
    with writing(setup.folder):
        report.curve()
    if run.state.base is not None:
        _export(run)
    if setup.cfg.sample.tokens:
        # The parameters alone: decoding makes a copy of them, in place of the moments.
        params, run.state = _merged(run), None  # pyright: ignore[reportAttributeAccessIssue]
        print_sample(setup, params, console)
    events = ", events" * setup.cfg.train.tensorboard
    report.ticker.line(f"\n{setup.folder}: checkpoints, metrics.jsonl, loss.png{events}")
