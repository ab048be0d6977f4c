"""The position curve: bits per byte by how much of the document came before."""

import math
from collections.abc import Sequence
from pathlib import Path

from rwkv_jax import plots
from rwkv_jax.evaluation.text import Measured


def plot(results: Sequence[tuple[str, Measured]], path: Path, title: str) -> None:
    """Draws a curve for each named text into a PNG file, which is replaced when it is complete."""
    with plots.losses(path, title, "tokens of the document before") as axes:
        for name, result in results:
            drawn = {
                index: bucket.bits_per_byte
                for index, bucket in enumerate(result.buckets)
                if math.isfinite(bucket.bits_per_byte)
            }
            label = f"{name} {result.bits_per_byte:.3f}"
            axes.plot(list(drawn), list(drawn.values()), "o-", label=label)
        # All texts have the same buckets, each up to the end of its longest document.
        longest = max((result.buckets for _, result in results), key=len)
        axes.set_xticks(range(len(longest)), [f"{bucket.start:,}" for bucket in longest])
