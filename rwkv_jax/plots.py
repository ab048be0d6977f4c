"""Pictures of losses, in one style."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rwkv_jax.disk import replacing


@contextlib.contextmanager
def losses(path: Path, title: str, xlabel: str, ylabel: str = "bits per byte") -> Iterator[Any]:
    """Matplotlib axes to draw on; they become the PNG file `path`, replaced when it is complete."""
    # Slow to import, and the first picture is drawn long after the start.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel, title=title)
    yield axes
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    with replacing(path) as file:
        figure.savefig(file, format="png")
