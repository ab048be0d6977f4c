"""Held-out bits per byte: how well the model compresses text that it never trained on.

    bits per byte = (sum of -log p over all held-out tokens) / (UTF-8 bytes of the held-out text) /
    ln 2

which does not depend on the tokenizer, and is comparable to a compressor's output size divided by
its input size. Every token of the stream counts once. The end-of-document tokens count as well:
they say where a document ends, which a decoder needs to know.

Documents are independent: each is read from a fresh state, `eod` first, so its first token has an
input too. They are distributed over the rows of a batch, the longest first and each to the shortest
row. A row is read window after window, and its recurrent state is carried from one to the next, so
context is never cut.
"""

import gzip
import heapq
import itertools
import lzma
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax import models, sharding
from rwkv_jax.config import ModelConfig
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.errors import PREDICTS_NAN, UserError
from rwkv_jax.loss import token_nats
from rwkv_jax.typing import Callable, PyTree

T = TypeVar("T")
Report = Callable[[int, int], None]
"""Called with what is done so far, and the total."""


@runtime_checkable
class Heldout(Protocol):
    """Text that was not trained on."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of its ids."""
        ...

    @property
    def heldout(self) -> np.ndarray:
        """Its documents, each followed by the end-of-document id."""
        ...

    @property
    def heldout_bytes(self) -> int:
        """Its size in UTF-8."""
        ...

    @property
    def heldout_mask(self) -> np.ndarray | None:
        """bool: which of its tokens are such as are trained on; None: all of them."""
        ...


