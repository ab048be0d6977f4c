"""The position curve as a picture: bits per byte by how much of the document came before."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

from rwkv_jax.evaluation.text import Measured


def plot(results: Sequence[tuple[str, Measured]], path: Path, title: str) -> None:
    """Draws a curve for each named text into a PNG file, which is replaced when it is complete."""
    # Slow to import, and wanted last of all.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(
        xlabel="tokens of the document before", ylabel="bits per byte", title=title
    )
    for name, result in results:
        drawn = {
            place: part.bits_per_byte
            for place, part in enumerate(result.stretches)
            if math.isfinite(part.bits_per_byte)
        }
        label = f"{name} {result.bits_per_byte:.3f}"
        axes.plot(list(drawn), list(drawn.values()), "o-", label=label)
    # All texts have the same stretches, each up to the end of its longest document.
    longest = max((result.stretches for _, result in results), key=len)
    axes.set_xticks(range(len(longest)), [f"{part.start:,}" for part in longest])
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    new = path.with_suffix(".tmp")
    figure.savefig(new, format="png")
    os.replace(new, path)
