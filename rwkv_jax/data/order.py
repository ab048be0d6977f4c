"""The order of samples, as pure functions of a sample's number: any step costs as much as the
first, and the number of processes does not change it.

Shuffled, every epoch visits each sample once in an order of its own: a keyed permutation (a Feistel
network, iterated until it lands inside the range) computed sample by sample. Nothing is stored, and
the order depends on no library's generator. The official trainers' order (RWKV-LM
`RWKV-v7/train_temp`, `src/dataset.py`; `my_pile_stage` of the older ones) is another permutation:
for a prime p = 2 mod 3, cubing permutes the numbers below p.
"""

import functools
import hashlib
import math
from collections.abc import Sequence

import numpy as np

from rwkv_jax.config import MINI_EPOCH
from rwkv_jax.data.files import CorpusError

ROUNDS = 6
SHARES = 1 << 40
"""Weights of a mixture are rounded to multiples of 1 / SHARES."""


def magic_prime(tokens: int, context: int) -> int:
    """The official order's period: the largest prime = 2 (mod 3) below the number of contexts.

    Raises CorpusError where the trainers' own check fails: the prime must be more than 0.9 of them.
    """
    contexts = tokens // context
    prime = contexts - 1
    while prime > 2 and not (prime % 3 == 2 and _is_prime(prime)):
        prime -= 1
    if prime < 2 or not 0.9 < prime / contexts <= 1:
        raise CorpusError(
            f"too few tokens for the official order: of {tokens:,}, {contexts:,} contexts of"
            f" {context}, it would use {max(prime, 0):,} contexts; lower train.context, add text or"
            ' repeat it, or set data.sampler = "shuffle"'
        )
    return prime


def magic_slots(samples: np.ndarray, prime: int) -> np.ndarray:
    """int64: the context that each sample of the official order reads; samples count from 0.

    The official count starts from 1: mini-epoch x 40,320 + the sample in it + 1.
    """
    # As the trainers compute it: in double precision, truncated.
    factor = int(prime * ((math.sqrt(5) - 1) / 2))
    return np.array([factor * pow(int(i) + 1, 3, prime) % prime for i in samples], np.int64)


def official_sample(step: int, row: int, *, micro_batch: int, rank: int = 0, world: int = 1) -> int:
    """The number of the sample in a row of one device's batch, for an official trainer of `world`
    devices.

    Together the devices read the samples of a single device with the whole batch, so the gradient
    is the same. Raises ValueError, as the trainers do, if a mini-epoch is not a whole number of
    steps.
    """
    steps, odd = divmod(MINI_EPOCH, micro_batch * world)
    if odd:
        raise ValueError(f"{micro_batch} x {world} samples a step do not divide {MINI_EPOCH:,}")
    epoch, within = divmod(step, steps)
    return epoch * MINI_EPOCH + (within * micro_batch + row) * world + rank


def shuffled(samples: np.ndarray, size: int, seed: str, epoch: int) -> np.ndarray:
    """int64: the image of each sample under this epoch's permutation of range(size)."""
    return _permute(samples, size, epoch_keys(seed, epoch)[1:])


def interleave(samples: np.ndarray, weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """int64: the source of each sample of a mixture, and the sample's number within that source.

    Of any first n samples a source has n times its share of the weights, to within one for two
    sources and half a sample more for each doubling of their number.
    """
    if len(weights) == 1:
        return np.zeros(len(samples), np.int64), np.asarray(samples, np.int64)
    half = len(weights) // 2
    share = round(SHARES * sum(weights[:half]) / sum(weights))
    share = min(max(share, 1), SHARES - 1)
    numbers = np.asarray(samples).astype(object)  # Python integers do not overflow
    before, after = (
        (((numbers + i) * share + SHARES // 2) // SHARES).astype(np.int64) for i in (0, 1)
    )
    source = np.empty(len(samples), np.int64)
    index = np.empty(len(samples), np.int64)
    first = after > before
    source[first], index[first] = interleave(before[first], weights[:half])
    source[~first], index[~first] = interleave((samples - before)[~first], weights[half:])
    source[~first] += half
    return source, index


@functools.lru_cache(maxsize=64)
def epoch_keys(seed: str, epoch: int) -> tuple[int, ...]:
    """Random 64-bit numbers of an epoch: one for the phase, then the keys of its permutation."""
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * (1 + ROUNDS)).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8]) for i in range(1 + ROUNDS))


def _permute(index: np.ndarray, size: int, keys: Sequence[int]) -> np.ndarray:
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


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
