"""`train(cfg)`: the whole of a run, from a config to a sample of what the model has learnt.

A step is dispatched, the next batch is read while the device computes, and what the step before
reports is looked at: the device never waits for the host. All that decides what comes next is in
the checkpoint (arrays, and a few numbers beside them), and batches follow from seed and step; so a
run that is stopped anywhere and started again is, bit for bit, the run that never stopped.
"""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from rwkv_jax import console as show
from rwkv_jax import models, sampling, sharding
from rwkv_jax import params as tables
from rwkv_jax.checkpoint.store import CHECKPOINTS, CONFIG, DamagedError, Store, sweep, versions
from rwkv_jax.checkpoint.weights import load
from rwkv_jax.config import MINI_EPOCH, Config, literal
from rwkv_jax.data.loader import Loader, prefetched
from rwkv_jax.data.sources import Data, open_data
from rwkv_jax.errors import within_memory
from rwkv_jax.evaluation.bits import compressors, evaluate
from rwkv_jax.hardware import chip_of
from rwkv_jax.training.flops import model_flops
from rwkv_jax.training.folder import RunError, adopt, claim, describe, fingerprint, resolve, writing
from rwkv_jax.training.hosts import (
    Interrupted,
    SharedError,
    allgather_text,
    check_equal,
    is_primary,
    is_shared,
    run_on_all,
)
from rwkv_jax.training.mesh import Rows, gather_to_host, make_mesh, stop_flag
from rwkv_jax.training.metrics import MetricsLog, read_metrics
from rwkv_jax.training.plot import plot
from rwkv_jax.training.state import TrainState, abstract_train_state, init_train_state
from rwkv_jax.training.step import Metrics, describe_nonfinite, make_train_step
from rwkv_jax.training.timer import Pace

LESS_MEMORY = "lower train.batch or model.width, raise train.accumulate, or set train.remat=block"


class NonFiniteError(SharedError):
    """Training diverged: a loss or a gradient is infinite or not a number."""


def train(
    cfg: Config,
    *,
    stated: Mapping[str, str] | None = None,
    console: Console | None = None,
    profile: bool = False,
) -> Path:
    """Trains as `cfg` says, going on where the run in `train.output` stopped; returns that folder.

    With weights in `train.init` the model is theirs, not `cfg.model`; `stated`, from `load_stated`,
    says what of it was asked for and must be so. With `profile` some steps are traced into
    `profile` of that folder.

    Raises `UserError` for whatever the user can mend (`NonFiniteError` if training diverged), and
    `Interrupted` after the first SIGINT or SIGTERM, once a checkpoint is saved.
    """
    first = is_primary()
    check_equal(_settings(cfg), "start all with the same settings")
    console = console or show.LastingConsole(quiet=not first)
    cfg = run_on_all(partial(adopt, cfg, stated or {}))
    mesh = run_on_all(partial(make_mesh, cfg))
    tokens = run_on_all(partial(open_data, cfg.data, progress=first))
    cfg, loader = run_on_all(partial(resolve, cfg, tokens))
    check_equal({"text": fingerprint(tokens)}, "give all of them the same text")
    with contextlib.ExitStack() as stack:
        folder = run_on_all(partial(_claim, cfg, tokens, stack))
        with _store(folder, cfg.train.keep) as store, within_memory(LESS_MEMORY):
            run = _open(cfg, tokens, loader, folder, store, console, mesh)
            with contextlib.closing(run.log):
                _print_header(run)
                with writing(folder), _stop_requests() as stop:
                    _train_steps(run, stop, profile)
                try:
                    _finish(run)
                except KeyboardInterrupt:
                    raise Interrupted(
                        f"Stopped after the last step, which is saved in {folder};"
                        " the same command evaluates it."
                    ) from None
            run_on_all(_nothing)  # nobody leaves while another still writes
    return folder


@contextlib.contextmanager
def _store(folder: Path, keep: int) -> Iterator[Store]:
    """The run's checkpoints; at the end what is being written is waited for, unless this process
    alone has failed: the others do not know, and would not come."""
    store = Store(folder / CHECKPOINTS, keep)
    try:
        yield store
    except BaseException as error:
        if is_shared(error):
            store.close()
        raise
    store.close()


def _settings(cfg: Config) -> dict[str, str]:
    """What all processes have to agree on; where text and cache lie is each machine's own."""
    own = {"source", "mixture", "cache"}
    return {
        f"{section.name}.{key}": literal(value)
        for section in dataclasses.fields(cfg)
        for key, value in vars(getattr(cfg, section.name)).items()
        if not (section.name == "data" and key in own)
    }


