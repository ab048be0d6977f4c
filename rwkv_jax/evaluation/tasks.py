"""Tasks in files of JSON lines: the end of a text (LAMBADA), and multiple choice.

The end of a text. A line is `{"text": ...}`, whose last word is to be predicted, or `{"prompt":
..., "completion": ...}` (or `"target"`):

    accuracy    the share of ends that the model would write itself, token for token
    perplexity  exp(mean of -log p(end)), per end, not per token

which is how the official RWKV scripts (`RWKV-v7/rwkv_v7_demo.py` in RWKV-LM) and lm-eval's
`lambada_openai` score. Prompts begin a document: the end-of-document token comes first.

Multiple choice. A line is `{"prompt": ..., "choices": [...], "answer": ...}`. `"prompt"` may also
be called `"question"` or `"context"`; the answer is the right choice's index, from 0, or its text:

    accuracy    the share of questions whose most likely choice is the right one
    normalised  the same after log p is divided by the choice's length in UTF-8 bytes

which are lm-eval's `acc` and `acc_bytes` (`acc_norm` divides by characters). Of equally likely
choices the first counts, as in lm-eval.

A prompt and its continuation are joined by a space, unless there is white space already. Files may
be compressed (`.gz`, `.zst`).
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_jax.data.files import SourceFile, read_lines
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.errors import UserError
from rwkv_jax.evaluation.bits import Report, Settings, perplexity
from rwkv_jax.evaluation.continuations import Prompt, encode, score
from rwkv_jax.models import Model
from rwkv_jax.typing import Array


class TaskError(UserError):
    """A file of questions that cannot be read."""


@dataclass(frozen=True)
class Ending:
    """A text to predict the end of: what is given, and what must follow."""

    prompt: str
    target: str


@dataclass(frozen=True)
class Choice:
    """A question, its possible answers and the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Result:
    """The share of questions that are answered right."""

    questions: int
    accuracy: float

    @property
    def error(self) -> float:
        """The accuracy's standard error; NaN for a single question."""
        return _standard_error(self.accuracy, self.questions)


@dataclass(frozen=True)
class EndingsResult(Result):
    """Scores on ends of texts."""

    perplexity: float


@dataclass(frozen=True)
class ChoicesResult(Result):
    """Scores on multiple choice; `guessing` is the accuracy of random guesses."""

    normalised: float
    guessing: float

    @property
    def normalised_error(self) -> float:
        """The standard error of `normalised`."""
        return _standard_error(self.normalised, self.questions)


def _standard_error(share: float, count: int) -> float:
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else math.nan


def read_endings(path: Path | str, limit: int = 0) -> list[Ending]:
    """The questions of a LAMBADA file, or its first `limit` (0: all of them).

    Raises `UserError` that names file, line and fault.
    """
    return _read(path, limit, _ending)


def read_choices(path: Path | str, limit: int = 0) -> list[Choice]:
    """The questions of a multiple-choice file, or its first `limit` (0: all of them).

    Raises `UserError` that names file, line and fault.
    """
    return _read(path, limit, _choice)


