"""Batches as a pure function of seed and step: what a run sees next depends on nothing it has to
remember.

A source is a stream of tokens, each document followed by the end-of-document id. A sample is one
row of a batch; step `s` takes the samples `s * batch ... s * batch + batch - 1` of an endless
sequence, however many processes share the work. Which part of the stream a sample is:

    shuffle      windows of `context` tokens, cut from a phase that each epoch draws anew; an epoch
                 visits every window once in an order of its own. With `packing = "documents"`,
                 packs of whole documents instead (`packing.py`)
    magic_prime  the official trainers' windows in their order (`order.py`)
    sequential   each row of the batch reads its own part of the stream from end to end, so that a
                 row goes on where the step before left it

Several sources take turns (`order.turns`), each in its own order.
"""

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from rwkv_jax.data import order
from rwkv_jax.data.files import CorpusError
from rwkv_jax.data.packing import Packs, pack

SCAN = 1 << 24
"""Tokens that are looked at at once."""


class Batch(NamedTuple):
    """What one step reads."""

    inputs: np.ndarray
    """int32 [b, t]"""
    targets: np.ndarray
    """int32 [b, t]: the token after each input."""
    reset: np.ndarray
    """bool [b, t]: a document starts here. The end-of-document id between two documents belongs to
    the second, so that its first token is predicted from that id and a fresh state, as in
    sampling."""
    mask: np.ndarray | None = None
    """bool [b, t]: which targets are trained on; None: all."""


@dataclass(frozen=True, eq=False)
class Stream:
    """The training tokens of one source."""

    name: str
    ids: np.ndarray
    eod: int
    mask: np.ndarray | None = None
    """Of each token, whether it is trained on."""
    documents: np.ndarray | None = None
    """Where documents start, and the end; None: after each end-of-document id."""
    weight: float = 1.0

    @cached_property
    def starts(self) -> np.ndarray:
        """int64: where documents start, and the end of the last."""
        if self.documents is not None:
            return self.documents
        ends = [
            np.flatnonzero(np.asarray(self.ids[i : i + SCAN]) == self.eod) + i + 1
            for i in range(0, len(self.ids), SCAN)
        ]
        starts = np.concatenate([np.zeros(1, np.int64), *ends])
        return starts if starts[-1] == len(self.ids) else np.append(starts, len(self.ids))

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens there; before the first is the end of a document before it."""
        ids = self.ids[max(start, 0) : stop]
        return ids if start >= 0 else np.concatenate([np.full(1, self.eod, ids.dtype), ids])


Reader = Callable[[np.ndarray], Batch]
"""A source's rows, by their samples' numbers."""


@dataclass(frozen=True)
class Loader:
    """The batches of a run."""

    readers: tuple[Reader, ...]
    weights: tuple[float, ...]
    batch: int
    context: int
    masked: bool
    epoch: tuple[int, ...]
    """Samples of each source until it starts over."""

    def read(self, step: int, rows: slice | np.ndarray = slice(None)) -> Batch:
        """The batch of a step; with `rows`, only those rows of it, so that a process can read its
        own part. Raises `CorpusError` for an id that the vocabulary has not."""
        samples = step * self.batch + np.arange(self.batch)[rows]
        source, index = order.turns(samples, self.weights)
        shape = (len(samples), self.context)
        out = Batch(
            np.empty(shape, np.int32),
            np.empty(shape, np.int32),
            np.empty(shape, bool),
            np.ones(shape, bool) if self.masked else None,
        )
        for number, reader in enumerate(self.readers):
            mine = source == number
            if mine.any():
                for whole, part in zip(out, reader(index[mine]), strict=True):
                    if part is not None and whole is not None:
                        whole[mine] = part
        return out


def prefetched(
    read: Callable[[int], Batch], steps: range, ahead: int = 2
) -> Generator[Batch, None, None]:
    """What `read` gives for each step, some of them `ahead` of time, by a thread of its own."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
    try:
        coming = deque(pool.submit(read, step) for step in steps[:ahead])
        later = iter(steps[ahead:])
        while coming:
            batch = coming.popleft().result()
            coming.extend(pool.submit(read, step) for step in itertools.islice(later, 1))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


def open_loader(
    streams: Sequence[Stream],
    *,
    seed: int,
    batch: int,
    context: int,
    vocab_size: int,
    sampler: str = "shuffle",
    packing: str = "stream",
    reset: bool = True,
) -> Loader:
    """The batches of these sources, of rows of `context` tokens. Without `reset` a document's start
    is not marked, as in the official trainers.

    Raises `CorpusError` if a source is too short for one sample.
    """
    readers, epochs = [], []
    for number, stream in enumerate(streams):
        name = str(seed) if len(streams) == 1 else f"{seed} source {number}"
        if packing == "documents":
            epoch, reader = _packs(stream, context, name, vocab_size)
        else:
            if sampler == "magic_prime":
                cut = _official(stream, context)
            elif sampler == "sequential":
                cut = _lanes(stream, context, batch)
            else:
                cut = _windows(stream, context, name)
            epoch, reader = cut.epoch, _reader(stream, cut, context, vocab_size, reset)
        readers.append(reader)
        epochs.append(epoch)
    masked = packing == "documents" or any(stream.mask is not None for stream in streams)
    weights = tuple(stream.weight for stream in streams)
    return Loader(tuple(readers), weights, batch, context, masked, tuple(epochs))


class Cut(NamedTuple):
    """How a stream is cut into samples of one length."""

    epoch: int
    """Samples until it starts over."""
    starts: Callable[[np.ndarray], np.ndarray]
    """Where each sample begins."""
    fresh: Callable[[np.ndarray], np.ndarray] | None = None
    """Which samples begin from a fresh state whatever stands there; None: as the stream says."""


