"""Continuations of prompts against one token at a time."""

import itertools

import numpy as np
import pytest
from evaluation.tiny_models import EOD, log_p_of_next, model

from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.evaluation import continuations
from rwkv_jax.evaluation.bits import Settings
from rwkv_jax.evaluation.continuations import Prompt, encode, score


def some_prompts(seed=0):
    """Of no token, of one, longer than the widest call, and one with nothing after it."""
    rng = np.random.default_rng(seed)

    def ids(length):
        return rng.integers(1, 257, length).tolist()

    shapes = [(0, (3, 1)), (1, (20,)), (50, (1, 2, 45, 0)), (23, ()), (17, (4,)), (16, (16, 17))]
    return [Prompt([EOD, *ids(n)], [ids(m) for m in answers]) for n, answers in shapes]


def alone(version, prompt, tuned=False):
    """(log p, greedy) of each continuation, the prompt read again for each."""
    for after in prompt.continuations:
        ids = [*prompt.ids[1:], *after]
        rows = log_p_of_next(version, ids, tuned)[len(prompt.ids) - 1 :] if after else []
        log_p = sum(row[token] for row, token in zip(rows, after, strict=True))
        yield log_p, all(np.argmax(row) == token for row, token in zip(rows, after, strict=True))


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(continuations, "WIDTHS", (8,))


@pytest.mark.parametrize(
    "version, tuned", [("6", True), *(pytest.param(x, False, marks=pytest.mark.slow) for x in "47")]
)
def test_each_is_what_it_is_alone(version, tuned):
    params, cfg = model(version, tuned)
    prompts = some_prompts()
    found = score(params, prompts, Settings(cfg, rows=3))
    for prompt, scores in zip(prompts, found, strict=True):
        expected = list(alone(version, prompt, tuned))
        assert [one.greedy for one in scores] == [greedy for _, greedy in expected]
        np.testing.assert_allclose(
            [one.log_p for one in scores], [log_p for log_p, _ in expected], rtol=2e-5
        )


@pytest.mark.parametrize(
    "batch, widths", [pytest.param(1, (8,), marks=pytest.mark.slow), (100, (16, 4))]
)
def test_neither_batch_nor_widths_matter(batch, widths, monkeypatch):
    params, cfg = model("7")
    prompts = some_prompts()
    expected = score(params, prompts, Settings(cfg, rows=3))
    monkeypatch.setattr(continuations, "WIDTHS", widths)
    found = score(params, prompts, Settings(cfg, rows=batch))
    for some, others in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.array(some), np.array(others), rtol=2e-5)


def test_greedy_is_what_the_model_would_write():
    params, cfg = model("7")
    prompt, written = [5, 6, 7], []
    for _ in range(6):
        written.append(int(np.argmax(log_p_of_next("7", [*prompt, *written, 0])[-1])))
    assert EOD not in written
    slips = [[*written[:i], 1 + written[i] % 256, *written[i + 1 :]] for i in range(6)]
    [scores] = score(params, [Prompt([EOD, *prompt], [written, *slips])], Settings(cfg, rows=3))
    assert [one.greedy for one in scores] == [True] + 6 * [False]


def test_progress_is_reported_to_the_end():
    params, cfg = model("7")
    seen = []
    score(params, some_prompts(), Settings(cfg, rows=3), report=lambda *x: seen.append(x))
    assert seen[-1] == (10, 10)
    assert all(one <= other for one, other in itertools.pairwise(seen))


def test_nothing_to_score():
    params, cfg = model("7")
    settings = Settings(cfg)
    assert score(params, [], settings) == []
    nothing = [Prompt([EOD, 4], []), Prompt([EOD], [[]])]
    assert score(params, nothing, settings) == [[], [(0, True)]]


class Pairs(ByteTokenizer):
    """`ab` is one token, 300."""

    def encode(self, text):
        ids = ByteTokenizer.encode(self, text.replace("ab", "\x00"))
        return [300 if i == 1 else i for i in ids]


def test_encoded_as_one_text():
    one = ByteTokenizer().encode

    def encoded(tokenizer, prompt, *continuations):
        found = encode(tokenizer, prompt, continuations)
        return found.ids, *found.continuations

    assert encoded(ByteTokenizer(), "to", " be") == ([EOD, *one("to")], one(" be"))
    # White space is the continuation's.
    assert encoded(ByteTokenizer(), "to \n", "be", "") == (
        [EOD, *one("to")],
        one(" \nbe"),
        one(" \n"),
    )
    assert encoded(ByteTokenizer(), "", "be") == ([EOD], one("be"))
    assert encoded(ByteTokenizer(), " ", "be") == ([EOD], one(" be"))
    assert encoded(Pairs(), "c", "ab") == ([EOD, *one("c")], [300])
    # A token would lie across: each text's own.
    spanning = encoded(Pairs(), "ca", "bab", "ab")
    assert spanning == ([EOD, *one("ca")], [*one("b"), 300], [300])
