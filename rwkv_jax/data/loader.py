"""Batches as a pure function of seed and step: what a run sees next depends on nothing it has to
remember.

The training stream (documents, each followed by the end-of-document id) is cut into windows of
`context` tokens, from a phase that each epoch draws anew, and each epoch visits every window once
in an order of its own. Step `s` takes the windows `s * batch ... s * batch + batch - 1` of the
endless sequence of epochs, however many processes share the work.

The order is a keyed permutation (a Feistel network, walked until it lands inside the range)
computed window by window: nothing is stored, no library's generator decides it, and any step is as
near as the first."""

import functools
import hashlib
from typing import NamedTuple

import numpy as np

from rwkv_jax.data.files import CorpusError

ROUNDS = 6


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


def batch(
    tokens: np.ndarray,
    *,
    seed: int,
    step: int,
    batch: int,
    context: int,
    eod: int,
    rows: slice = slice(None),
) -> Batch:
    """The batch of a step; with `rows`, only those rows of it, so that a process can read its own
    part.

    Raises CorpusError if the tokens do not fill one window.
    """
    windows = epoch_windows(len(tokens), context)
    number = step * batch + np.arange(batch)[rows]
    starts = np.empty(len(number), np.int64)
    for epoch in np.unique(number // windows):
        mine = number // windows == epoch
        phase, *keys = _epoch_keys(seed, int(epoch))
        # The last window needs its next token too; the phase may use up what the windows leave
        # over.
        phase %= min(context, len(tokens) - windows * context)
        starts[mine] = phase + context * _permute(number[mine] % windows, windows, keys)
    cut = np.empty((len(number), context + 1), np.int32)
    for row, start in enumerate(starts):
        cut[row] = tokens[start : start + context + 1]
    inputs, targets = cut[:, :-1], cut[:, 1:]
    return Batch(inputs, targets, inputs == eod)


def epoch_windows(length: int, context: int) -> int:
    """Windows in an epoch over `length` tokens. Raises CorpusError if there is none."""
    if length <= context:
        raise CorpusError(
            f"the training documents have {length} tokens, one window needs {context + 1}"
            f" (train.context + 1): lower train.context or add text"
        )
    return max(1, length // context - 1)


@functools.lru_cache(maxsize=8)
def _epoch_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * (1 + ROUNDS)).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8]) for i in range(1 + ROUNDS))


def _permute(index: np.ndarray, size: int, keys: list[int]) -> np.ndarray:
    """Where a keyed permutation of range(size) sends each index."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    image = index.astype(np.uint64)
    outside = np.ones(len(image), bool)
    # The network permutes 4 ** half >= size numbers; following it until it re-enters the range
    # permutes the range.
    while outside.any():
        left, right = image[outside] >> np.uint64(half), image[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ np.uint64(key)) & mask)
        image[outside] = left << np.uint64(half) | right
        outside = image >= size
    return image.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every input bit moves every output
    bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