def epoch_windows(stream: Stream, context: int) -> int:
    """Windows in an epoch. Raises `CorpusError` if there is none."""
    length = len(stream.ids)
    if length <= context:
        raise CorpusError(
            f"{stream.name}: the training documents have {length} tokens, one window needs"
            f" {context + 1} (train.context + 1): lower train.context or add text"
        )
    return max(1, length // context - 1)


def _windows(stream: Stream, context: int, seed: str) -> Cut:
    windows = epoch_windows(stream, context)
    # The last window needs its next token too; the phase may use up what the windows leave over.
    spare = min(context, len(stream.ids) - windows * context)

    def starts(samples: np.ndarray) -> np.ndarray:
        found = np.empty(len(samples), np.int64)
        for epoch, mine, slots in _epochs(samples, windows, seed):
            found[mine] = order.epoch_keys(seed, epoch)[0] % spare + context * slots
        return found

    return Cut(windows, starts)


def _official(stream: Stream, context: int) -> Cut:
    epoch_windows(stream, context)
    prime = order.magic_prime(len(stream.ids), context)
    return Cut(prime, lambda samples: order.magic_slots(samples, prime) * context)


def _lanes(stream: Stream, context: int, batch: int) -> Cut:
    steps = (len(stream.ids) - 1) // batch // context
    if steps < 1:
        raise CorpusError(
            f"{stream.name}: {len(stream.ids)} tokens are too few for {batch} rows to read side by"
            f" side (train.batch), {context + 1} each (train.context + 1): lower one, or add text"
        )

    def starts(samples: np.ndarray) -> np.ndarray:
        return (samples % batch * steps + samples // batch % steps) * context

    return Cut(steps * batch, starts, lambda samples: samples // batch % steps == 0)


def _epochs(
    samples: np.ndarray, size: int, seed: str
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Of each epoch: its number, which samples are in it, and where its permutation sends them."""
    for epoch in np.unique(samples // size).tolist():
        mine = samples // size == epoch
        yield epoch, mine, order.shuffled(samples[mine] % size, size, seed, epoch)


def _reader(stream: Stream, cut: Cut, context: int, vocab_size: int, reset: bool) -> Reader:
    def read(samples: np.ndarray) -> Batch:
        first = cut.starts(samples)
        ids = np.empty((len(first), context + 1), np.int32)
        mask = None if stream.mask is None else np.empty((len(first), context), bool)
        for row, start in enumerate(first.tolist()):
            ids[row] = stream.ids[start : start + context + 1]
            if mask is not None and stream.mask is not None:
                mask[row] = stream.mask[start + 1 : start + context + 1]
        _check(stream, ids, first, vocab_size)
        inputs, targets = ids[:, :-1].copy(), ids[:, 1:]
        resets = inputs == stream.eod if reset else np.zeros(inputs.shape, bool)
        if reset and stream.documents is not None:
            for row, start in enumerate(first.tolist()):
                begun = stream.documents
                some = slice(*np.searchsorted(begun, [start + 1, start + context + 1]))
                resets[row, begun[some] - 1 - start] = True
            inputs[resets] = stream.eod  # whatever stood before the document
        if cut.fresh is not None:
            resets[:, 0] |= cut.fresh(samples)
        return Batch(inputs, targets, resets, mask)

    return read


def _packs(stream: Stream, context: int, seed: str, vocab_size: int) -> tuple[int, Reader]:
    if not len(stream.ids):
        raise CorpusError(f"{stream.name}: no training documents; add text")
    packs = pack(stream.starts, context)
    count = len(packs.first) - 1

    def read(samples: np.ndarray) -> Batch:
        shape = (len(samples), context)
        inputs, targets = (np.full(shape, stream.eod, np.int32) for _ in range(2))
        reset, mask = (np.zeros(shape, bool) for _ in range(2))
        for _, mine, slots in _epochs(samples, count, seed):
            for row, slot in zip(np.flatnonzero(mine), slots.tolist(), strict=True):
                whole = Batch(inputs[row], targets[row], reset[row], mask[row])
                _fill(stream, packs, slot, vocab_size, whole)
        return Batch(inputs, targets, reset, mask)

    return count, read


def _fill(stream: Stream, packs: Packs, slot: int, vocab_size: int, row: Batch) -> None:
    """Writes a pack into a row of padding."""
    at = 0
    for piece in range(packs.first[slot], packs.first[slot + 1]):
        start, length = int(packs.start[piece]), int(packs.length[piece])
        there = slice(at, at + length)
        ids = stream.read(start - 1, start + length)
        if stream.starts[np.searchsorted(stream.starts, start)] == start:
            ids = np.concatenate([np.full(1, stream.eod, ids.dtype), ids[1:]])
        _check(stream, ids[None], np.array([start - 1]), vocab_size)
        row.inputs[there], row.targets[there] = ids[:-1], ids[1:]
        row.reset[at] = True
        assert row.mask is not None
        row.mask[there] = True if stream.mask is None else stream.mask[start : start + length]
        at += length
    row.reset[at:] = True  # the padding is documents without a token


def _check(stream: Stream, ids: np.ndarray, first: np.ndarray, vocab_size: int) -> None:
    if not ids.size or (ids.max() < vocab_size and ids.min() >= 0):
        return
    row, column = np.argwhere((ids >= vocab_size) | (ids < 0))[0]
    raise CorpusError(
        f"{stream.name}: token {first[row] + column:,} is {ids[row, column]:,}, and the model has"
        f" {vocab_size:,} ids (model.vocab_size); was it made with another tokenizer?"
    )