def _claim(cfg: Config, tokens: Data, stack: contextlib.ExitStack) -> Path:
    """The run's folder, which the first process holds until `stack` is closed."""
    if not is_primary():
        return Path(cfg.train.output).expanduser()
    folder = stack.enter_context(claim(cfg, tokens))
    if not (folder / CONFIG).exists():
        describe(folder, cfg, tokens)  # first of all, so that whatever stops us leaves a run
    sweep(folder / CHECKPOINTS)
    return folder


@dataclass
class _Run:
    """What the parts of a run share."""

    cfg: Config
    tokens: Data
    loader: Loader
    folder: Path
    store: Store
    log: MetricsLog
    ticker: show.Ticker
    console: Console
    mesh: Mesh | None
    state: TrainState
    step: int
    data: str
    """Fingerprint of the text."""
    window: list[list[float]]
    """Loss and gradient norm of the steps since the last line of metrics.jsonl."""
    mini_epoch: list[float]
    """Sum and number of the losses since an official mini-epoch began."""
    earlier: float
    """Seconds that the run took before this start."""
    owed: bool
    """An evaluation was due where the run was stopped."""
    pace: Pace = field(default_factory=Pace)
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """How long the run has taken, over all its starts."""
        return self.earlier + time.monotonic() - self.began

    @property
    def tokens_per_step(self) -> int:
        return self.cfg.train.batch * self.cfg.train.context

    def utilisation(self, tokens_per_s: float) -> dict[str, float]:
        """`mfu`: the model's operations, by the formula, over what the devices could make; empty
        where that is not known."""
        chip = chip_of(jax.devices()[0].device_kind)
        if chip is None or not tokens_per_s:
            return {}
        devices = self.mesh.size if self.mesh else 1
        rate = tokens_per_s * model_flops(self.cfg.model)
        return {"mfu": round(rate / devices / chip.flops, 4)}

    def bits_per_byte(self, loss: float) -> float:
        """A training loss in the unit that does not depend on the tokenizer."""
        return loss / math.log(2) / self.tokens.bytes_per_token


def _open(
    cfg: Config,
    tokens: Data,
    loader: Loader,
    folder: Path,
    store: Store,
    console: Console,
    mesh: Mesh | None,
) -> _Run:
    """The run as its newest whole checkpoint left it, or a new one."""
    data = fingerprint(tokens)
    step, meta = store.latest(), {"window": [], "seconds": 0.0}
    if step is not None:
        abstract = abstract_train_state(cfg, cfg.model, mesh)
        step, state, meta = _restored(store, abstract, step, console)
        if meta["data"] != data:
            raise _SharedRunError(
                f"{folder}: was trained on other text than data.source = {cfg.data.source} gives"
                " now; put that text back, or choose another train.output"
            )
        if step > cfg.train.steps:
            raise _SharedRunError(
                f"train.steps = {cfg.train.steps}: {folder} is at step {step} already;"
                " give more steps, or choose another train.output"
            )
    else:
        given = load(cfg.train.init, dtype=jnp.float32)[0] if cfg.train.init else None
        state = init_train_state(cfg, cfg.model, given, mesh)
    return _Run(
        cfg=cfg,
        tokens=tokens,
        loader=loader,
        folder=folder,
        store=store,
        log=run_on_all(partial(_begin_log, folder, cfg, tokens, step or 0)),
        ticker=show.Ticker(console, cfg.train.steps),
        console=console,
        mesh=mesh,
        state=state,
        step=step or 0,
        data=data,
        window=meta["window"],
        mini_epoch=meta.get("mini_epoch", [0.0, 0.0]),
        earlier=meta["seconds"],
        owed=meta.get("owed", False),
    )


def _begin_log(folder: Path, cfg: Config, tokens: Data, step: int) -> MetricsLog:
    """The log that goes on after a step, once the folder says what the run is."""
    if not is_primary():
        return MetricsLog(None, step)
    describe(folder, cfg, tokens)
    with writing(folder):
        return MetricsLog(
            folder / "metrics.jsonl", step, folder / "events" if cfg.train.tensorboard else None
        )


