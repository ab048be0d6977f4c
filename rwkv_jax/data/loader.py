"""Batches as a pure function of seed and step: a run has nothing to remember about its data.

A source is a stream of tokens, each document followed by the end-of-document id. A sample is one
row of a batch; step `s` takes the samples `s * batch ... s * batch + batch - 1` of an endless
sequence, however many processes share the work. Which part of the stream a sample is:

    shuffle      windows of `context` tokens with a random phase for each epoch; an epoch visits
                 every window once, in an order of its own. With `packing = "documents"`, packs of
                 whole documents instead (`packing.py`)
    magic_prime  the official trainers' windows in their order (`order.py`)
    sequential   each row of the batch reads its own part of the stream from start to end and
                 continues where the previous step stopped

The samples of several sources are interleaved (`order.interleave`), each source in its own order.
"""

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from rwkv_jax.data import order
from rwkv_jax.data.files import CorpusError
from rwkv_jax.data.packing import Packs, pack

SCAN = 1 << 24
"""Tokens of a long stream that are read at a time."""


class Batch(NamedTuple):
    """The input of one training step; all arrays are [b, t].

    inputs   int32: the tokens
    targets  int32: the token after each input
    reset    bool: a document starts here. The end-of-document id between two documents belongs to
             the second, so that its first token is predicted from that id and a fresh state, as in
             sampling
    mask     bool: which targets are trained on; None: all of them
    """

    inputs: np.ndarray
    targets: np.ndarray
    reset: np.ndarray
    mask: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Stream:
    """The training tokens of one source."""

    name: str
    ids: np.ndarray
    eod: int
    mask: np.ndarray | None = None
    """bool: which tokens are trained on; None: all of them."""
    documents: np.ndarray | None = None
    """Where documents start and, last, end; None: after each end-of-document id."""
    weight: float = 1.0

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [documents + 1]: where documents start and, last, where they end."""
        if self.documents is not None:
            return self.documents
        ends = [
            np.flatnonzero(np.asarray(self.ids[i : i + SCAN]) == self.eod) + i + 1
            for i in range(0, len(self.ids), SCAN)
        ]
        starts = np.concatenate([np.zeros(1, np.int64), *ends])
        return starts if starts[-1] == len(self.ids) else np.append(starts, len(self.ids))

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens from `start`, at least -1, to `stop`; an end-of-document id precedes the
        first."""
        ids = self.ids[max(start, 0) : stop]
        return ids if start >= 0 else np.concatenate([np.full(1, self.eod, ids.dtype), ids])


Reader = Callable[[np.ndarray], Batch]
"""Reads rows of a source, given the numbers of their samples."""


class Batching(NamedTuple):
    """How batches are drawn from streams."""

    seed: int
    batch: int
    context: int
    """Tokens of a row."""
    vocab_size: int
    """Ids from this one on are an error."""
    sampler: Literal["shuffle", "magic_prime", "sequential"] = "shuffle"
    packing: Literal["stream", "documents"] = "stream"
    reset: bool = True
    """Whether the starts of documents are marked; the official trainers do not mark them."""


@dataclass(frozen=True)
class Loader:
    """The batches of a run."""

    readers: tuple[Reader, ...]
    weights: tuple[float, ...]
    batch: int
    context: int
    masked: bool
    epoch: tuple[int, ...]
    """Samples of each source in one epoch."""

    def read(self, step: int, rows: slice | np.ndarray = slice(None)) -> Batch:
        """The batch of a step; with `rows`, only those rows of it, so that a process can read its
        own part. Raises CorpusError for an id that the vocabulary does not have."""
        samples = step * self.batch + np.arange(self.batch)[rows]
        source, index = order.interleave(samples, self.weights)
        shape = (len(samples), self.context)
        out = Batch(
            np.empty(shape, np.int32),
            np.empty(shape, np.int32),
            np.empty(shape, bool),
            np.ones(shape, bool) if self.masked else None,
        )
        for number, reader in enumerate(self.readers):
            here = source == number
            if here.any():
                for whole, part in zip(out, reader(index[here]), strict=True):
                    if part is not None and whole is not None:
                        whole[here] = part
        return out


