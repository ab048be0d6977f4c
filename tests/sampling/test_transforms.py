"""The transforms against the convention, written out in float64 numpy with sorts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import chdtrc

from rwkv_jax.sampling import transforms
from rwkv_jax.sampling.transforms import Settings

truncate, sample = jax.jit(transforms.truncate), jax.jit(transforms.sample)


def settings(temperature=1.0, top_p=1.0, top_k=0, presence=0.0, frequency=0.0, decay=1.0):
    """One row per value; scalars give one row."""
    columns = np.broadcast_arrays(
        *map(np.atleast_1d, (temperature, top_p, top_k, presence, frequency, decay))
    )
    dtypes = [jnp.float32, jnp.float32, jnp.int32, *[jnp.float32] * 3]
    return Settings(*(jnp.asarray(np.array(c, d)) for c, d in zip(columns, dtypes, strict=True)))


def keys(seed, count):
    return jax.random.split(jax.random.key(seed), count)


def probabilities(logits, temperature, top_p, top_k):
    """Probabilities of the next token in float64; ties with either cutoff are kept."""
    p = np.exp(np.float64(logits) - np.max(logits))
    p /= p.sum()
    if temperature == 0:
        temperature, top_p = 1.0, 0.0
    falling = np.sort(p)[::-1]
    keep = np.ones(len(p), bool)
    if top_p < 1:
        keep &= p >= falling[np.argmax(np.cumsum(falling) >= top_p)]
    if 0 < top_k < len(p):
        keep &= p >= falling[top_k - 1]
    p = np.where(keep, p, 0) ** (1 / temperature)
    return p / p.sum()


@pytest.mark.parametrize("size", [1, 2, 5, 128, 129, 1000, 65536])
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_kept_set_equals_that_of_a_sort(size, spread):
    rng = np.random.default_rng(size)
    top_p = np.array([0.0, 0.3, 0.85, 0.85, 0.999, 1.0, 1.0, 1.0, 1.0])
    top_k = np.array([0, 0, 0, 3, 1, 0, 1, 200, 10**6])
    logits = rng.normal(size=(len(top_p), size), scale=spread).astype(np.float32)
    kept = np.asarray(truncate(logits, settings(top_p=top_p, top_k=top_k))) > 0
    for row in range(len(top_p)):
        expected = probabilities(logits[row], 1.0, top_p[row], top_k[row])
        # In float32 the smallest probabilities of the widest spread are 0; they are never drawn.
        visible = np.exp(np.float64(logits[row]) - logits[row].max()) > 1e-30
        np.testing.assert_array_equal(kept[row][visible], expected[visible] > 0)


def test_min_p_keeps_what_is_nearly_as_likely_as_the_best():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 300), scale=2.0).astype(np.float32)
    min_p, top_k = np.array([0.0, 0.05, 0.5, 1.0]), np.array([0, 5, 0, 0])
    chosen = settings(top_k=top_k).replace(min_p=jnp.asarray(min_p, jnp.float32))
    kept = np.asarray(truncate(logits, chosen)) > 0
    p = np.exp(np.float64(logits) - logits.max(axis=1, keepdims=True))
    expected = p >= min_p[:, None]
    expected[1] &= p[1] >= np.sort(p[1])[-5]
    np.testing.assert_array_equal(kept, expected)
    assert kept.sum(axis=1).tolist()[::3] == [300, 1]


# Probabilities, and the number of tokens with each.
TIES = [
    ([1 / 2, 1 / 4, 1 / 8], [1, 1, 2]),
    ([1 / 4, 1 / 8, 1 / 16], [2, 2, 4]),
    ([1 / 256], [256]),
    ([1 / 4, 1 / 1024, 1 / 2048], [2, 256, 512]),
]


@pytest.mark.parametrize("levels, counts", TIES)
def test_ties_with_the_cutoff_are_kept(levels, counts):
    p = np.random.default_rng(0).permutation(np.repeat(levels, counts))
    assert p.sum() == 1
    # Never exactly a running sum: rounding would decide.
    top_p = np.array([0.0, 0.24, 0.49, 0.51, 0.74, 0.8, 0.999, *[1.0] * 5])
    top_k = np.array([0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 100, 300])
    logits = np.log(p).astype(np.float32)[None].repeat(len(top_p), 0)
    kept = np.asarray(truncate(logits, settings(top_p=top_p, top_k=top_k))) > 0
    for row in range(len(top_p)):
        expected = probabilities_of(p, top_p[row], top_k[row])
        np.testing.assert_array_equal(kept[row], expected > 0, err_msg=f"{top_p[row], top_k[row]}")
        # All of a level or none of it.
        for level in levels:
            assert len(set(kept[row][p == level].tolist())) == 1


def probabilities_of(p, top_p, top_k):
    falling = np.sort(p)[::-1]
    cutoff = 0.0 if top_p == 1 else falling[np.argmax(np.cumsum(falling) >= top_p)]
    cutoff = max(cutoff, falling[top_k - 1] if 0 < top_k < len(p) else 0.0)
    return np.where(p >= cutoff, p, 0)


CASES = [
    dict(temperature=1.0, top_p=1.0, top_k=0),
    dict(temperature=0.7, top_p=0.85, top_k=0),
    dict(temperature=1.5, top_p=0.5, top_k=0),
    dict(temperature=2.0, top_p=1.0, top_k=7),
    dict(temperature=0.3, top_p=0.9, top_k=40),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("size", [3, 300])
def test_frequencies_are_the_probabilities(case, size):
    draws = 20_000
    logits = np.random.default_rng(size).normal(size=size, scale=2).astype(np.float32)
    logits[1] = -np.inf  # not allowed
    rows = settings(**{name: np.full(draws, value) for name, value in case.items()})
    tokens = sample(np.tile(logits, (draws, 1)), keys(0, draws), rows)
    seen = np.bincount(np.asarray(tokens), minlength=size)
    expected = probabilities(logits, **case)
    assert not seen[expected == 0].any()
    # Chi-square needs at least five expected of each kind: the rest are merged into one.
    common = expected * draws >= 5
    observed = np.append(seen[common], seen[~common].sum())
    hoped = np.append(expected[common], expected[~common].sum()) * draws
    if hoped[-1] == 0:
        observed, hoped = observed[:-1], hoped[:-1]
    if len(hoped) > 1:
        np.testing.assert_allclose(observed.sum(), hoped.sum(), rtol=1e-8)
        statistic = ((observed - hoped) ** 2 / hoped).sum()
        assert chdtrc(len(hoped) - 1, statistic) > 1e-3  # `scipy.stats` takes a second to import


def test_temperature_zero_is_the_first_argmax_whatever_the_key():
    logits = np.random.default_rng(0).integers(0, 5, (64, 1000)).astype(np.float32)
    tokens = sample(logits, keys(1, 64), settings(temperature=np.zeros(64), top_p=0.9))
    np.testing.assert_array_equal(tokens, np.argmax(logits, axis=1))


def test_a_row_is_drawn_as_if_alone():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 500), scale=3).astype(np.float32)
    seeds = keys(2, 6)
    rows = settings(
        temperature=np.array([0, 0.5, 1, 1, 2, 3]),
        top_p=np.array([0.5, 1.0, 0.2, 0.9, 1.0, 0.99]),
        top_k=np.array([0, 5, 0, 400, 1, 0]),
    )
    together = sample(logits, seeds, rows)
    for i in range(6):
        own = jax.tree.map(lambda x, i=i: np.asarray(x)[i : i + 1], rows)
        alone = sample(logits[i : i + 1], seeds[i : i + 1], own)
        assert alone[0] == together[i]


def test_counts_against_a_table():
    """The official bookkeeping with a dictionary per row: uncounted tokens are present too."""
    vocab, steps = 12, 40
    rng = np.random.default_rng(0)
    increment = np.where(np.arange(vocab) % 3 == 0, 0.0, 1.0)
    vocabulary = transforms.Vocabulary(
        allowed=jnp.ones(vocab, bool), increment=jnp.asarray(increment, jnp.float32)
    )
    rows = settings(presence=[0.4, 0.0], frequency=[0.3, -0.2], decay=[0.9, 0.996])
    presence, frequency, decay = ([0.4, 0.0], [0.3, -0.2], [0.9, 0.996])
    penalise, count = jax.jit(transforms.apply_penalties), jax.jit(transforms.count_tokens)
    counts, tables = transforms.no_counts(2, vocab), [{}, {}]
    for _ in range(steps):
        logits = rng.normal(size=(2, vocab)).astype(np.float32)
        penalised = np.asarray(penalise(logits, counts, rows))
        tokens = rng.integers(0, vocab, 2)
        counts = count(counts, tokens.astype(np.int32), rows, vocabulary)
        for row, table in enumerate(tables):
            expected = np.float64(logits[row])
            for token, occurrence in table.items():
                expected[token] -= presence[row] + frequency[row] * occurrence
            np.testing.assert_allclose(penalised[row], expected, rtol=1e-5, atol=1e-5)
            for token in table:
                table[token] *= decay[row]
            token = int(tokens[row])
            table[token] = table.get(token, 0.0) + increment[token]


def test_settings_do_not_recompile():
    traces = []

    @jax.jit
    def counted(logits, seeds, rows):
        traces.append(1)
        return transforms.sample(logits, seeds, rows)

    for case in CASES:
        counted(np.zeros((1, 50), np.float32), keys(0, 1), settings(**case))
    assert len(traces) == 1
