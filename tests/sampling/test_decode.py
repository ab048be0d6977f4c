"""Prefill and the decode loop against plain `forward`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax import models
from rwkv_jax.config import ModelConfig
from rwkv_jax.models import stack
from rwkv_jax.sampling import Sampling
from rwkv_jax.sampling.decode import (
    BLOCK,
    NO_TOKEN,
    Prefix,
    chunk_length,
    decode,
    decoding_layout,
    extend,
    prefill,
)
from tests.sampling.conftest import VOCAB, config, weights

PROMPT = [5, 33, 200, 49, 1]


def write(generator, decoding, sampling, steps, end=0):
    settings = sampling.batched(decoding.done.shape[0])
    given = generator.params, decoding, settings, generator.vocabulary, steps
    written, decoding = decode(*given, cfg=generator.cfg, end=end)
    return np.asarray(written), decoding


def start(generator, prompts, seeds):
    return prefill(generator.params, prompts, seeds, cfg=generator.cfg, end=0)


@pytest.fixture(scope="module")
def next_logits(generator):
    """Float64 logits after a sequence of tokens, by one call of `forward` over all of it."""
    version = generator.cfg.version
    params, cfg = weights(version), config(version)
    forward = jax.jit(lambda tokens: models.forward(params, tokens, cfg=cfg)[0])

    def after(tokens):
        # Causal, so that one length serves all.
        padded = np.zeros((1, 300), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.float64(forward(padded)[0, len(tokens) - 1])

    return after


@pytest.mark.parametrize("prompt", [PROMPT, []])
def test_greedy_with_penalties_against_forward(generator, next_logits, prompt):
    """The whole loop with state, penalties and counts, replayed token by token."""
    sampling = Sampling(
        temperature=0.0, presence_penalty=0.5, frequency_penalty=0.7, penalty_decay=0.9
    )
    written, decoding = write(generator, start(generator, [prompt], [0]), sampling, 40, end=-2)
    blanks = [1 + byte for byte in b" \t0123456789"]
    table, text = {}, list(prompt) or [0]
    for token in written[0, :40]:
        logits = next_logits(text)[:257]
        for seen, occurrence in table.items():
            logits[seen] -= 0.5 + 0.7 * occurrence
        assert logits[token] > logits.max() - 1e-4
        for seen in table:
            table[seen] *= 0.9
        # The empty text of the end-of-document token is a substring of anything.
        table[token] = table.get(token, 0) + (token not in [0, *blanks])
        text.append(token)
    assert len(table) > 5
    occurrence = np.zeros(VOCAB)
    occurrence[list(table)] = list(table.values())
    np.testing.assert_allclose(decoding.counts.occurrence[0], occurrence, rtol=1e-5)
    assert set(np.flatnonzero(decoding.counts.seen[0])) == set(table)


def test_a_token_that_the_tokenizer_lacks_is_never_drawn(generator, next_logits):
    assert np.argmax(next_logits(PROMPT)) == VOCAB - 2
    written, _ = write(
        generator, start(generator, [PROMPT], [0]), Sampling(top_p=1.0), BLOCK, end=-2
    )
    assert written.max() < 257


@pytest.mark.parametrize("length", [1, 63, 64, 65, 275])
def test_prefill_in_chunks_is_one_forward(generator, next_logits, length):
    prompt = np.random.default_rng(length).integers(0, 257, length + 1).tolist()
    decoding = start(generator, [prompt[:-1]], [0])
    np.testing.assert_allclose(decoding.logits[0], next_logits(prompt[:-1]), rtol=1e-4, atol=1e-4)
    decoding = extend(generator.params, decoding, prompt[-1:], cfg=generator.cfg)
    np.testing.assert_allclose(decoding.logits[0], next_logits(prompt), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("version", "width"),
    [("7", 768)]
    + [
        pytest.param(*case, marks=pytest.mark.slow) for case in (("4", 768), ("6", 768), ("7", 128))
    ],
)
def test_a_prompt_is_the_same_bits_however_it_is_read(version, width):
    """Resumed at any multiple of the chunk, or beside others. Products of small models do not show
    what depends on their shapes: hence the width."""
    cfg = ModelConfig(version=version, layers=2, width=width, vocab_size=VOCAB)
    rng, size = np.random.default_rng(2), chunk_length()
    params = jax.jit(partial(models.init_params, cfg))(jax.random.key(1))
    # Fresh projections are zero: nothing would flow through them.
    noise = jax.tree.map(lambda x: np.float32(0.03 * rng.normal(size=x.shape)), params)
    params = decoding_layout(jax.tree.map(jnp.add, params, noise), cfg)
    prompt = rng.integers(0, VOCAB, 3 * size + 21).tolist()

    def read(prompts, prefix=None):
        return prefill(params, prompts, range(len(prompts)), cfg=cfg, end=0, prefix=prefix)

    whole = read([prompt])
    for cut in (size, 3 * size):
        before = read([prompt[:cut]])
        prefix = Prefix(stack(before.state), cfg, before.logits)
        resumed = read([prompt[cut:], prompt[cut : cut + 5]], prefix)
        for x, y in zip(
            jax.tree.leaves((resumed.logits, resumed.state)),
            jax.tree.leaves((whole.logits, whole.state)),
            strict=True,
        ):
            np.testing.assert_array_equal(x[:1], y)


def test_the_cut_into_calls_makes_no_difference(generator7):
    decoding = start(generator7, [PROMPT, [7], []], [3, 4, 5])
    whole, after = write(generator7, decoding, Sampling(), 40)
    parts = []
    for tokens in (1, 1, 30, 8):
        written, decoding = write(generator7, decoding, Sampling(), tokens)
        assert (written[:, tokens:] == NO_TOKEN).all()
        parts.append(written[:, :tokens])
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole[:, :40])
    for one, other in zip(
        jax.tree.leaves(decoding.state), jax.tree.leaves(after.state), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_row_does_not_depend_on_its_neighbours(generator):
    prompts = [PROMPT, [], PROMPT]
    together, _ = write(generator, start(generator, prompts, [5, 6, 7]), Sampling(), 50)
    for index, prompt in enumerate(prompts):
        alone, _ = write(generator, start(generator, [prompt], [5 + index]), Sampling(), 50)
        np.testing.assert_array_equal(together[index], alone[0])
    assert (together[0] != together[2]).any()  # another seed


def test_a_row_ends_with_its_end_token(generator7):
    decoding = start(generator7, [PROMPT, [7], []], [3, 4, 5])
    free, _ = write(generator7, decoding, Sampling(), 40, end=-2)
    first, *others = free[:, :40].tolist()
    end = next(token for token in first if not any(token in other for other in others))
    written, decoding = write(generator7, decoding, Sampling(), 40, end=end)
    length = first.index(end) + 1
    assert written[0, :length].tolist() == first[:length]
    assert (written[0, length:] == NO_TOKEN).all()
    assert written[1:, :40].tolist() == others
    assert decoding.done.tolist() == [True, False, False]
    # With a single row the loop stops early.
    _, decoding = write(generator7, start(generator7, [PROMPT], [3]), Sampling(), 40, end=end)
    assert decoding.drawn.tolist() == [length]
    after, _ = write(generator7, decoding, Sampling(), 40, end=end)
    assert (after == NO_TOKEN).all()


def test_bfloat16_layout_computes_what_casting_at_use_does(generator7):
    cfg, tokens = generator7.cfg, jnp.asarray([PROMPT])
    params = weights(cfg.version)
    stored = decoding_layout(params, cfg, jnp.bfloat16)
    assert stored.head.dtype == jnp.bfloat16 and stored.ln_out.weight.dtype == jnp.float32
    forward = jax.jit(models.forward, static_argnames=("cfg", "dtype"))
    logits = forward(stored, tokens, cfg=cfg, dtype=jnp.bfloat16)[0]
    expected = forward(models.unstack(params), tokens, cfg=cfg, dtype=jnp.bfloat16)[0]
    np.testing.assert_allclose(logits, expected, rtol=1e-2, atol=1e-2)
