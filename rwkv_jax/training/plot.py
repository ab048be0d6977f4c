"""The loss curve of a run: bits per byte of training, of held-out text, and of compressors."""

from pathlib import Path
from typing import Any

import numpy as np

from rwkv_jax import plots

SMOOTHING = 0.02
"""Share of the curve that one smoothed point averages over."""


def plot(lines: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws the lines of `metrics.jsonl` into a PNG file, which is replaced when it is complete."""
    train = [line for line in lines if "loss" in line]
    heldout = [line for line in lines if "heldout_bpb" in line]
    from matplotlib.ticker import EngFormatter  # slow to import

    with plots.bits_per_byte(path, title, "tokens") as axes:
        axes.xaxis.set_major_formatter(EngFormatter())
        if train:
            tokens, bpb = (np.array([line[key] for line in train]) for key in ("tokens", "bpb"))
            smoothed = smooth(bpb)
            axes.plot(tokens, bpb, color="tab:blue", alpha=0.25, linewidth=0.8)
            label = f"training {smoothed[-1]:.3f}"
            marker = "o" if len(train) == 1 else ""  # a line through one point is invisible
            axes.plot(tokens, smoothed, marker=marker, color="tab:blue", label=label)
        if heldout:
            _draw_heldout(axes, heldout)
            marks = heldout[-1].get("compressors", {})
            for (name, value), style in zip(marks.items(), ("--", ":", "-."), strict=False):
                label = f"{name} {value:.3f}"
                axes.axhline(value, color="0.35", linestyle=style, linewidth=1, label=label)
        _set_range(axes, train, heldout)


def _draw_heldout(axes: Any, lines: list[dict[str, Any]]) -> None:
    """Evaluations on a part of the held-out text don't compare with one on all of it: no line
    joins them."""
    read = lines[-1]["heldout_tokens"]
    alike = [line for line in lines if line["heldout_tokens"] == read]
    others = [line for line in lines if line["heldout_tokens"] != read]
    for some, label, style in ((alike, "held out", "o-"), (others, "a part of it", "o--")):
        if some:
            tokens, bpb = ([line[key] for line in some] for key in ("tokens", "heldout_bpb"))
            label = f"{label} {bpb[-1]:.3f}"
            axes.plot(tokens, bpb, style, color="tab:orange", markersize=5, label=label)


def _set_range(axes: Any, train: list[dict], heldout: list[dict]) -> None:
    """Leaves out the first steps: their loss, that of a uniform guess, would flatten the rest."""
    values = np.array([line["bpb"] for line in train] + [line["heldout_bpb"] for line in heldout])
    marks = [value for line in heldout for value in line.get("compressors", {}).values()]
    if len(values):
        low = min([values.min(), *marks])
        high = max([np.quantile(values, 0.95), *values[-1:], *marks])
        margin = 0.08 * max(high - low, 0.1)
        axes.set_ylim(low - margin, high + margin)


def smooth(values: np.ndarray) -> np.ndarray:
    """A moving average over the values before, `SMOOTHING` of the whole curve wide."""
    width = max(1, round(SMOOTHING * len(values)))
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(0, stop - width)
    return (sums[stop] - sums[start]) / (stop - start)
