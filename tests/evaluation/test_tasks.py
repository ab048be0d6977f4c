"""Tasks: the format of files, accuracies known beforehand, and errors for bad lines."""

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evaluation.tiny_models import guesser, log_p_of_next, model

from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.errors import UserError
from rwkv_jax.evaluation.bits import Settings
from rwkv_jax.evaluation.tasks import (
    Choice,
    Ending,
    read_choices,
    read_endings,
    score_choices,
    score_endings,
)

TOKENIZER = ByteTokenizer()


def write(path: Path, *records):
    lines = [x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in records]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def log_p(version, prompt, answer):
    """float64 of each token of the answer."""
    before, after = TOKENIZER.encode(prompt), TOKENIZER.encode(answer)
    rows = log_p_of_next(version, [*before, *after])[len(before) :]
    return rows[np.arange(len(after)), after]


def test_endings_are_read(tmp_path):
    path = write(
        tmp_path / "some.jsonl",
        {"text": "he opened the door"},
        "",
        {"prompt": "1 2", "completion": "3"},
        {"prompt": "a", "target": " b", "id": 7},
        {"text": "two  spaces"},
    )
    questions = [Ending("he opened the", " door"), Ending("1 2", "3"), Ending("a", " b")]
    questions.append(Ending("two ", " spaces"))
    assert read_endings(path) == questions
    assert read_endings(path, 2) == questions[:2]
    packed = tmp_path / "some.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_endings(str(packed)) == questions


def test_choices_are_read(tmp_path):
    path = write(
        tmp_path / "some.jsonl",
        {"prompt": "2 + 2 =", "choices": ["3", "4"], "answer": 1},
        {"question": "2 + 2 =", "choices": ["3", "4"], "answer": "3"},
        {"context": "", "choices": ["1", "0"], "answer": "0"},
        {"prompt": "same", "choices": ["a", "a", "b"], "answer": "a"},
        {"prompt": "same", "choices": ["a", "a", "b"], "answer": 1},
    )
    assert read_choices(path) == [
        Choice("2 + 2 =", ("3", "4"), 1),
        Choice("2 + 2 =", ("3", "4"), 0),
        Choice("", ("1", "0"), 1),
        Choice("same", ("a", "a", "b"), 0),
        Choice("same", ("a", "a", "b"), 0),
    ]


CHOICES = {"prompt": "?", "choices": ["a", "b"], "answer": 0}


