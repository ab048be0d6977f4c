"""The first row of a run as it is trained: one look finds most mistakes in the data."""

from collections.abc import Iterator
from itertools import groupby

import numpy as np
from rich.console import Console
from rich.text import Text

from rwkv_jax.data.sources import Data
from rwkv_jax.data.tokenizers import StreamDecoder, Tokenizer
from rwkv_jax.training.setup import Setup

CHARACTERS, LINES = 600, 12
"""The most of the row that is shown."""

MASKED = "⟦{}⟧"
END = "[end]"
"""In place of the end-of-document id, which has no text."""


def show_row(setup: Setup, console: Console) -> None:
    """Prints the start of the first row of the first step; what is read and not trained is marked,
    with the share of all tokens that are trained."""
    batch = setup.loader.read(0, slice(0, 1))
    mask = np.ones(batch.targets.shape, bool) if batch.mask is None else batch.mask
    tokenizer, ids = setup.data.tokenizer, batch.targets[0]
    share, shown = trained_share(setup.data), Text()
    used = np.flatnonzero((ids != tokenizer.eod) | mask[0])[-1] + 1  # the rest is padding
    for text, trained in parts(tokenizer, ids[:used], mask[0, :used]):
        shown.append(text if trained else MASKED.format(text), "" if trained else "dim")
    lines = shown.split("\n")[:LINES]
    cut = Text("\n").join(lines)
    if len(cut) > CHARACTERS or len(cut) < len(shown):
        cut.truncate(CHARACTERS)
        cut.append(" ...")
    title = "The first row, as it is trained"
    if share < 1:
        title += f" ({MASKED.format('this')} is read only; {share:.0%} of the tokens are trained)"
    console.print(f"\n{title}:", highlight=False, markup=False, soft_wrap=True)
    console.print(cut, highlight=False, soft_wrap=True)


def parts(tokenizer: Tokenizer, ids: np.ndarray, trained: np.ndarray) -> Iterator[tuple[str, bool]]:
    """The text of a row in parts that are trained or not, in turn."""
    decoder = StreamDecoder(tokenizer)
    for chosen, group in groupby(zip(ids.tolist(), trained.tolist(), strict=True), lambda x: x[1]):
        text = ""
        for token, _ in group:
            text += decoder.finish() + END if token == tokenizer.eod else decoder.push([token])
        yield text, chosen


def trained_share(data: Data) -> float:
    """The share of the training tokens that are trained, averaged over the sources by weight."""
    shares = [1.0 if x.mask is None else float(np.mean(x.mask)) for x in data.streams]
    return float(np.average(shares, weights=data.weights))
