"""Held-out bits per byte: how well the model compresses text that it never trained on.

    bits per byte = (sum of -log p over all held-out tokens) / (UTF-8 bytes of the held-out text) /
    ln 2

which does not depend on the tokenizer, and is what a compressor's output divided by its input is.
Every token of the stream counts once. The end-of-document tokens count as well: they say where a
document ends, which a decoder would have to be told.

Documents are independent: each is read from a fresh state, `eod` first, so its first token has an
input too. They are dealt out to parallel lanes, the longest first and each to the shortest lane; a
lane is read window after window, the recurrent state carried from one to the next, so context is
never cut.
"""

import gzip
import heapq
import lzma
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
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


@runtime_checkable
class Heldout(Protocol):
    """Text that was not trained on."""

    @property
    def tokenizer(self) -> Tokenizer:
        """What made its ids."""
        ...

    @property
    def heldout(self) -> np.ndarray:
        """Its documents, each followed by the end-of-document id."""
        ...

    @property
    def heldout_bytes(self) -> int:
        """Its size in UTF-8."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """The cost of some text."""

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """What compressing the text with the model would cost; NaN if there are no bytes."""
        return self.nats / self.bytes / math.log(2) if self.bytes else math.nan

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return perplexity(self.nats, self.tokens)


def perplexity(nats: float, count: int) -> float:
    """exp(nats / count): among how many equally likely things the model is as uncertain."""
    try:
        return math.exp(nats / count)
    except OverflowError:
        return math.inf
    except ZeroDivisionError:
        return math.nan


def evaluate(
    params: PyTree,
    tokens: Heldout,
    *,
    cfg: ModelConfig,
    lanes: int,
    window: int,
    limit: int = 0,
    dtype: Any = jnp.float32,
    implementation: str | None = None,
    report: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """The cost of the held-out documents, or of about `limit` of their tokens (0: all of them).

    At most `lanes` documents are read side by side, `window` tokens at a time. `report(done,
    total)` is called with the tokens read so far. A part is the same at every call: documents in an
    order of their own, the last one cut. `tokens.heldout` must not be empty.
    """
    eod, stream = tokens.tokenizer.eod, np.asarray(tokens.heldout)
    documents, size = _documents(stream, eod), tokens.heldout_bytes
    if limit and limit < len(stream):
        documents = _some(documents, limit)
        # The last document kept is cut, so its bytes are counted from its tokens.
        size = sum(len(tokens.tokenizer.decode_bytes(document)) for document in documents)
    count = sum(map(len, documents))
    nats, done = 0.0, 0
    for costs in token_costs(
        params,
        documents,
        cfg=cfg,
        eod=eod,
        lanes=lanes,
        window=window,
        dtype=dtype,
        implementation=implementation,
    ):
        nats += float(np.sum(costs.nats, dtype=np.float64))
        done += len(costs.nats)
        if report:
            report(done, count)
    return Evaluation(nats, count, size)


def finite(nats: np.ndarray) -> np.ndarray:
    """The same. Raises `UserError` if one of them is NaN or infinite."""
    if not np.isfinite(nats).all():
        raise UserError(PREDICTS_NAN)
    return nats


class Costs(NamedTuple):
    """What some tokens cost, one number each."""

    nats: np.ndarray
    """float32."""
    document: np.ndarray
    """The index of the document that the token belongs to."""
    position: np.ndarray
    """How many tokens of its document come before it."""


def token_costs(
    params: PyTree,
    documents: Sequence[np.ndarray],
    *,
    cfg: ModelConfig,
    eod: int,
    lanes: int,
    window: int,
    dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> Iterator[Costs]:
    """What every token of the documents costs, a piece of every lane at a time.

    A document is an array of ids, at least one, and is read from a fresh state, `eod` first. Where
    a mesh is in context (`sharding.use_mesh`), `params` lie on it and its devices share the lanes.
    """
    if not documents:
        return
    dealt = _deal([len(document) for document in documents], lanes)
    place, count = _places(len(dealt))
    dealt += [[]] * (count - len(dealt))
    score = partial(_score, cfg=cfg, dtype=jnp.dtype(dtype), implementation=implementation)

    def windows():
        state = _fresh(params, cfg=cfg, lanes=count)
        for inputs, targets, document, position in _windows(documents, dealt, window, eod):
            nats, state = score(params, state, place(inputs), place(targets), place(inputs == eod))
            yield nats, document, position

    for nats, document, position in one_late(windows()):
        counted = document >= 0
        yield Costs(np.asarray(nats)[counted], document[counted], position[counted])


def one_late(items: Iterable[T]) -> Iterator[T]:
    """Each item once the next is on its way, so that the device never waits for the host."""
    waiting: list[T] = []
    for item in items:
        yield from waiting
        waiting = [item]
    yield from waiting


def _places(lanes: int) -> tuple[Callable[[np.ndarray], Any], int]:
    """How windows come to the devices of the mesh in context, and how many lanes they divide."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return (lambda x: x), lanes
    devices = math.prod(mesh.shape.get(name, 1) for name in sharding.RULES["batch"])
    return partial(sharding.put_global, place=sharding.named(mesh, "batch", "time")), (
        -(-lanes // devices) * devices
    )


@partial(jax.jit, static_argnames=("cfg", "lanes"))
def _fresh(params, *, cfg, lanes):
    """The state before a document in every lane, parted as the lanes."""
    return sharding.shard_batch(models.init_state(cfg, lanes, params))


@partial(jax.jit, static_argnames=("cfg", "dtype", "implementation"))
def _score(params, state, inputs, targets, reset, *, cfg, dtype, implementation):
    hidden, after = models.backbone(
        params,
        inputs,
        state,
        cfg=cfg,
        reset=reset,
        mesh_axis=sharding.time_axis(),
        dtype=dtype,
        implementation=implementation,
    )
    nats = token_nats(hidden, params.head, targets)
    # Every process reads all of them.
    return sharding.replicate(nats), jax.tree.map(sharding.reshard_like, after, state)


def _documents(stream: np.ndarray, eod: int) -> list[np.ndarray]:
    """The documents of a stream, their end-of-document tokens included."""
    ends = np.flatnonzero(stream == eod) + 1
    documents = np.split(stream, ends)
    return documents if len(documents[-1]) else documents[:-1]


def _some(documents: list[np.ndarray], limit: int) -> list[np.ndarray]:
    """Documents of together `limit` tokens, from all over the stream; always the same ones."""
    chosen, left = [], limit
    for index in np.random.default_rng(0).permutation(len(documents)):
        chosen.append(documents[index][:left])
        left -= len(chosen[-1])
        if not left:
            break
    return chosen


def _deal(lengths: list[int], lanes: int) -> list[list[int]]:
    """Which documents each lane has; the lanes are of about equal length, and fewer if one document
    outgrows them."""
    lanes = max(1, min(lanes, sum(lengths) // max(lengths), len(lengths)))
    dealt: list[list[int]] = [[] for _ in range(lanes)]
    shortest = [(0, lane) for lane in range(lanes)]
    for index in np.argsort(lengths, kind="stable")[::-1].tolist():
        length, lane = heapq.heappop(shortest)
        dealt[lane].append(index)
        heapq.heappush(shortest, (length + lengths[index], lane))
    return dealt


def _windows(
    documents: Sequence[np.ndarray], dealt: list[list[int]], window: int, eod: int
) -> Iterator[np.ndarray]:
    """Inputs, targets, documents and positions, int32 [4, lanes, window]; the document of padding
    is -1."""
    lanes = [_lane([documents[index] for index in lane], lane, eod) for lane in dealt]
    longest = max(lane.shape[1] for lane in lanes)
    for start in range(0, longest, window):
        piece = np.empty((4, len(lanes), window), np.int32)
        piece[:] = np.array([eod, eod, -1, 0])[:, None, None]
        for row, lane in enumerate(lanes):
            part = lane[:, start : start + window]
            piece[:, row, : part.shape[1]] = part
        yield piece


def _lane(documents: list[np.ndarray], indices: list[int], eod: int) -> np.ndarray:
    """The rows of `_windows`, as long as the documents together."""
    if not documents:
        return np.empty((4, 0), np.int32)
    lengths = [len(document) for document in documents]
    before = [np.append(eod, document[:-1]) for document in documents]
    positions = [np.arange(length) for length in lengths]
    rows = (before, documents, [np.repeat(indices, lengths)], positions)
    return np.stack([np.concatenate(row, dtype=np.int32, casting="same_kind") for row in rows])


def compressors(text: bytes) -> dict[str, float]:
    """Bits per byte of general compressors on the text: the marks that a model is held against."""
    sizes = {
        "gzip -9": len(gzip.compress(text, 9, mtime=0)),
        "xz -9": len(lzma.compress(text, preset=9)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}
