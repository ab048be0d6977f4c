"""From logits to the next token, by the official conventions (PyPI `rwkv`, `PIPELINE`).

1. Penalties: logit[n] -= presence_penalty * [n was generated] + frequency_penalty * occurrence[n].
2. p = softmax(logits), at temperature 1.
3. Top-p: with p in descending order, the cutoff is the first value at which the running sum reaches
   `top_p`; smaller values are dropped, ties are kept. Top-k: the same with a running count, so the
   cutoff is the k-th largest value (official code drops arbitrary ones of its ties). Min-p, which
   official code does not have: values below `min_p` times the largest are dropped.
4. The draw is from p^(1/temperature) over the kept tokens, renormalised. Temperature 0 is the
   arg-max.
5. occurrence *= penalty_decay, then occurrence[token] += 1 (0 for digits and blanks, see
   `Vocabulary`).

Every setting is an array with one value per row: rows of a batch may differ, and no setting causes
a recompilation.
"""

import math
from typing import Generic

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Key

from rwkv_jax.containers import container
from rwkv_jax.typing import Array, Bool, Float, Int, Leaf

FEW = 512
"""Number of the largest probabilities that are tried first."""


@container
class Settings(Generic[Leaf]):
    """`Sampling` as arrays, [b] each: float32, but `top_k` int32 (0 is no limit)."""

    temperature: Leaf
    top_p: Leaf
    top_k: Leaf
    presence_penalty: Leaf
    frequency_penalty: Leaf
    penalty_decay: Leaf
    min_p: Leaf | None = None


@container
class Vocabulary(Generic[Leaf]):
    """Properties of the tokens, [V] each.

    `allowed`: the tokenizer has this token (a model may have more rows than its tokenizer has
    tokens). `increment`: what one occurrence adds to the count, 1, or 0 for tokens whose text is a
    substring of " \\t0123456789": numbers and tables repeat by nature. They still count as present.
    """

    allowed: Leaf
    increment: Leaf


@container
class Counts(Generic[Leaf]):
    """Tokens generated so far, [b, V] each: decayed occurrences, and whether there were any."""

    occurrence: Leaf
    seen: Leaf


def no_counts(batch: int, vocab_size: int) -> Counts[Array]:
    """Counts before the first token."""
    shape = (batch, vocab_size)
    return Counts(occurrence=jnp.zeros(shape, jnp.float32), seen=jnp.zeros(shape, bool))


def apply_penalties(
    logits: Float[Array, "b V"], counts: Counts[Array], settings: Settings[Array]
) -> Float[Array, "b V"]:
    """Logits minus the presence and frequency penalties of their tokens."""
    presence = settings.presence_penalty[:, None] * counts.seen.astype(jnp.float32)
    return logits - presence - settings.frequency_penalty[:, None] * counts.occurrence


def count_tokens(
    counts: Counts[Array],
    tokens: Int[Array, " b"],
    settings: Settings[Array],
    vocabulary: Vocabulary[Array],
) -> Counts[Array]:
    """The counts after one more token per row: all decay, then the token's own is incremented."""
    rows = jnp.arange(tokens.shape[0])
    occurrence = counts.occurrence * settings.penalty_decay[:, None]
    occurrence = occurrence.at[rows, tokens].add(vocabulary.increment[tokens])
    return Counts(occurrence=occurrence, seen=counts.seen.at[rows, tokens].set(True))


def sample(
    logits: Float[Array, "b V"], keys: Key[Array, " b"], settings: Settings[Array]
) -> Int[Array, " b"]:
    """One token per row, drawn with the row's own key.

    A row's draw depends only on its logits, key and settings. Logits of -inf are never drawn.
    """
    greedy = settings.temperature == 0

    def draw() -> Array:
        logs = jnp.log(truncate(logits, settings))
        weights = jnp.exp(logs / jnp.maximum(settings.temperature, 1e-6)[:, None])
        return jnp.where(greedy, _argmax(logits), jax.vmap(_draw)(keys, weights))

    return lax.cond(jnp.all(greedy), lambda: _argmax(logits), draw)


def truncate(logits: Float[Array, "b V"], settings: Settings[Array]) -> Float[Array, "b V"]:
    """Probabilities divided by the largest, so in [0, 1]; 0 outside top-p, top-k and min-p."""
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    cutoff = _cutoff(weights, settings)
    if settings.min_p is not None:
        cutoff = jnp.maximum(cutoff, settings.min_p)
    return jnp.where(weights >= cutoff[:, None], weights, 0.0)


