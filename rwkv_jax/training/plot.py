"""The loss curves of runs: of training, of held-out text, and of compressors.

Bits per byte; of runs that do not train all of their text (`data.train_on`), nats per token of what
they train.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rwkv_jax import plots

SMOOTHING = 0.02
"""Share of the curve that one smoothed point averages over."""

Lines = Sequence[dict[str, Any]]
"""The lines of a `metrics.jsonl`."""


class Measure(NamedTuple):
    """What is drawn: the keys of training lines and of evaluations, and its name."""

    train: str
    heldout: str
    name: str


BITS = Measure("bpb", "heldout_bpb", "bits per byte")
NATS = Measure("loss", "heldout_trained_loss", "nats per trained token")
"""Where all tokens are trained, an evaluation has this as `heldout_loss`."""


def measure_of(*runs: Lines) -> Measure:
    """What is drawn of runs: bits per byte, if all of them have these."""
    train = [line for lines in runs for line in lines if "loss" in line]
    return NATS if any("bpb" not in line for line in train) else BITS


def with_trained_loss(lines: Lines) -> list[dict[str, Any]]:
    """The lines, where evaluations have the loss of what is trained also if that is all."""
    if any("heldout_trained_loss" in line for line in lines):
        return [*lines]
    same = (
        {"heldout_trained_loss": x["heldout_loss"]} if "heldout_loss" in x else {} for x in lines
    )
    return [line | more for line, more in zip(lines, same, strict=True)]


def plot(lines: Lines, path: Path, title: str) -> None:
    """Draws a run into a PNG file, which is replaced when it is complete."""
    measure = measure_of(lines)
    with _axes(path, title, measure) as axes:
        heldout = [line for line in lines if measure.heldout in line]
        train = [line for line in lines if measure.train in line]
        if train:
            _draw_training(axes, train, measure, "training", "tab:blue")
        if heldout:
            _draw_heldout(axes, heldout, measure, "held out", "tab:orange")
            marks = heldout[-1].get("compressors", {}) if measure is BITS else {}
            for (name, value), style in zip(marks.items(), ("--", ":", "-."), strict=False):
                label = f"{name} {value:.3f}"
                axes.axhline(value, color="0.35", linestyle=style, linewidth=1, label=label)
        _set_range(axes, train, heldout, measure)


def plot_runs(runs: Mapping[str, Lines], path: Path) -> None:
    """Draws several runs by name into one PNG file: training thin, evaluations with marks."""
    measure, drawn = measure_of(*runs.values()), []
    with _axes(path, "runs", measure) as axes:
        for index, (name, lines) in enumerate(runs.items()):
            lines, color = with_trained_loss(lines), f"C{index}"
            heldout = [line for line in lines if measure.heldout in line]
            train = [line for line in lines if measure.train in line]
            if train:
                label = "" if heldout else name
                _draw_training(axes, train, measure, label, color, linewidth=0.8)
            if heldout:
                _draw_heldout(axes, heldout, measure, name, color)
            drawn.append((train, heldout))
        train, heldout = ([line for run in drawn for line in run[i]] for i in (0, 1))
        _set_range(axes, train, heldout, measure)


def _axes(path: Path, title: str, measure: Measure) -> Any:
    return plots.losses(path, title, "tokens", measure.name)


def _draw_training(
    axes: Any, lines: Lines, measure: Measure, name: str, color: str, linewidth: float = 1.5
) -> None:
    from matplotlib.ticker import EngFormatter  # slow to import

    axes.xaxis.set_major_formatter(EngFormatter())
    tokens, values = (np.array([line[key] for line in lines]) for key in ("tokens", measure.train))
    smoothed = smooth(values)
    axes.plot(tokens, values, color=color, alpha=0.25, linewidth=0.8)
    label = f"{name} {smoothed[-1]:.3f}" if name else None
    marker = "o" if len(lines) == 1 else ""  # a line through one point is invisible
    axes.plot(tokens, smoothed, marker=marker, color=color, label=label, linewidth=linewidth)


def _draw_heldout(axes: Any, lines: Lines, measure: Measure, name: str, color: str) -> None:
    """Evaluations on a part of the held-out text don't compare with one on all of it: no line
    joins them."""
    read = lines[-1]["heldout_tokens"]
    alike = [line for line in lines if line["heldout_tokens"] == read]
    others = [line for line in lines if line["heldout_tokens"] != read]
    for some, label, style in ((alike, name, "o-"), (others, f"{name}, a part", "o--")):
        if some:
            tokens, values = ([line[key] for line in some] for key in ("tokens", measure.heldout))
            label = f"{label} {values[-1]:.3f}"
            axes.plot(tokens, values, style, color=color, markersize=5, label=label)


def _set_range(axes: Any, train: Lines, heldout: Lines, measure: Measure) -> None:
    """Leaves out the first steps: their loss, that of a uniform guess, would flatten the rest."""
    values = np.array([*_of(train, measure.train), *_of(heldout, measure.heldout)])
    marks = [x for line in heldout for x in line.get("compressors", {}).values()]
    marks = marks if measure is BITS else []
    if len(values):
        low = min([values.min(), *marks])
        high = max([np.quantile(values, 0.95), *values[-1:], *marks])
        margin = 0.08 * max(high - low, 0.1)
        axes.set_ylim(low - margin, high + margin)


def _of(lines: Lines, key: str) -> Iterator[float]:
    return (line[key] for line in lines)


def smooth(values: np.ndarray) -> np.ndarray:
    """A moving average over the values before, `SMOOTHING` of the whole curve wide."""
    width = max(1, round(SMOOTHING * len(values)))
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(0, stop - width)
    return (sums[stop] - sums[start]) / (stop - start)