def _read(path: Path | str, limit: int, parse: Callable[[dict[str, Any]], Any]) -> list[Any]:
    questions = []
    for where, record in itertools.islice(_records(Path(path).expanduser()), limit or None):
        try:
            questions.append(parse(record))
        except TaskError as error:
            raise TaskError(f"{where}: {error}") from None
    if not questions:
        raise TaskError(f"{path}: no questions in it; it needs one JSON object a line")
    return questions


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(read_lines(SourceFile(path, path.name)), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise TaskError(
                f"{where}: not UTF-8 ({error.reason}); convert the file first"
            ) from error
        except json.JSONDecodeError as error:
            raise TaskError(
                f"{where}: not JSON ({error.msg}, column {error.colno}); one object a line"
            ) from error
        if not isinstance(record, dict):
            raise TaskError(f"{where}: must be a JSON object, got {type(record).__name__}")
        yield where, record


def _ending(record: dict[str, Any]) -> Ending:
    if _only(record, "text", "prompt") == "prompt":
        target = _text(record, _only(record, "completion", "target"))
        if not target:
            raise TaskError("the completion is empty; give it, or leave the line out")
        return Ending(_text(record, "prompt"), target)
    for name in record.keys() & {"completion", "target"}:
        raise TaskError(
            f"has both 'text' and {name!r}; rename 'text' to 'prompt', or leave one out"
        )
    before, space, word = _text(record, "text").rpartition(" ")
    if not before.strip() or not word.strip():
        raise TaskError(
            "'text' needs at least two words, and no white space at its end; change it, or leave"
            " the line out"
        )
    return Ending(before, space + word)


def _choice(record: dict[str, Any]) -> Choice:
    prompt = _text(record, _only(record, "prompt", "question", "context"))
    choices = record[_only(record, "choices")]
    if not isinstance(choices, list) or len(choices) < 2:
        raise TaskError("'choices' is not a list of two or more texts; give the wrong ones too")
    texts = tuple(_text({"choices": choice}, "choices") for choice in choices)
    if "" in texts:
        raise TaskError("one of 'choices' is empty, so it has no probability; give its text")
    return Choice(prompt, texts, _index(texts, record[_only(record, "answer")]))


def _index(choices: tuple[str, ...], answer: Any) -> int:
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if type(answer) is int and 0 <= answer < len(choices):
        return choices.index(choices[answer])  # of equal texts the first, as in scoring
    raise TaskError(
        f"'answer' is {json.dumps(answer, ensure_ascii=False)[:40]}; give the text of one of the"
        f" {len(choices)} choices, or its index from 0 to {len(choices) - 1}"
    )


def _only(record: dict[str, Any], *names: str) -> str:
    """The only one of these names that the record has."""
    found = [name for name in names if name in record]
    if len(found) == 1:
        return found[0]
    if found:
        raise TaskError(f"has both {found[0]!r} and {found[1]!r}; join them in {names[0]!r}")
    wanted = " or ".join(map(repr, names))
    present = ", ".join(sorted(record)) or "none"
    raise TaskError(f"no field {wanted}; rename one of its fields: {present}")


def _text(record: dict[str, Any], name: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise TaskError(f"{name!r} must be a JSON string, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise TaskError(
            f"{name!r} holds half a surrogate pair, which is not text; correct the line"
        ) from error
    return value


def score_endings(
    params: Model[Array],
    questions: Sequence[Ending],
    settings: Settings,
    *,
    tokenizer: Tokenizer,
    report: Report | None = None,
) -> EndingsResult:
    """Accuracy and perplexity of the ends; `report` counts them."""
    prompts = [_prompt(tokenizer, x.prompt, [x.target]) for x in questions]
    scores = [one for [one] in score(params, prompts, settings, report=report)]
    return EndingsResult(
        questions=len(scores),
        accuracy=float(np.mean([one.greedy for one in scores])),
        perplexity=perplexity(-math.fsum(one.log_p for one in scores), len(scores)),
    )


def score_choices(
    params: Model[Array],
    questions: Sequence[Choice],
    settings: Settings,
    *,
    tokenizer: Tokenizer,
    report: Report | None = None,
) -> ChoicesResult:
    """Accuracy by log p and by log p per byte; `report` counts choices."""
    prompts = [_prompt(tokenizer, x.prompt, x.choices) for x in questions]
    right, normalised = [], []
    scored = score(params, prompts, settings, report=report)
    for question, scores in zip(questions, scored, strict=True):
        log_p = np.array([one.log_p for one in scores])
        lengths = np.array([len(choice.encode()) for choice in question.choices])
        right.append(np.argmax(log_p) == question.answer)
        normalised.append(np.argmax(log_p / lengths) == question.answer)
    return ChoicesResult(
        questions=len(questions),
        accuracy=float(np.mean(right)),
        normalised=float(np.mean(normalised)),
        guessing=float(np.mean([1 / len(question.choices) for question in questions])),
    )


def _prompt(tokenizer: Tokenizer, prompt: str, answers: Sequence[str]) -> Prompt:
    separated = not prompt or prompt[-1].isspace()
    spaced = [x if separated or x[0].isspace() else f" {x}" for x in answers]
    return encode(tokenizer, prompt, spaced)
