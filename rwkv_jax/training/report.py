"""What a run reports: a header, numbers of its steps, evaluations, a summary, a curve, a sample.

Numbers go into `metrics.jsonl` (`rwkv_jax.training.metrics`), lines and a bar to the terminal, the
curve into `loss.png`. Of several processes the first one reports.
"""

import math
import time
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from rwkv_jax import console as show
from rwkv_jax import models, sampling
from rwkv_jax import params as tables
from rwkv_jax.config import MINI_EPOCH, Config, ModelConfig
from rwkv_jax.evaluation.bits import Evaluation
from rwkv_jax.evaluation.tasks import Result
from rwkv_jax.hardware import chip_of
from rwkv_jax.interrupts import for_each
from rwkv_jax.training.flops import needed_flops
from rwkv_jax.training.folder import writing
from rwkv_jax.training.hosts import is_primary
from rwkv_jax.training.mesh import gather_to_host
from rwkv_jax.training.metrics import MetricsLog, read_metrics
from rwkv_jax.training.plot import plot
from rwkv_jax.training.preview import show_row
from rwkv_jax.training.setup import Setup
from rwkv_jax.training.step import Metrics
from rwkv_jax.training.timer import StepTimer, seconds
from rwkv_jax.training.trainable import trained_by
from rwkv_jax.typing import PyTree