def prefetched(
    read: Callable[[int], Batch], steps: range, ahead: int = 2
) -> Generator[Batch, None, None]:
    """The batch of each step, read up to `ahead` steps early in a background thread."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
    try:
        pending = deque(pool.submit(read, step) for step in steps[:ahead])
        later = iter(steps[ahead:])
        while pending:
            batch = pending.popleft().result()
            pending.extend(pool.submit(read, step) for step in itertools.islice(later, 1))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


def open_loader(streams: Sequence[Stream], how: Batching) -> Loader:
    """The batches of these sources. Raises CorpusError if one is too short for a sample."""
    readers, epochs = [], []
    for number, stream in enumerate(streams):
        seed = str(how.seed) if len(streams) == 1 else f"{how.seed} source {number}"
        if how.packing == "documents":
            epoch, reader = _packs(stream, how, seed)
        else:
            windows = _WINDOWS[how.sampler](stream, how, seed)
            epoch, reader = windows.epoch, _reader(stream, windows, how)
        readers.append(reader)
        epochs.append(epoch)
    masked = how.packing == "documents" or any(stream.mask is not None for stream in streams)
    weights = tuple(stream.weight for stream in streams)
    return Loader(tuple(readers), weights, how.batch, how.context, masked, tuple(epochs))


class Windows(NamedTuple):
    """How a stream is cut into samples of one length.

    epoch   the number of samples in one epoch
    starts  the first token of each sample, given the samples' numbers
    fresh   which samples start from a fresh state whatever tokens they start with; None: none
    """

    epoch: int
    starts: Callable[[np.ndarray], np.ndarray]
    fresh: Callable[[np.ndarray], np.ndarray] | None = None


def epoch_windows(stream: Stream, context: int) -> int:
    """Windows in an epoch. Raises CorpusError if there is none."""
    length = len(stream.ids)
    if length <= context:
        raise CorpusError(
            f"{stream.name}: the training documents have {length} tokens, one window needs"
            f" {context + 1} (train.context + 1): lower train.context or add text"
        )
    return max(1, length // context - 1)


def _shuffled(stream: Stream, how: Batching, seed: str) -> Windows:
    context = how.context
    windows = epoch_windows(stream, context)
    # The last window also needs the token after it. The phase shifts all windows by some of the
    # tokens that they leave over.
    spare = min(context, len(stream.ids) - windows * context)

    def starts(samples: np.ndarray) -> np.ndarray:
        found = np.empty(len(samples), np.int64)
        for epoch, here, slots in _epochs(samples, windows, seed):
            found[here] = order.epoch_keys(seed, epoch)[0] % spare + context * slots
        return found

    return Windows(windows, starts)


def _official(stream: Stream, how: Batching, seed: str) -> Windows:
    epoch_windows(stream, how.context)
    prime = order.magic_prime(len(stream.ids), how.context)
    return Windows(prime, lambda samples: order.magic_slots(samples, prime) * how.context)


def _sequential(stream: Stream, how: Batching, seed: str) -> Windows:
    batch, context = how.batch, how.context
    steps = (len(stream.ids) - 1) // batch // context
    if steps < 1:
        raise CorpusError(
            f"{stream.name}: {len(stream.ids)} tokens are too few for {batch} rows to read side by"
            f" side (train.batch), {context + 1} each (train.context + 1): lower one, or add text"
        )

    def starts(samples: np.ndarray) -> np.ndarray:
        return (samples % batch * steps + samples // batch % steps) * context

    return Windows(steps * batch, starts, lambda samples: samples // batch % steps == 0)


_WINDOWS = {"shuffle": _shuffled, "magic_prime": _official, "sequential": _sequential}


def _epochs(
    samples: np.ndarray, size: int, seed: str
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each epoch: its number, which samples are in it, and their places in its permutation."""
    for epoch in np.unique(samples // size).tolist():
        here = samples // size == epoch
        yield epoch, here, order.shuffled(samples[here] % size, size, seed, epoch)


def _reader(stream: Stream, windows: Windows, how: Batching) -> Reader:
    context = how.context

    def read(samples: np.ndarray) -> Batch:
        first = windows.starts(samples)
        ids = np.empty((len(first), context + 1), np.int32)
        mask = None if stream.mask is None else np.empty((len(first), context), bool)
        for row, start in enumerate(first.tolist()):
            ids[row] = stream.ids[start : start + context + 1]
            if mask is not None and stream.mask is not None:
                mask[row] = stream.mask[start + 1 : start + context + 1]
        _check(stream, ids, first, how.vocab_size)
        inputs, targets = ids[:, :-1].copy(), ids[:, 1:]
        resets = inputs == stream.eod if how.reset else np.zeros(inputs.shape, bool)
        if how.reset and stream.documents is not None:
            for row, start in enumerate(first.tolist()):
                some = slice(*np.searchsorted(stream.documents, [start + 1, start + context + 1]))
                resets[row, stream.documents[some] - 1 - start] = True
            inputs[resets] = stream.eod  # whatever id precedes the document
        if windows.fresh is not None:
            resets[:, 0] |= windows.fresh(samples)
        return Batch(inputs, targets, resets, mask)

    return read


def _packs(stream: Stream, how: Batching, seed: str) -> tuple[int, Reader]:
    """The number of packs of whole documents, and what reads them."""
    if not len(stream.ids):
        raise CorpusError(f"{stream.name}: no training documents; add text")
    packs = pack(stream.starts, how.context)
    count = len(packs.first) - 1

    def read(samples: np.ndarray) -> Batch:
        shape = (len(samples), how.context)
        inputs, targets = (np.full(shape, stream.eod, np.int32) for _ in range(2))
        reset, mask = (np.zeros(shape, bool) for _ in range(2))
        for _, here, slots in _epochs(samples, count, seed):
            for row, slot in zip(np.flatnonzero(here), slots.tolist(), strict=True):
                whole = Batch(inputs[row], targets[row], reset[row], mask[row])
                _fill(stream, packs, slot, how.vocab_size, whole)
        return Batch(inputs, targets, reset, mask)

    return count, read


def _fill(stream: Stream, packs: Packs, slot: int, vocab_size: int, row: Batch) -> None:
    """Writes a pack into a row of padding."""
    at = 0
    for piece in range(packs.first[slot], packs.first[slot + 1]):
        start, length = int(packs.start[piece]), int(packs.length[piece])
        here = slice(at, at + length)
        ids = stream.read(start - 1, start + length)
        if stream.starts[np.searchsorted(stream.starts, start)] == start:
            ids = np.concatenate([np.full(1, stream.eod, ids.dtype), ids[1:]])
        _check(stream, ids[None], np.array([start - 1]), vocab_size)
        row.inputs[here], row.targets[here] = ids[:-1], ids[1:]
        row.reset[at] = True
        assert row.mask is not None
        row.mask[here] = True if stream.mask is None else stream.mask[start : start + length]
        at += length
    row.reset[at:] = True  # padding: documents without a token


def _check(stream: Stream, ids: np.ndarray, first: np.ndarray, vocab_size: int) -> None:
    if not ids.size or (ids.max() < vocab_size and ids.min() >= 0):
        return
    row, column = np.argwhere((ids >= vocab_size) | (ids < 0))[0]
    raise CorpusError(
        f"{stream.name}: token {first[row] + column:,} is {ids[row, column]:,}, but the model has"
        f" {vocab_size:,} ids (model.vocab_size); was it made with another tokenizer?"
    )
