"""Held-out bits per byte against one document at a time in a fresh state."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax import models
from rwkv_jax.config import ModelConfig
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.data.tokens import Tokens
from rwkv_jax.evaluation.bits import Settings, compressors, evaluate


class Letters(ByteTokenizer):
    """Every token but the end of a document is two bytes long."""

    vocab_size = 16

    def decode_bytes(self, ids):
        return b"".join(b"ab" if i else b"" for i in ids)


def corpus(lengths, seed=0):
    rng = np.random.default_rng(seed)
    documents = [np.append(rng.integers(1, 16, n), 0).astype(np.uint16) for n in lengths]
    return documents, Tokens(
        folder=Path(),
        tokenizer=Letters(),
        train=np.zeros(0, np.uint16),
        heldout=np.concatenate(documents),
        digest="",
        train_bytes=0,
        heldout_bytes=2 * sum(lengths),
        train_documents=0,
        heldout_documents=len(lengths),
        skipped_files=0,
    )


def lively_params(cfg):
    """Initial parameters answer the same to everything; noise makes every input matter."""
    params = models.init_params(cfg, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda p: p + 0.3 * jax.random.normal(next(keys), p.shape), params)


def nats_alone(params, cfg, document):
    inputs = np.append(0, document[:-1])
    padded = jnp.asarray(np.pad(inputs, (0, 48 - len(inputs))), jnp.int32)  # one shape to compile
    logits, _ = jax.jit(models.forward, static_argnames="cfg")(params, padded[None], cfg=cfg)
    logp = np.asarray(jax.nn.log_softmax(logits[0]), np.float64)
    return -logp[np.arange(len(document)), document.astype(int)].sum()


@pytest.mark.parametrize("version", [pytest.param("4", marks=pytest.mark.slow), "7"])
@pytest.mark.parametrize(
    "lengths, rows",
    [
        ((9, 1, 30, 0, 12, 5), 3),
        pytest.param((40, 3), 4, marks=pytest.mark.slow),
        pytest.param((6,), 1, marks=pytest.mark.slow),
    ],
)
def test_every_document_is_scored_once_and_alone(version, lengths, rows):
    cfg = ModelConfig(version=version, layers=2, width=64, vocab_size=16)
    params = lively_params(cfg)
    documents, tokens = corpus(lengths)
    expected = sum(nats_alone(params, cfg, document) for document in documents)
    result = evaluate(params, tokens, Settings(cfg, rows, window=8))
    assert result.tokens == sum(lengths) + len(lengths)
    assert result.nats == pytest.approx(expected, rel=2e-6)
    assert result.bits_per_byte == pytest.approx(expected / (2 * sum(lengths)) / math.log(2))


def test_a_part_is_the_same_documents_each_time_and_counts_their_bytes():
    cfg = ModelConfig(version="4", layers=1, width=64, vocab_size=16)
    params = lively_params(cfg)
    documents, tokens = corpus((9, 4, 30, 7, 12))
    results = [
        evaluate(params, tokens, Settings(cfg, rows, window), limit=25)
        for rows, window in ((1, 32), (3, 5))
    ]
    assert [r.tokens for r in results] == [25, 25]
    assert results[0].nats == pytest.approx(results[1].nats, rel=2e-6)
    assert results[0].bytes == results[1].bytes
    # 25 tokens are those of whole documents and the beginning of one: 2 bytes each but for eod.
    assert 40 <= results[0].bytes <= 50
    whole = evaluate(params, tokens, Settings(cfg, rows=2, window=16), limit=10**6)
    assert (whole.tokens, whole.bytes) == (len(tokens.heldout), tokens.heldout_bytes)
    assert len(documents) == 5


def test_reports_progress_to_the_end():
    cfg = ModelConfig(version="4", layers=1, width=64, vocab_size=16)
    _, tokens = corpus((9, 4, 30))
    seen = []
    evaluate(
        lively_params(cfg),
        tokens,
        Settings(cfg, rows=2, window=8),
        report=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (46, 46)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_compressors_measure_bits_per_byte():
    text = b"the same line again and again\n" * 400
    random = np.random.default_rng(0).bytes(4000)
    assert all(0 < value < 0.3 for value in compressors(text).values())
    assert all(8 < value < 8.5 for value in compressors(random).values())