class Report:
    """The reports of a run, which resumes after `step` with the numbers that `meta` saved."""

    def __init__(self, setup: Setup, console: Console, step: int, meta: dict[str, Any]):
        self.timer = StepTimer()
        self.ticker = show.Ticker(console, setup.cfg.train.steps)
        self._setup, self._console = setup, console
        self._window: list[list[float]] = meta.get("window", [])
        self._mini_epoch: list[float] = meta.get("mini_epoch", [0.0, 0.0])
        self._earlier: float = meta.get("seconds", 0.0)
        self._start = time.monotonic()
        self._masked = any(stream.mask is not None for stream in setup.data.streams)
        self.heldout_bpb = math.nan
        """Of the last evaluation."""
        self._shown = ""
        with writing(setup.folder):
            self._log = MetricsLog(setup.folder, setup.cfg, step) if is_primary() else None

    def meta(self) -> dict[str, Any]:
        """What a resumed run needs to report as if it had never stopped."""
        return {
            "window": self._window,  # the numbers of the steps since the last line
            "mini_epoch": self._mini_epoch,  # sum and number of the losses since it began
            "seconds": self._seconds,
        }

    @property
    def _seconds(self) -> float:
        """How long the run has taken, over all its starts."""
        return self._earlier + time.monotonic() - self._start

    def header(self, step: int, change: str = "") -> None:
        """Prints what the run is, and the step that it resumes from, if it does; `change` is what
        has changed in its schedule."""
        cfg, data, train = self._setup.cfg, self._setup.data, self._setup.cfg.train
        count = tables.count(models.specs(cfg.model))
        seen = train.steps * self._setup.tokens_per_step
        weights = f"from {train.init}, which sets version and sizes"
        rows = {
            "model": f"{_title(cfg.model)}, {count:,} parameters",
            "weights": weights if train.init else "",
            **data.describe(),
            "steps": f"{train.steps:,} of {train.batch} x {train.context} tokens:"
            f" {seen:,} tokens, {self._epochs()}",
            "optimizer": _rates(cfg),
            "schedule": change or _warmup_problem(cfg),
            "device": f"{_devices(self._setup.mesh)}, {train.dtype}",
            "output": f"{self._setup.folder}" + (f", resuming from step {step:,}" if step else ""),
        }
        show.header(self._console, "rwkv_jax", rows)
        if not step:
            show_row(self._setup, self._console)

    def _epochs(self) -> str:
        """How often the run reads its text, or each of several sources."""
        data, train, epochs = self._setup.data, self._setup.cfg.train, self._setup.loader.epoch
        samples, total = train.steps * train.batch, sum(data.weights)
        every = zip(data.sources, data.weights, epochs, strict=True)
        read = {name: samples * weight / total / epoch for name, weight, epoch in every}
        if len(read) == 1:
            return f"{read.popitem()[1]:.2f} epochs"
        return f"epochs: {', '.join(f'{name} {x:.2f}' for name, x in read.items())}"

    def step(self, step: int, metrics: Metrics) -> None:
        """Shows a finished step, and logs the steps since the last line when one is due."""
        train, timer = self._setup.cfg.train, self.timer
        timer.step(self._setup.tokens_per_step)
        numbers = metrics.loss, metrics.grad_norm, metrics.objective
        self._window.append([float(x) for x in numbers])
        # A run of an earlier version may resume with steps whose objective it did not keep.
        columns = zip_longest(*self._window)
        known = ([x for x in column if x is not None] for column in columns)
        loss, grad_norm, objective = (math.fsum(x) / len(x) for x in known)
        # Of masked text, the bytes of what is trained are not counted.
        bpb = math.nan if self._masked else loss / math.log(2) / self._setup.data.bytes_per_token
        speed, due = timer.tokens_per_s, step % train.log_every == 0
        left = (train.steps - step) * self._setup.tokens_per_step / speed if speed else 0.0
        self.ticker.step(step, show.progress_numbers(loss, bpb, speed, left), due=due)
        self._count_mini_epoch(step, metrics)
        if not due:
            return
        self._write(
            step,
            loss=loss,
            objective=objective,
            **({} if self._masked else {"bpb": bpb}),
            lr=float(metrics.lr),
            grad_norm=grad_norm,
            state_rms=float(metrics.state_rms),
            tokens_per_s=round(speed, 1),
            **self._utilisation(speed),
            **{kind: round(spent, 3) for kind, spent in seconds(timer.recent).items()},
        )
        self._window = []
        timer.restart()

    def _write(self, step: int, **record: Any) -> None:
        tokens, seconds = step * self._setup.tokens_per_step, round(self._seconds, 2)
        if self._log:
            self._log.write(step=step, tokens=tokens, **record, seconds=seconds)

    def _count_mini_epoch(self, step: int, metrics: Metrics) -> None:
        """Logs what the official trainers write to `train_log.txt` after each 40,320 samples."""
        if self._setup.cfg.data.sampler != "magic_prime":
            return
        total, count = self._mini_epoch
        self._mini_epoch = total, count = [total + float(metrics.loss), count + 1]
        steps = MINI_EPOCH // self._setup.cfg.train.batch
        if step % steps:
            return
        self._mini_epoch = [0.0, 0.0]
        loss, number, lr = total / count, step // steps - 1, float(metrics.lr)
        if self._log:
            self._log.write(step=step, mini_epoch=number, mini_epoch_loss=loss, lr=lr)
        self.ticker.line(
            f"mini-epoch {number}  loss {loss:.6f}  perplexity {math.exp(loss):.4f}  lr {lr:.8f}"
        )

    def evaluation(
        self,
        step: int,
        result: Evaluation | None,
        texts: Mapping[str, Evaluation],
        questions: Mapping[str, Result],
        **extra: Any,
    ) -> None:
        """Logs and shows an evaluation on held-out text and on other sets by name."""
        record, parts = {}, []
        if result:
            self.heldout_bpb, total = result.bits_per_byte, len(self._setup.data.heldout)
            record = {"heldout_bpb": result.bits_per_byte, "heldout_loss": result.loss}
            record |= {"heldout_tokens": result.tokens}
            part = f"{result.tokens:,} of " if result.tokens < total else "all "
            parts = [f"held-out bits per byte {result.bits_per_byte:.3f} ({part}{total:,} tokens)"]
        if result and result.trained_tokens:
            record |= {"heldout_trained_loss": result.trained_loss}
            record |= {"heldout_trained_tokens": result.trained_tokens}
            parts.append(f"loss of what is trained {result.trained_loss:.3f}")
        for name, one in texts.items():
            record[f"eval_{name}_bpb"] = one.bits_per_byte
            parts.append(f"{name} {one.bits_per_byte:.3f}")
            if one.trained_tokens:
                record[f"eval_{name}_trained_loss"] = one.trained_loss
                parts.append(f"{name}, loss of what is trained {one.trained_loss:.3f}")
        for name, score in questions.items():
            record[f"eval_{name}_accuracy"] = score.accuracy
            parts.append(f"{name} {score.accuracy:.1%} right")
        self._write(step, **record, **extra)
        line = f"step {step}  {', '.join(parts)}"
        if line != self._shown:  # the last evaluation may be of the same tokens as the one before
            self.ticker.line(line)
        self._shown = line

    def summary(self) -> None:
        """Prints how fast the run was since its start, and what its time was spent on."""
        timer = self.timer
        split = {kind: spent for kind, spent in seconds(timer.total).items() if spent >= 0.5}
        speed, rest = timer.all_tokens_per_s, time.monotonic() - self._start - sum(split.values())
        parts = [f"{kind} {show.duration(spent)}" for kind, spent in split.items()]
        shares = self._utilisation(speed).values()
        mfu = "".join(f", {share:.1%} of the devices' peak" for share in shares)
        rows = {
            "speed": f"{speed:,.0f} tokens/s{mfu}" if speed else "too few steps to tell",
            "time": ", ".join([*parts, f"the rest (compiling, reading) {show.duration(rest)}"]),
        }
        show.header(self._console, "since this start", rows)

    def _utilisation(self, tokens_per_s: float) -> dict[str, float]:
        """`mfu`, the model's operations by the formula over the devices' peak; empty where that is
        not known."""
        chip = chip_of(jax.devices()[0].device_kind)
        if chip is None or not tokens_per_s:
            return {}
        mesh = self._setup.mesh
        rate = tokens_per_s * needed_flops(self._setup.cfg)
        return {"mfu": round(rate / (mesh.size if mesh else 1) / chip.flops, 4)}

    def curve(self) -> None:
        """Draws `loss.png`."""
        if is_primary():
            folder = self._setup.folder
            lines = read_metrics(folder / "metrics.jsonl")
            plot(lines, folder / "loss.png", _title(self._setup.cfg.model))

    def close(self) -> None:
        """Closes the metrics' files."""
        if self._log:
            self._log.close()