@pytest.mark.parametrize(
    "read, line, message",
    [
        (read_endings, "{", r"not JSON \(.*, column 2\); one object a line"),
        (read_endings, "[1]", "must be a JSON object, got list"),
        (read_endings, {}, "no field 'text' or 'prompt'; rename one of its fields: none"),
        (read_endings, {"prompt": "a", "end": "b"}, "no field 'completion' or 'target'; rename"),
        (read_endings, {"prompt": "a", "target": "b", "completion": "b"}, "has both 'completion'"),
        (read_endings, {"text": "a b", "target": "b"}, "has both 'text' and 'target'; rename"),
        (read_endings, {"text": "a b", "prompt": "a"}, "has both 'text' and 'prompt'; join them"),
        (read_endings, {"prompt": "a", "target": ""}, "the completion is empty"),
        (read_endings, {"prompt": 3, "target": "b"}, "'prompt' must be a JSON string, got int"),
        (read_endings, {"text": "word"}, "'text' needs at least two words"),
        (read_endings, {"text": "ends in "}, "'text' needs at least two words"),
        (read_endings, r'{"text": "half \ud800"}', "'text' holds half a surrogate pair"),
        (read_choices, CHOICES | {"context": "!"}, "has both 'prompt' and 'context'; join them"),
        (read_choices, {"prompt": "?"}, "no field 'choices'; rename one of its fields: prompt"),
        (read_choices, CHOICES | {"choices": ["a"]}, "'choices' is not a list of two or more"),
        (read_choices, CHOICES | {"choices": "ab"}, "'choices' is not a list of two or more"),
        (read_choices, CHOICES | {"choices": ["a", 1]}, "'choices' must be a JSON string, got int"),
        (read_choices, CHOICES | {"choices": ["a", ""]}, "one of 'choices' is empty"),
        (read_choices, CHOICES | {"answer": 2}, "'answer' is 2; .* its index from 0 to 1"),
        (read_choices, CHOICES | {"answer": -1}, "'answer' is -1; "),
        (read_choices, CHOICES | {"answer": True}, "'answer' is true; "),
        (read_choices, CHOICES | {"answer": "c"}, "'answer' is \"c\"; give the text of one"),
        (read_choices, {"prompt": "?", "choices": ["a", "b"]}, "no field 'answer'"),
    ],
)
def test_a_bad_line_is_named(read, line, message, tmp_path):
    good = CHOICES if read is read_choices else {"text": "a b"}
    path = write(tmp_path / "bad.jsonl", good, line)
    with pytest.raises(UserError, match=rf"bad\.jsonl:2: {message}") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_a_bad_file_is_named(tmp_path):
    for name, content, message in (
        ("empty", b"\n\n", "empty: no questions in it"),
        ("latin", '{"text": "caf\xe9 noir"}'.encode("latin-1"), "latin:1: not UTF-8"),
        ("cut.gz", gzip.compress(b'{"text": "a b"}')[:-9], "cut.gz: compressed data is truncated"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_endings(tmp_path / name)
    with pytest.raises(UserError, match=r"none: cannot be read \(No such file"):
        read_choices(tmp_path / "none")


def test_endings_known_beforehand():
    params, cfg = guesser({"x": 0.5, "y": 0.25})
    rest = math.log(0.25 / 255)
    questions = [Ending("so", "xxx"), Ending("", "x"), Ending("a", "xy"), Ending("b ", "x")]
    result = score_endings(params, questions, Settings(cfg, rows=4), tokenizer=TOKENIZER)
    # Right: the second alone; the others have a space, or the second best letter, in them.
    expected = [rest + 3 * math.log(0.5), math.log(0.5), rest + math.log(0.5) + math.log(0.25)]
    expected.append(rest + math.log(0.5))
    assert (result.questions, result.accuracy) == (4, 0.25)
    assert result.error == pytest.approx(np.std([0, 1, 0, 0], ddof=1) / 2)
    assert result.perplexity == pytest.approx(math.exp(-np.mean(expected)), rel=1e-5)


def test_choices_known_beforehand():
    params, cfg = guesser({"x": 0.5, "y": 0.25})
    questions = [
        Choice("?", ("y", "x"), 1),  # x is likelier, by itself and by the byte
        Choice("?", ("y", "xxx"), 1),  # 1/8 is less than 1/4, but by the byte it is 1/2
        Choice("?", ("zz", "y", "yy"), 0),  # never
        Choice("?", ("y", "y"), 1),  # of equal ones the first is taken
        Choice("", ("éx", "zz"), 0),  # by three bytes, not two characters
    ]
    result = score_choices(params, questions, Settings(cfg, rows=4), tokenizer=TOKENIZER)
    assert (result.questions, result.accuracy, result.normalised) == (5, 1 / 5, 3 / 5)
    assert result.guessing == pytest.approx((4 / 2 + 1 / 3) / 5)
    assert result.error == pytest.approx(np.std([1, 0, 0, 0, 0], ddof=1) / math.sqrt(5))
    expected = np.std([1, 1, 0, 0, 1], ddof=1) / math.sqrt(5)
    assert result.normalised_error == pytest.approx(expected)
    assert math.isnan(replace(result, questions=1).error)


def test_endings_and_choices_of_a_random_model():
    params, cfg = model("7")
    questions = [
        Choice("What is it?", ("a cat", "the dög", "x"), 0),
        Choice("Two and two\n", ("four", "five"), 1),
        Choice("", ("this", "that"), 0),
    ]
    spaced = [("What is it?", " "), ("Two and two", "\n"), ("", "")]
    right, normalised, nats, endings = [], [], [], []
    for (prompt, space), question in zip(spaced, questions, strict=True):
        scores = [log_p("7", prompt, space + choice) for choice in question.choices]
        sums = np.array([one.sum() for one in scores])
        lengths = [len(choice.encode()) for choice in question.choices]
        right.append(np.argmax(sums) == question.answer)
        normalised.append(np.argmax(sums / lengths) == question.answer)
        endings += [Ending(question.prompt, choice) for choice in question.choices]
        nats += list(-sums)
    found = score_choices(params, questions, Settings(cfg, rows=4), tokenizer=TOKENIZER)
    assert (found.accuracy, found.normalised) == (np.mean(right), np.mean(normalised))
    result = score_endings(params, endings, Settings(cfg, rows=4), tokenizer=TOKENIZER)
    assert result.perplexity == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
