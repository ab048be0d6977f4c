"""Scores given continuations of a prompt: how likely each is, and whether the model itself would
write it.

A prompt is the beginning of a document: `eod`, then its ids. It is read as sampling reads it, once,
however many continuations it has: each starts from a copy of the state. A batch of continuations is
padded on the right, after their end.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rwkv_jax import models
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.evaluation.bits import Report, Settings, finite, one_late
from rwkv_jax.models import Model
from rwkv_jax.renamed import renamed
from rwkv_jax.sampling.decode import decoding_layout, fresh_state, join_rows, read
from rwkv_jax.typing import Array

__getattr__ = renamed(__name__, {"split": "encode"})

WIDTHS = (256, 64, 16)
"""Lengths that are compiled: inputs are padded to a multiple of the last, and cut into these,
longest first."""

LOGITS = 512
"""Tokens whose logits are computed at once."""

Ids = Sequence[int]
T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """A prompt and its possible continuations."""

    ids: Ids
    """`eod`, then the ids of the prompt."""
    continuations: Sequence[Ids]


class Score(NamedTuple):
    """The score of a continuation."""

    log_p: float
    """Sum over its tokens, in nats."""
    greedy: bool
    """Whether each of its tokens is the most likely one."""


def encode(tokenizer: Tokenizer, prompt: str, continuations: Sequence[str]) -> Prompt:
    """A prompt and its continuations as ids.

    As in lm-eval, white space at the prompt's end is moved to each continuation, since tokens begin
    with it, and the two texts are encoded as one. If a token then spans both, they are encoded one
    by one (lm-eval scores the rest of the continuation's tokens, or none).
    """
    kept = prompt.rstrip()
    before = tokenizer.encode(kept)

    def ids(continuation: str) -> list[int]:
        continuation = prompt[len(kept) :] + continuation
        whole = tokenizer.encode(kept + continuation)
        spans = whole[: len(before)] != before
        return tokenizer.encode(continuation) if spans else whole[len(before) :]

    return Prompt([tokenizer.eod, *before], [ids(text) for text in continuations])


def score(
    params: Model[Array],
    prompts: Sequence[Prompt],
    settings: Settings,
    *,
    report: Report | None = None,
) -> list[list[Score]]:
    """The scores of each prompt's continuations, of which `settings.rows` are read side by side (in
    windows of `WIDTHS`). Parameters that are not in `decoding_layout` are copied into it.

    `report` counts continuations. An empty continuation has probability 1. Raises `UserError` for a
    model that predicts NaN.
    """
    first = np.cumsum([0] + [len(prompt.continuations) for prompt in prompts]).tolist()
    log_p, greedy = np.zeros(first[-1]), np.ones(first[-1], bool)
    done = sum(not ids for prompt in prompts for ids in prompt.continuations)
    for call in one_late(_calls(params, prompts, first, settings)):
        rows, width = slice(len(call.numbers)), call.log_p.shape[1]
        counted = np.arange(width) < call.left[:, None]
        log_p[call.numbers] += np.sum(
            np.asarray(call.log_p)[rows], 1, where=counted, dtype=np.float64
        )
        greedy[call.numbers] &= np.all(np.asarray(call.greedy)[rows], 1, where=counted)
        done += int(np.sum((call.left > 0) & (call.left <= width)))
        if report:
            report(done, first[-1])
    scores = [Score(float(x), bool(y)) for x, y in zip(finite(log_p), greedy, strict=True)]
    return [scores[start:stop] for start, stop in itertools.pairwise(first)]


class _Answer(NamedTuple):
    """A continuation to be scored."""

    number: int  # counted over all prompts
    row: int  # of its prompt's state
    inputs: list[int]
    ids: list[int]


class _Call(NamedTuple):
    """The results of one call to the device.

    `numbers` are the continuations in the first rows; the other rows are padding. `left` is the
    number of tokens that each had left before the call, 0 or less if it has ended.
    """

    numbers: list[int]
    left: np.ndarray
    log_p: Array  # [b, t]
    greedy: Array  # [b, t]


def _calls(
    params: Model[Array], prompts: Sequence[Prompt], first: list[int], settings: Settings
) -> Iterator[_Call]:
    """`first` has the index of each prompt's first continuation, and their total."""
    if not first[-1]:
        return
    cfg, batch, dtype = settings.cfg, settings.rows, jnp.dtype(settings.dtype)
    eod, height = prompts[0].ids[0], min(batch, first[-1])
    params = decoding_layout(params, cfg, dtype)
    judge = partial(_judge, params, eod=eod, cfg=cfg, dtype=dtype)
    fresh = fresh_state(params, cfg, 1)
    # Longest first: a lack of memory shows at once, and neighbours are of about equal length.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids), reverse=True)
    for group in groups(order, batch):
        # A prompt's last token is the first input of its continuations.
        beginnings = [prompts[i].ids[:-1] for i in group]
        after = [read(params, ids, fresh, cfg=cfg)[1] if ids else fresh for ids in beginnings]
        answers = [
            _Answer(first[i] + j, row, [prompts[i].ids[-1], *ids[:-1]], list(ids))
            for row, i in enumerate(group)
            for j, ids in enumerate(prompts[i].continuations)
            if ids
        ]
        for part in groups(sorted(answers, key=lambda x: len(x.ids), reverse=True), batch):
            rows = [answer.row for answer in part]
            forked = join_rows([after[row] for row in rows + [0] * (height - len(rows))])
            left = np.array([len(answer.ids) for answer in part])
            inputs, targets = (
                _cut(_padded(ids, height, eod))
                for ids in ([x.inputs for x in part], [x.ids for x in part])
            )
            for some, some_targets in zip(inputs, targets, strict=True):
                log_p, greedy, forked = judge(forked, some, some_targets)
                yield _Call([answer.number for answer in part], left, log_p, greedy)
                left = left - some.shape[1]


def groups(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _padded(rows: Sequence[Ids], height: int, eod: int) -> np.ndarray:
    """The rows as int32 [height, t], padded to a multiple of the smallest width."""
    longest = max(len(row) for row in rows)
    tokens = np.full((height, -(-longest // WIDTHS[-1]) * WIDTHS[-1]), eod, np.int32)
    for line, row in zip(tokens, rows, strict=False):
        line[: len(row)] = row
    return tokens


def _cut(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """The tokens in windows of the compiled lengths."""
    start = 0
    for width in WIDTHS:
        while tokens.shape[1] - start >= width:
            yield tokens[:, start : start + width]
            start += width


@partial(jax.jit, static_argnames=("cfg", "dtype"))
def _judge(params, state, inputs, targets, *, eod, cfg, dtype):
    """log p of the targets and whether each is the most likely token, [b, t]; the state after."""
    reset = inputs == eod  # the input before the continuation of an empty prompt
    hidden, state = models.backbone(params, inputs, state, cfg=cfg, reset=reset, dtype=dtype)

    def one(token):
        hidden, target = token
        logits = models.head(params, hidden)
        return logits[target] - jax.nn.logsumexp(logits), jnp.argmax(logits) == target

    flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    log_p, greedy = lax.map(one, flat, batch_size=min(LOGITS, targets.size))
    return log_p.reshape(targets.shape), greedy.reshape(targets.shape), state