def _cutoff(weights: Float[Array, "b V"], settings: Settings[Array]) -> Float[Array, " b"]:
    """The smallest kept weight, or a number below it with no weight in between.

    The few largest weights nearly always decide; only if they don't, all are searched. Sorting all
    65,536 of a World vocabulary takes a CPU core 12 ms, half of a 0.1B model's time per token.
    """
    total = _total(_tiles(weights, 0.0))
    goal = settings.top_p * total
    # A sum may round to less than 1, but top_p = 1 has to keep everything.
    goal = jnp.where(settings.top_p >= 1, jnp.inf, goal)
    top_k = jnp.where(settings.top_k > 0, settings.top_k, jnp.iinfo(jnp.int32).max)
    largest = lax.top_k(weights, min(FEW, weights.shape[1]))[0]
    rank = jnp.arange(1, largest.shape[1] + 1, dtype=jnp.int32)
    enough = (jnp.cumsum(largest, axis=1) >= goal[:, None]) | (rank[None] >= top_k[:, None])
    cutoff = jnp.max(jnp.where(enough, largest, 0.0), axis=1)
    # The smallest of the few may have ties among the others. (Not `largest[:, -1]`: XLA turns a
    # slice of a top-k into a full sort.)
    smallest = jnp.min(largest, axis=1)
    decided = (cutoff > smallest) | ((settings.top_p >= 1) & (settings.top_k <= 0))

    def search() -> Array:
        # Without all weights below this, the sum is still enough.
        low = jnp.maximum(0.5 * (total - goal) / weights.shape[1], 0.0)
        larger = jnp.sum(largest > smallest[:, None], axis=1, dtype=jnp.int32)
        found = _bisect(weights, goal, top_k, decided, (low, smallest, larger))
        return jnp.where(decided, cutoff, found)

    return lax.cond(jnp.all(decided), lambda: cutoff, search)


def _bisect(
    weights: Float[Array, "b V"],
    goal: Float[Array, " b"],
    top_k: Int[Array, " b"],
    decided: Bool[Array, " b"],
    bracket: tuple[Float[Array, " b"], Float[Array, " b"], Int[Array, " b"]],
) -> Float[Array, " b"]:
    """`_cutoff` of the rows that are not `decided`, however many tokens are kept; a dozen passes.

    With mass(c) and count(c) over all weights >= c, it is the largest c with mass(c) >= goal or
    count(c) >= top_k, found by bisecting bit patterns (those of positive floats are ordered as the
    floats are) until one weight is left between. `bracket` has a number that is not above it, one
    that is not below it, and how many weights are larger than the second.
    """
    tiles = _tiles(weights, 0.0)
    low, high = (lax.bitcast_convert_type(x, jnp.int32) for x in bracket[:2])

    def undecided(carry: tuple[Array, ...]) -> Array:
        low, high, kept_low, kept_high = carry
        return jnp.any(~decided & (high - low > 1) & (kept_low - kept_high > 1))

    def halve(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        low, high, kept_low, kept_high = carry
        middle = low + (high - low) // 2
        kept = tiles >= lax.bitcast_convert_type(middle, jnp.float32)[:, None, None]
        count = _total(kept.astype(jnp.float32)).astype(jnp.int32)
        enough = (_total(jnp.where(kept, tiles, 0.0)) >= goal) | (count >= top_k)
        return (
            jnp.where(enough, middle, low),
            jnp.where(enough, high, middle),
            jnp.where(enough, count, kept_low),
            jnp.where(enough, kept_high, count),
        )

    everything = jnp.full(weights.shape[0], weights.shape[1], jnp.int32)
    low, *_ = lax.while_loop(undecided, halve, (low, high + 1, everything, bracket[2]))
    return lax.bitcast_convert_type(low, jnp.float32)


def _draw(key: Key[Array, ""], weights: Float[Array, " V"]) -> Int[Array, ""]:
    """A token with probability proportional to its weight.

    The vocabulary is laid out as a square; the row is drawn first, then the column. Two draws from
    sqrt(V) need 2 sqrt(V) random numbers; V of them would cost more than the softmax.
    """
    row_key, column_key = jax.random.split(key)
    tiles = _tiles(weights[None], 0.0)
    row = jax.random.categorical(row_key, jnp.log(_by_row(tiles)[0]))
    column = jax.random.categorical(column_key, jnp.log(tiles[0, row]))
    return (row * tiles.shape[2] + column).astype(jnp.int32)


def _argmax(logits: Float[Array, "b V"]) -> Int[Array, " b"]:
    """The smallest index with the maximum; XLA's own arg-max is slow on CPU."""
    tiles = _tiles(logits, -jnp.inf)
    index = jnp.arange(tiles[0].size, dtype=jnp.int32).reshape(tiles.shape[1:])
    largest = tiles == jnp.max(logits, axis=-1)[:, None, None]
    return jnp.min(jnp.where(largest, index[None], index.size), axis=(1, 2))


def _tiles(x: Float[Array, "b V"], fill: float) -> Float[Array, "b rows columns"]:
    """Each row of a batch padded to a near-square."""
    columns = math.isqrt(max(x.shape[1] - 1, 0)) + 1
    rows = -(-x.shape[1] // columns)
    padding = ((0, 0), (0, rows * columns - x.shape[1]))
    return jnp.pad(x, padding, constant_values=fill).reshape(x.shape[0], rows, columns)


def _total(tiles: Float[Array, "b rows columns"]) -> Float[Array, " b"]:
    return jnp.sum(_by_row(tiles), axis=1)


def _by_row(tiles: Float[Array, "b rows columns"]) -> Float[Array, "b rows"]:
    """Sums along the last axis, as a product: XLA's own sums take six times as long on CPU."""
    return jnp.matmul(tiles, jnp.ones(tiles.shape[2], tiles.dtype), precision=lax.Precision.HIGHEST)