def _restored(
    store: Store, abstract: TrainState, step: int, console: Console
) -> tuple[int, TrainState, dict[str, Any]]:
    """Step, state and meta of the newest checkpoint that can be read; damaged ones after it are
    set aside. Raises `StoreError` if there is none."""

    def read() -> tuple[TrainState, dict[str, Any]] | DamagedError:
        try:
            return store.restore(abstract, step), store.meta(step, "data", "window", "seconds")
        except DamagedError as error:
            return error

    while True:
        found = run_on_all(read)
        damage = next(
            filter(None, allgather_text(str(found) * isinstance(found, DamagedError))), ""
        )
        if not damage:
            assert not isinstance(found, DamagedError)
            return step, *found
        before = store.latest(before=step)
        if before is None:
            raise _SharedRunError(damage)
        aside = run_on_all(partial(store.set_aside, step) if is_primary() else _nothing)
        store.reload()
        going_on = f"{damage.rpartition(';')[0]}\nkept as {aside}; going on from step {before:,}"
        console.print(going_on, markup=False, highlight=False, soft_wrap=True)
        step = before


def _nothing() -> None:
    """What other processes do while the first one does something for all."""


class _SharedRunError(RunError, SharedError):
    """A `RunError` that all processes raise."""


def _print_header(run: _Run) -> None:
    cfg, train = run.cfg, run.cfg.train
    count = tables.count(models.specs(cfg.model))
    seen = train.steps * run.tokens_per_step
    rows = {
        "model": f"RWKV-{cfg.model.version}, {cfg.model.layers} layers of width {cfg.model.width},"
        f" {count:,} parameters",
        **({"weights": f"from {train.init}, and so are version and sizes"} if train.init else {}),
        **run.tokens.describe(),
        "training": f"{train.steps:,} steps of {train.batch} x {train.context} tokens:"
        f" {seen:,} tokens, {seen / run.tokens.train_tokens:.2f} epochs",
        "device": _devices(run.mesh) + f", {train.dtype}",
        "output": str(run.folder) + (f", going on from step {run.step:,}" if run.step else ""),
    }
    show.header(run.console, "rwkv_jax", rows)


def _devices(mesh: Mesh | None) -> str:
    """What the run computes on, in words."""
    kind, there = jax.devices()[0].device_kind, jax.device_count()
    if mesh is None:
        return kind if there == 1 else f"{kind}, one of {there}"
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    of = "" if mesh.size == there else f" of {there}"
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{mesh.size}{of} x {kind} ({axes}){processes}"


class _Stop:
    """Whether a signal has asked the run to stop."""

    requested = False


