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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax import models
from rwkv_jax.config import ModelConfig
from rwkv_jax.data.prepare import Tokens
from rwkv_jax.training.loss import token_nats
from rwkv_jax.typing import Callable, PyTree


@dataclass(frozen=True)
class Evaluation:
    """The cost of some held-out text."""

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """What compressing the text with the model would cost."""
        return self.nats / self.bytes / math.log(2)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens


def evaluate(
    params: PyTree,
    tokens: Tokens,
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
    eod, stream = tokens.tokenizer.eod, tokens.heldout
    documents = _documents(stream, eod)
    size = tokens.heldout_bytes
    if limit and limit < len(stream):
        documents = _some(documents, limit)
        # The last document kept is cut, so its bytes are counted from its tokens.
        size = sum(len(tokens.tokenizer.decode_bytes(stream[a:b])) for a, b in documents)
    dealt = _deal(documents, lanes)
    count = sum(b - a for a, b in documents)
    state = models.init_state(cfg, len(dealt), params)
    nats, done, waiting = 0.0, 0, None
    for inputs, targets, counted in _windows(stream, dealt, window, eod):
        scored, state = _score(
            params,
            state,
            inputs,
            targets,
            inputs == eod,
            cfg=cfg,
            dtype=jnp.dtype(dtype),
            implementation=implementation,
        )
        if waiting is not None:  # read one window late, so that the device never waits for the host
            nats += _sum(*waiting)
        waiting = (scored, counted)
        done += int(counted.sum())
        if report:
            report(done, count)
    nats += _sum(*waiting) if waiting else 0.0
    return Evaluation(nats, count, size)


@partial(jax.jit, static_argnames=("cfg", "dtype", "implementation"))
def _score(params, state, inputs, targets, reset, *, cfg, dtype, implementation):
    hidden, state = models.backbone(
        params, inputs, state, cfg=cfg, reset=reset, dtype=dtype, implementation=implementation
    )
    return token_nats(hidden, params.head, targets), state


def _sum(scored, counted) -> float:
    return float(np.sum(np.asarray(scored), where=counted, dtype=np.float64))


def _documents(stream: np.ndarray, eod: int) -> list[tuple[int, int]]:
    """Where each document begins and where it ends, its end-of-document token included."""
    ends = np.flatnonzero(stream == eod) + 1
    if not len(ends) or ends[-1] != len(stream):
        ends = np.append(ends, len(stream))
    return list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))


def _some(documents: list[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
    """Documents of together `limit` tokens, from all over the stream; always the same ones."""
    chosen, left = [], limit
    for index in np.random.default_rng(0).permutation(len(documents)):
        start, stop = documents[index]
        chosen.append((start, min(stop, start + left)))
        left -= chosen[-1][1] - start
        if not left:
            break
    return chosen


def _deal(documents: list[tuple[int, int]], lanes: int) -> list[list[tuple[int, int]]]:
    """The documents in lanes of about equal length; fewer lanes if one document outgrows them."""
    lengths = [stop - start for start, stop in documents]
    lanes = max(1, min(lanes, sum(lengths) // max(lengths), len(documents)))
    dealt: list[list[tuple[int, int]]] = [[] for _ in range(lanes)]
    shortest = [(0, lane) for lane in range(lanes)]
    for index in np.argsort(lengths, kind="stable")[::-1]:
        length, lane = heapq.heappop(shortest)
        dealt[lane].append(documents[index])
        heapq.heappush(shortest, (length + lengths[index], lane))
    return dealt


def _windows(
    stream: np.ndarray, dealt: list[list[tuple[int, int]]], window: int, eod: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Inputs and targets, int32 [lanes, window], and which targets count; the rest is padding."""
    inputs, targets = [], []
    for lane in dealt:
        inputs.append(np.concatenate([_after(stream[a:b], eod) for a, b in lane]))
        targets.append(np.concatenate([stream[a:b] for a, b in lane]))
    lengths = np.array([len(lane) for lane in targets])
    for start in range(0, lengths.max(), window):
        cut = slice(start, start + window)
        counted = start + np.arange(window) < lengths[:, None]
        yield _pad(inputs, cut, eod), _pad(targets, cut, eod), counted


def _after(document: np.ndarray, eod: int) -> np.ndarray:
    """What the model has just read when it predicts each token of the document."""
    return np.concatenate([[eod], document[:-1]])


def _pad(lanes: list[np.ndarray], cut: slice, eod: int) -> np.ndarray:
    window = np.full((len(lanes), cut.stop - cut.start), eod, np.int32)
    for row, lane in zip(window, lanes, strict=True):
        piece = lane[cut]
        row[: len(piece)] = piece
    return window


def compressors(text: bytes) -> dict[str, float]:
    """Bits per byte of general compressors on the text: the marks that a model is held against."""
    sizes = {
        "gzip -9": len(gzip.compress(text, 9, mtime=0)),
        "xz -9": len(lzma.compress(text, preset=9)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}