def print_sample(setup: Setup, params: PyTree, console: Console) -> None:
    """Prints text that the model writes, as `[sample]` of the config asks. A collective."""
    sample = setup.cfg.sample
    if setup.mesh is not None:
        params = gather_to_host(params)
    if not is_primary():
        return
    title = f"\nSample ({sample.tokens} tokens, temperature {sample.temperature}):\n"
    console.print(title, markup=False, highlight=False)
    drawn = sampling.Sampling(
        sample.temperature, sample.top_p, presence_penalty=0.0, frequency_penalty=0.0
    )
    chunks = sampling.generate(
        params,
        setup.cfg.model,
        setup.data.tokenizer,
        [sample.prompt],
        max_tokens=sample.tokens,
        sampling=drawn,
        seed=setup.cfg.train.seed,
    )
    console.out(sample.prompt, end="", highlight=False)
    for_each(chunks, lambda chunk: console.out(chunk.text, end="", highlight=False))
    console.out("")


def _rates(cfg: Config) -> str:
    """The optimizer, its rates, and what is frozen."""
    own = cfg.optimizer
    falls = "" if own.schedule == "constant" else f" to {own.final_lr:.3g}"
    frozen = ""
    left, total = tables.count(trained_by(cfg).specs), tables.count(models.specs(cfg.model))
    if cfg.tune.method != "full":
        frozen = f"; {tuned(cfg)}: {left:,} numbers beside {total:,} that are frozen"
    elif cfg.train.freeze:
        frozen = (
            f"; frozen: {', '.join(cfg.train.freeze)} ({total - left:,} of {total:,} parameters)"
        )
    return f"{own.name}, rate {own.peak_lr:.3g}{falls} ({own.schedule}){frozen}"


def tuned(cfg: Config) -> str:
    """What `[tune]` trains, in words."""
    tune = cfg.tune
    if tune.method == "state":
        return "the state that documents start from"
    words = [f"rank {tune.rank} of {', '.join(tune.targets)}"] if tune.targets else []
    words += [f"layers {tune.layers}"] if tune.layers else []
    return " and ".join([", ".join(words), *[", ".join(tune.also)] * bool(tune.also)])


def _warmup_problem(cfg: Config) -> str:
    """A remark about a warm-up that ends after the run does."""
    steps, warmup = cfg.train.steps, cfg.optimizer.warmup_steps
    if warmup <= steps:
        return ""
    return f"the warm-up ({warmup} steps) is longer than the run: the rate never reaches its peak"


def _title(model: ModelConfig) -> str:
    return f"RWKV-{model.version}, {model.layers} layers of width {model.width}"


def _devices(mesh: Mesh | None) -> str:
    """What the run computes on, in words."""
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    if mesh is None:
        return kind if count == 1 else f"{kind}, one of {count}"
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    of = "" if mesh.size == count else f" of {count}"
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{mesh.size}{of} x {kind} ({axes}){processes}"