@dataclass(frozen=True)
class Settings:
    """How a model reads text: `window` tokens of at most `rows` documents at a time.

    `dtype` is the compute type, as `jnp.dtype` takes it; `implementation` that of the operators
    (None: chosen by device and shape).
    """

    cfg: ModelConfig
    rows: int = 16
    window: int = 512
    dtype: Any = "float32"
    implementation: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """The cost of some text."""

    nats: float
    tokens: int
    bytes: int
    trained_nats: float = field(default=0.0, kw_only=True)
    """Of the tokens such as are trained on, where that is not all of them."""
    trained_tokens: int = field(default=0, kw_only=True)

    @property
    def trained_loss(self) -> float:
        """Nats per token that is such as are trained on, where that is not all; else NaN."""
        return self.trained_nats / self.trained_tokens if self.trained_tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """The size of the text compressed with the model; NaN if there are no bytes."""
        return self.nats / self.bytes / math.log(2) if self.bytes else math.nan

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Per token."""
        return perplexity(self.nats, self.tokens)


def perplexity(nats: float, count: int) -> float:
    """exp(nats / count): the number of equally likely outcomes with the same uncertainty."""
    try:
        return math.exp(nats / count)
    except OverflowError:
        return math.inf
    except ZeroDivisionError:
        return math.nan


def evaluate(
    params: PyTree,
    tokens: Heldout,
    settings: Settings,
    *,
    limit: int = 0,
    report: Report | None = None,
) -> Evaluation:
    """The cost of the held-out documents, or of about `limit` of their tokens (0: all of them).

    A part is the same at every call: documents in a fixed random order, the last one cut. `report`
    counts tokens. `tokens.heldout` must not be empty.
    """
    eod, stream = tokens.tokenizer.eod, np.asarray(tokens.heldout)
    starts, size = _starts(stream, eod), tokens.heldout_bytes
    parts = list(itertools.pairwise(starts))
    if limit and limit < len(stream):
        parts = _some(parts, limit)
        # The last of these is cut, so its bytes are counted from its tokens.
        size = sum(len(tokens.tokenizer.decode_bytes(stream[slice(*part)])) for part in parts)
    begins, mask = np.array([begin for begin, _ in parts]), tokens.heldout_mask
    documents = [stream[slice(*part)] for part in parts]
    nats, trained_nats, trained_tokens = 0.0, 0.0, 0
    for costs in token_costs(params, documents, settings, eod=eod, report=report):
        nats += float(np.sum(costs.nats, dtype=np.float64))
        if mask is not None:
            trained = mask[begins[costs.document] + costs.position]
            trained_nats += float(np.sum(costs.nats[trained], dtype=np.float64))
            trained_tokens += int(trained.sum())
    return Evaluation(
        nats,
        sum(map(len, documents)),
        size,
        trained_nats=trained_nats,
        trained_tokens=trained_tokens,
    )


def finite(nats: np.ndarray) -> np.ndarray:
    """Returns `nats`. Raises `UserError` if one of them is NaN or infinite."""
    if not np.isfinite(nats).all():
        raise UserError(PREDICTS_NAN)
    return nats


class Costs(NamedTuple):
    """The cost of some tokens: for each token -log p (float32), the index of its document, and the
    number of tokens of that document before it."""

    nats: np.ndarray
    document: np.ndarray
    position: np.ndarray


def token_costs(
    params: PyTree,
    documents: Sequence[np.ndarray],
    settings: Settings,
    *,
    eod: int,
    report: Report | None = None,
) -> Iterator[Costs]:
    """The cost of every token of the documents, a window of every row at a time.

    A document is an array of at least one id, and is read from a fresh state, `eod` first. With a
    mesh in context (`sharding.use_mesh`), on which `params` are, its devices share the rows.
    `report` counts tokens.
    """
    if not documents:
        return
    dealt = _deal([len(document) for document in documents], settings.rows)
    put, count = _placement(len(dealt))
    dealt += [[]] * (count - len(dealt))

    def windows():
        state = _init_state(params, cfg=settings.cfg, rows=count)
        for inputs, targets, document, position in _windows(documents, dealt, settings.window, eod):
            nats, state = _score(
                params, state, put(inputs), put(targets), put(inputs == eod), settings=settings
            )
            yield nats, document, position

    done, total = 0, sum(map(len, documents))
    for nats, document, position in one_late(windows()):
        counted = document >= 0
        yield Costs(np.asarray(nats)[counted], document[counted], position[counted])
        done += int(counted.sum())
        if report:
            report(done, total)


def one_late(items: Iterable[T]) -> Iterator[T]:
    """Yields each item once the next is dispatched, so that the device never waits for the host."""
    waiting: list[T] = []
    for item in items:
        yield from waiting
        waiting = [item]
    yield from waiting


def _placement(rows: int) -> tuple[Callable[[np.ndarray], Any], int]:
    """A function that puts windows on the mesh in context, and the number of rows, rounded up to a
    multiple of the devices that share them."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return (lambda x: x), rows
    devices = math.prod(mesh.shape.get(name, 1) for name in sharding.RULES["batch"])
    put = partial(sharding.put_global, place=sharding.named(mesh, "batch", "time"))
    return put, -(-rows // devices) * devices


@partial(jax.jit, static_argnames=("cfg", "rows"))
def _init_state(params, *, cfg, rows):
    state = sharding.shard_batch(models.init_state(cfg, rows, params))
    return models.unstack(state) if isinstance(params.blocks, tuple) else state


@partial(jax.jit, static_argnames="settings")
def _score(params, state, inputs, targets, reset, *, settings):
    hidden, after = models.backbone(
        params,
        inputs,
        state,
        cfg=settings.cfg,
        reset=reset,
        mesh_axis=sharding.time_axis(),
        dtype=jnp.dtype(settings.dtype),
        implementation=settings.implementation,
    )
    nats = token_nats(hidden, params.head, targets)
    # Replicated, as every process reads all of them.
    return sharding.replicate(nats), jax.tree.map(sharding.reshard_like, after, state)


def _starts(stream: np.ndarray, eod: int) -> list[int]:
    """Where the documents of a stream start, each with its end-of-document token, and the end."""
    ends = (np.flatnonzero(stream == eod) + 1).tolist()
    return [0, *ends, *([len(stream)] if not ends or ends[-1] < len(stream) else [])]


def _some(parts: list[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
    """Documents with `limit` tokens in total, from all over the stream; always the same ones."""
    chosen, left = [], limit
    for index in np.random.default_rng(0).permutation(len(parts)):
        begin, end = parts[index]
        chosen.append((begin, min(end, begin + left)))
        left -= min(end - begin, left)
        if not left:
            break
    return chosen


def _deal(lengths: list[int], rows: int) -> list[list[int]]:
    """The documents of each row; the rows are of about equal length, and fewer if one document
    outgrows them."""
    rows = max(1, min(rows, sum(lengths) // max(lengths), len(lengths)))
    dealt: list[list[int]] = [[] for _ in range(rows)]
    shortest = [(0, row) for row in range(rows)]
    for index in np.argsort(lengths, kind="stable")[::-1].tolist():
        length, row = heapq.heappop(shortest)
        dealt[row].append(index)
        heapq.heappush(shortest, (length + lengths[index], row))
    return dealt


def _windows(
    documents: Sequence[np.ndarray], dealt: list[list[int]], window: int, eod: int
) -> Iterator[np.ndarray]:
    """Inputs, targets, documents and positions, int32 [4, rows, window]; the document of padding
    is -1."""
    rows = [_row([documents[index] for index in row], row, eod) for row in dealt]
    longest = max(row.shape[1] for row in rows)
    for start in range(0, longest, window):
        batch = np.empty((4, len(rows), window), np.int32)
        batch[:] = np.array([eod, eod, -1, 0])[:, None, None]
        for index, row in enumerate(rows):
            part = row[:, start : start + window]
            batch[:, index, : part.shape[1]] = part
        yield batch


def _row(documents: list[np.ndarray], indices: list[int], eod: int) -> np.ndarray:
    """One row of all windows: int32 [4, t], where t is the total length of its documents."""
    if not documents:
        return np.empty((4, 0), np.int32)
    lengths = [len(document) for document in documents]
    before = [np.append(eod, document[:-1]) for document in documents]
    positions = [np.arange(length) for length in lengths]
    values = (before, documents, [np.repeat(indices, lengths)], positions)
    return np.stack([np.concatenate(x, dtype=np.int32, casting="same_kind") for x in values])


def compressors(text: bytes) -> dict[str, float]:
    """Bits per byte of general compressors on the text, to compare a model with."""
    sizes = {
        "gzip -9": len(gzip.compress(text, 9, mtime=0)),
        "xz -9": len(lzma.compress(text, preset=9)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}
