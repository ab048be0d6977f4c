"""Bits per byte of text, whole and by position, against one token at a time."""

import math
from pathlib import Path

import numpy as np
import pytest
from evaluation.tiny_models import EOD, guesser, model, nats

from rwkv_jax.data import pieces
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.data.tokens import Tokens
from rwkv_jax.errors import UserError
from rwkv_jax.evaluation.bits import Settings, evaluate
from rwkv_jax.evaluation.continuations import Prompt, score
from rwkv_jax.evaluation.text import encode, measure

DOCUMENTS = ["a", "héllo wörld, " * 6, "1 2 3 4 5 6 7 8 9", "x" * 15, "of  white\n\nspace " * 3]


def reading(cfg, rows=16, window=16):
    return Settings(cfg, rows, window)


@pytest.mark.parametrize("version", [*(pytest.param(x, marks=pytest.mark.slow) for x in "46"), "7"])
def test_every_token_is_counted_where_it_stands(version):
    params, cfg = model(version)
    text = encode("some", DOCUMENTS, ByteTokenizer())
    found = measure(params, text, reading(cfg, 2))
    data = [document.encode() for document in DOCUMENTS]
    costs = [nats(version, [1 + byte for byte in some] + [EOD]) for some in data]
    assert found.nats == pytest.approx(sum(cost.sum() for cost in costs), rel=2e-6)
    assert (found.documents, found.words) == (5, sum(len(x.split()) for x in DOCUMENTS))
    assert (found.bytes, found.tokens) == (sum(map(len, data)), sum(map(len, data)) + 5)
    assert [(x.start, x.stop) for x in found.buckets] == [(0, 16), (16, 32), (32, 64), (64, 91)]
    for part in found.buckets:
        here = [cost[part.start : part.stop] for cost in costs]
        assert part.nats == pytest.approx(sum(cost.sum() for cost in here), rel=1e-5)
        assert part.tokens == sum(map(len, here))
        assert part.documents == sum(map(bool, map(len, here)))
        assert part.bytes == sum(len(some[part.start : part.stop]) for some in data)


@pytest.mark.parametrize("batch, window", [pytest.param(1, 64, marks=pytest.mark.slow), (100, 5)])
def test_neither_batch_nor_window_matter(batch, window):
    params, cfg = model("7")
    text = encode("some", DOCUMENTS, ByteTokenizer())
    expected = measure(params, text, reading(cfg, 2))
    found = measure(params, text, reading(cfg, batch, window))
    assert [x.nats for x in found.buckets] == pytest.approx(
        [x.nats for x in expected.buckets], rel=1e-5
    )


@pytest.mark.parametrize(
    "longest, stops",
    [
        (1, [1]),
        (16, [16]),
        (17, [16, 17]),
        (32, [16, 32]),
        (33, [16, 32, 33]),
        (90, [16, 32, 64, 90]),
    ],
)
def test_buckets_double_and_cover_all(longest, stops):
    params, cfg = guesser({"x": 0.5})
    found = measure(
        params,
        encode("x", ["x" * (longest - 1) or "x"], ByteTokenizer(), longest),
        reading(cfg),
    )
    assert [part.stop for part in found.buckets] == stops
    assert [part.start for part in found.buckets] == [0, *stops[:-1]]
    for name in ("nats", "tokens", "bytes"):
        parts = math.fsum(getattr(part, name) for part in found.buckets)
        assert parts == pytest.approx(getattr(found, name), rel=1e-12)


def test_rates_of_a_model_known_by_heart():
    params, cfg = guesser({"x": 0.5, " ": 0.25})
    rest = math.log(0.25 / 255)  # of eod too
    found = measure(params, encode("x", ["x xx", "xxx\n"], ByteTokenizer()), reading(cfg))
    expected = -(6 * math.log(0.5) + math.log(0.25) + 3 * rest)
    assert found.nats == pytest.approx(expected, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(expected / 8 / math.log(2), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(expected / 10), rel=1e-6)
    assert found.word_perplexity == pytest.approx(math.exp(expected / 3), rel=1e-5)


def test_rates_that_no_number_can_hold():
    params, cfg = guesser({"x": 0.5})
    assert (
        measure(params, encode("x", ["x" * 5000], ByteTokenizer()), reading(cfg)).word_perplexity
        == math.inf
    )
    found = measure(params, encode("x", [" " * 16], ByteTokenizer()), reading(cfg))
    assert math.isnan(found.word_perplexity)
    # The last bucket is the end of the document alone.
    assert math.isnan(found.buckets[-1].bits_per_byte) and found.buckets[-1].perplexity > 1


def test_costs_what_heldout_text_costs_in_training():
    params, cfg = model("7")
    text = encode("some", DOCUMENTS, ByteTokenizer())
    tokens = Tokens(
        folder=Path(),
        tokenizer=ByteTokenizer(),
        train=np.zeros(0, np.uint16),
        heldout=np.concatenate(text.documents).astype(np.uint16),
        digest="",
        train_bytes=0,
        heldout_bytes=len(text.content),
        train_documents=0,
        heldout_documents=5,
        skipped_files=0,
    )
    expected = evaluate(params, tokens, Settings(cfg, rows=4, window=16))
    found = measure(params, text, reading(cfg, 4))
    assert found.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-9)
    assert (found.tokens, found.loss) == (expected.tokens, pytest.approx(expected.loss, rel=1e-9))


def test_a_limit_cuts_and_reads_no_further():
    def documents():
        yield from ("abc", "", "é" * 10)
        raise AssertionError("the limit is reached before")

    text = encode("some", documents(), ByteTokenizer(), 4 + 9)
    assert [len(ids) for ids in text.documents] == [4, 9]
    assert text.documents[0][-1] == EOD
    assert text.content == b"abc" + ("é" * 5).encode()[:-1]  # half a character
    assert text.words == 2


def test_a_limit_spares_the_rest_of_a_long_document(monkeypatch):
    monkeypatch.setattr(pieces, "LONG_DOCUMENT", 100)
    encoded = []

    class Counting(ByteTokenizer):
        def encode(self, text):
            encoded.append(text)
            return ByteTokenizer.encode(self, text)

    document = "a line of text\n" * 1000
    whole, part = (encode("long", [document], Counting(), limit) for limit in (0, 230))
    assert whole.content == document.encode() and len(whole.documents[0]) == len(document) + 1
    assert part.content == document.encode()[:230]
    assert len("".join(encoded)) < len(document) + 400


@pytest.mark.parametrize("documents", [[], [""]])
def test_no_text_is_an_error(documents):
    with pytest.raises(UserError, match="notes: no text in it"):
        encode("notes", documents, ByteTokenizer())


def test_progress_is_reported_to_the_end():
    params, cfg = guesser({"x": 0.5})
    seen = []
    text = encode("some", DOCUMENTS, ByteTokenizer())
    measure(params, text, reading(cfg, 2), report=lambda *x: seen.append(x))
    assert seen[-1] == (len(text.content) + 5,) * 2 and seen == sorted(seen)


def test_a_model_that_predicts_nan_is_an_error():
    params, cfg = guesser({"x": 0.5})
    broken = params.replace(head=params.head.at[0, 0].set(math.nan))
    with pytest.raises(UserError, match="the model predicts NaN"):
        measure(broken, encode("x", ["x"], ByteTokenizer()), reading(cfg, 1))
    with pytest.raises(UserError, match="the model predicts NaN"):
        score(broken, [Prompt([EOD], [[1]])], reading(cfg))