@contextlib.contextmanager
def _stop_requests() -> Iterator[_Stop]:
    """Turns the first SIGINT or SIGTERM into a request; the second ends the process at once."""
    stop, kinds = _Stop(), (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set handlers
        return

    def request(*_: Any) -> None:
        stop.requested = True
        for kind in kinds:
            signal.signal(kind, signal.SIG_DFL)

    before = {kind: signal.signal(kind, request) for kind in kinds}
    try:
        yield stop
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _train_steps(run: _Run, stop: _Stop, profile: bool) -> None:
    train, pace, several = run.cfg.train, run.pace, jax.process_count() > 1
    train_step, first = make_train_step(run.cfg, run.cfg.model), run.step
    waiting: tuple[int, Metrics] | None = None
    if profile and train.steps - first < TRACED.stop:
        run.ticker.line(f"not traced: fewer than {TRACED.stop} steps are left")
        profile = False
    tracer = _Tracer(run.folder / "profile" if profile else None, run.ticker.line)
    read = run.loader.read if run.mesh is None else Rows(run.loader, run.mesh).read
    coming = prefetched(read, range(run.step, train.steps))
    if run.owed:
        _evaluate(run, limit=train.eval_tokens)
    with run.ticker.running(run.step), contextlib.closing(coming), contextlib.closing(tracer):
        for batch in pace.batches(coming):
            asked = [stop_flag(run.mesh, stop.requested)] if run.mesh and several else []
            with sharding.use_mesh(run.mesh):
                run.state, metrics = train_step(run.state, batch, *asked)
            run.step += 1
            tracer.step(run, run.step - first)
            # Several processes stop at the same step: the one after that which told them.
            stops = not several and stop.requested
            if waiting:
                stops |= bool(_record(run, *waiting).asked)
            waiting = run.step, metrics
            last = run.step == train.steps
            evaluates = not last and _due(run.step, train.eval_every)
            saves = last or stops or _due(run.step, train.checkpoint_every)
            if not (evaluates or saves):
                continue
            _record(run, *waiting)
            waiting = None
            if evaluates and not stops:
                run.ticker.doing("evaluating")
                with pace.between("evaluating"):
                    _evaluate(run, limit=train.eval_tokens)
            if saves:
                with pace.between("saving"):
                    _save(run, owed=evaluates and stops)
            if stops:
                run.store.wait()
                then = "evaluates it" if last else "goes on from there"
                raise Interrupted(
                    f"Stopped after step {run.step:,} of {train.steps:,}, saved in {run.folder};"
                    f" the same command {then}.",
                    shared=True,
                )


TRACED = range(5, 8)
"""Steps after a start that are traced: when all is compiled, and the first batches are read."""


class _Tracer:
    """A trace of some steps in `folder`; none without one."""

    def __init__(self, folder: Path | None, say: Callable[[str], None]):
        self._folder, self._say, self._on = folder, say, False

    def step(self, run: _Run, done: int) -> None:
        """Begins or ends the trace, after so many steps of this start."""
        if self._folder and done == TRACED.start:
            jax.block_until_ready(run.state.step)
            jax.profiler.start_trace(self._folder)
            self._on = True
        elif done == TRACED.stop:
            jax.block_until_ready(run.state.step)
            self.close()

    def close(self) -> None:
        """Writes what there is of it."""
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
            self._say(f"{self._folder}: a trace of some steps; xprof or TensorBoard open it")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _record(run: _Run, step: int, metrics: Metrics) -> Metrics:
    """Looks at what a step reports (waiting until it is done), shows it, and logs it when due."""
    metrics, pace = jax.device_get(metrics), run.pace
    if not metrics.finite:
        raise NonFiniteError(_diverged(run, step, metrics))
    pace.step(run.tokens_per_step)
    run.window.append([float(metrics.loss), float(metrics.grad_norm)])
    losses, norms = zip(*run.window, strict=True)
    loss = math.fsum(losses) / len(losses)
    bpb = run.bits_per_byte(loss)
    speed = pace.tokens_per_s
    left = (run.cfg.train.steps - step) * run.tokens_per_step / speed if speed else 0.0
    run.ticker.step(step, loss, bpb, speed, left)
    _count_mini_epoch(run, step, metrics)
    if not _due(step, run.cfg.train.log_every):
        return metrics
    run.log.write(
        step=step,
        tokens=step * run.tokens_per_step,
        loss=loss,
        bpb=bpb,
        lr=float(metrics.lr),
        grad_norm=math.fsum(norms) / len(norms),
        state_rms=float(metrics.state_rms),
        tokens_per_s=round(speed, 1),
        **run.utilisation(speed),
        **{name: round(spent, 3) for name, spent in pace.split(pace.spent).items()},
        seconds=round(run.seconds, 2),
    )
    run.ticker.log(step, loss, bpb, speed, left)
    run.window = []
    pace.start_over()
    return metrics


def _count_mini_epoch(run: _Run, step: int, metrics: Metrics) -> None:
    """Logs what the official trainers write in `train_log.txt` after each 40,320 samples."""
    if run.cfg.data.sampler != "magic_prime":
        return
    total, count = run.mini_epoch
    run.mini_epoch = total, count = [total + float(metrics.loss), count + 1]
    steps = MINI_EPOCH // run.cfg.train.batch
    if not _due(step, steps):
        return
    run.mini_epoch = [0.0, 0.0]
    loss, number, lr = total / count, step // steps - 1, float(metrics.lr)
    run.log.write(step=step, mini_epoch=number, mini_epoch_loss=loss, lr=lr)
    run.ticker.line(
        f"mini-epoch {number}  loss {loss:.6f}  perplexity {math.exp(loss):.4f}  lr {lr:.8f}"
    )


def _diverged(run: _Run, step: int, metrics: Metrics) -> str:
    run.store.wait()
    good = run.store.latest()
    saved = "no checkpoint was saved yet"
    if good is not None:
        saved = f"the last good checkpoint is {run.folder / CHECKPOINTS / str(good)}"
    return (
        f"step {step}: {describe_nonfinite(metrics, run.state.params)}; {saved}:"
        " lower optimizer.peak_lr (another train.output), or raise optimizer.warmup_steps"
    )


def _save(run: _Run, owed: bool) -> None:
    """Starts a checkpoint and draws the curve up to it. `owed`: what is to be evaluated here first
    when the run goes on."""
    meta = {
        "step": run.step,
        "seed": run.cfg.train.seed,
        "data": run.data,
        "window": run.window,
        "mini_epoch": run.mini_epoch,
        "seconds": run.seconds,
        "owed": owed,
        "model": dataclasses.asdict(run.cfg.model),
        "tokenizer": run.tokens.tokenizer.identity(),
        "versions": versions(),
    }
    if run.store.latest() != run.step:
        run.store.save(run.step, run.state, meta)
    _plot(run)


def _plot(run: _Run) -> None:
    if not is_primary():
        return
    model = run.cfg.model
    title = f"RWKV-{model.version}, {model.layers} layers of width {model.width}"
    plot(read_metrics(run.folder / "metrics.jsonl"), run.folder / "loss.png", title)


def _evaluate(
    run: _Run, *, limit: int = 0, report: Callable[[int, int], None] | None = None, **extra: Any
) -> float:
    """Held-out bits per byte, logged and shown."""
    train = run.cfg.train
    if not run.tokens.heldout_bytes:
        return math.nan
    with sharding.use_mesh(run.mesh):
        result = evaluate(
            run.state.params,
            run.tokens,
            cfg=run.cfg.model,
            lanes=train.batch // train.accumulate,
            window=train.context,
            limit=limit,
            dtype=jnp.dtype(train.dtype),
            implementation=None if train.wkv == "auto" else train.wkv,
            report=report,
        )
    run.log.write(
        step=run.step,
        tokens=run.step * run.tokens_per_step,
        heldout_bpb=result.bits_per_byte,
        heldout_loss=result.loss,
        heldout_tokens=result.tokens,
        seconds=round(run.seconds, 2),
        **extra,
    )
    run.ticker.line(
        f"step {run.step}  held-out bits per byte {result.bits_per_byte:.3f}"
        f" ({result.tokens:,} tokens)"
    )
    return result.bits_per_byte


def _finish(run: _Run) -> None:
    """The final evaluation, beside compressors on the same text, and a sample."""
    if run.tokens.heldout_bytes:
        with run.console.status("compressing the held-out text with gzip -9 and xz -9"):
            marks = compressors(run.tokens.heldout_text()) if is_primary() else {}
        with run.pace.between("evaluating"), show.evaluating(run.console) as report:
            bpb = _evaluate(run, report=report, final=True, compressors=marks)
        name = f"RWKV-{run.cfg.model.version} (this run)"
        show.comparison(run.console, {name: bpb, **marks}, best=name)
    show.header(run.console, "this start", _summary(run))
    with writing(run.folder):
        _plot(run)
    _sample(run)
    events = ", events" if run.cfg.train.tensorboard else ""
    run.ticker.line(f"\n{run.folder}: checkpoints, metrics.jsonl, loss.png{events}")


def _summary(run: _Run) -> dict[str, str]:
    """What the run did since it was started, and what its time went on."""
    pace = run.pace
    split = {kind: took for kind, took in pace.split(pace.total).items() if took >= 0.5}
    speed, rest = pace.all_tokens_per_s, time.monotonic() - run.began - sum(split.values())
    spoken = [f"{kind} {show.duration(took)}" for kind, took in split.items()]
    shares = run.utilisation(speed).values()
    mfu = "".join(f", {share:.1%} of the devices' peak" for share in shares)
    return {
        "speed": f"{speed:,.0f} tokens/s{mfu}" if speed else "too few steps to tell",
        "time": ", ".join([*spoken, f"the rest (compiling, reading) {show.duration(rest)}"]),
    }


def _sample(run: _Run) -> None:
    sample = run.cfg.sample
    if not sample.tokens:
        return
    run.ticker.line(f"\nSample ({sample.tokens} tokens, temperature {sample.temperature}):\n")
    # The parameters alone: there is no room for the moments beside the copy that decoding makes.
    weights = run.state.params
    run.state = None  # pyright: ignore[reportAttributeAccessIssue]
    if run.mesh is not None:
        weights = gather_to_host(weights)
    if not is_primary():
        return
    drawn = sampling.Sampling(
        sample.temperature, sample.top_p, presence_penalty=0.0, frequency_penalty=0.0
    )
    chunks = sampling.generate(
        weights,
        run.cfg.model,
        run.tokens.tokenizer,
        [sample.prompt],
        max_tokens=sample.tokens,
        sampling=drawn,
        seed=run.cfg.train.seed,
    )
    run.console.out(sample.prompt, end="", highlight=False)
    for chunk in chunks:
        run.console.out(chunk.text, end="", highlight=False)
    run.console.out("")
