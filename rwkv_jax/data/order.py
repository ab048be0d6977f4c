"""Which sample comes when: pure functions of the sample's number, so that any step is as near as
the first and no number of processes changes it.

Shuffled, every epoch visits each sample once in an order of its own: a keyed permutation (a Feistel
network, walked until it lands inside the range) computed sample by sample; nothing is stored, and
no library's generator decides it. The official trainers' order (RWKV-LM `RWKV-v7/train_temp`,
`src/dataset.py`; `my_pile_stage` of the older ones) is a permutation of another kind: with a prime
p = 2 mod 3, cubing permutes the numbers below p.
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
"""What weights of a mixture are counted in."""


def magic_prime(tokens: int, context: int) -> int:
    """The official order's period: the largest prime = 2 (mod 3) below the number of contexts.

    Raises `CorpusError` where the trainers' own check would fail: it must be more than 0.9 of them.
    """
    contexts = tokens // context
    prime = contexts - 1
    while prime > 2 and not (prime % 3 == 2 and _is_prime(prime)):
        prime -= 1
    if prime < 2 or not 0.9 < prime / contexts <= 1:
        raise CorpusError(
            f"{tokens:,} tokens are {contexts:,} contexts of {context}, of which the official order"
            f" would see {max(prime, 0):,}: too few; lower train.context, add text or repeat it, or"
            ' set data.sampler = "shuffle"'
        )
    return prime


def magic_slots(samples: np.ndarray, prime: int) -> np.ndarray:
    """Which context each sample of the official order is, int64; samples count from 0.

    The official count starts from 1: mini-epoch x 40,320 + the sample in it + 1.
    """
    # As the trainers compute it: in double precision, cut off.
    factor = int(prime * ((math.sqrt(5) - 1) / 2))
    return np.array([factor * pow(int(i) + 1, 3, prime) % prime for i in samples], np.int64)


def official_sample(step: int, row: int, *, micro_batch: int, rank: int = 0, world: int = 1) -> int:
    """The number of the sample that an official trainer of `world` devices has in a row of its own
    batch.

    Together the devices have the samples of one device with the whole batch, so the gradient is the
    same. Raises `ValueError` if a mini-epoch is no whole number of steps, which they refuse too.
    """
    steps, odd = divmod(MINI_EPOCH, micro_batch * world)
    if odd:
        raise ValueError(f"{micro_batch} x {world} samples a step do not divide {MINI_EPOCH:,}")
    epoch, within = divmod(step, steps)
    return epoch * MINI_EPOCH + (within * micro_batch + row) * world + rank


def shuffled(samples: np.ndarray, size: int, seed: str, epoch: int) -> np.ndarray:
    """Where this epoch's permutation of range(size) sends each sample, int64."""
    return _permute(samples, size, epoch_keys(seed, epoch)[1:])


def turns(samples: np.ndarray, weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Of each sample of a mixture its source, and which sample of that source it is.

    Of any first n samples a source has n times its share of the weights, to within one for two
    sources and half a sample more with each doubling of them. Shares are whole 2^-40ths.
    """
    if len(weights) == 1:
        return np.zeros(len(samples), np.int64), np.asarray(samples, np.int64)
    half = len(weights) // 2
    share = round(SHARES * sum(weights[:half]) / sum(weights))
    share = min(max(share, 1), SHARES - 1)
    numbers = np.asarray(samples).astype(object)  # Python's, which do not overflow
    before, after = (
        (((numbers + i) * share + SHARES // 2) // SHARES).astype(np.int64) for i in (0, 1)
    )
    source = np.empty(len(samples), np.int64)
    index = np.empty(len(samples), np.int64)
    first = after > before
    source[first], index[first] = turns(before[first], weights[:half])
    source[~first], index[~first] = turns((samples - before)[~first], weights[half:])
    source[~first] += half
    return source, index


@functools.lru_cache(maxsize=64)
def epoch_keys(seed: str, epoch: int) -> tuple[int, ...]:
    """Random 64-bit numbers of an epoch: one for any use, then those of its permutation."""
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
