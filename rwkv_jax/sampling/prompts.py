"""Prompts as token ids."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from rwkv_jax.data.conversations import FLOWER
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.errors import UserError

Prompt = str | Sequence[int] | np.ndarray | jax.Array
"""A text, in which the names of special tokens are those tokens, or token ids."""


def continuation(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that continues another: SentencePiece's put a space before each text."""
    if not tokenizer.additive:
        for before in ("\n\n", "."):
            start, ids = tokenizer.encode(before), tokenizer.encode(before + text)
            if start and ids[: len(start)] == start:
                return ids[len(start) :]
    return tokenizer.encode(text)


def as_ids(tokenizer: Tokenizer, prompts: Any, continue_text: bool = False) -> list[list[int]]:
    """The ids of each `Prompt`; a single one, text or list of ids, is a batch of one. With
    `continue_text`, they follow a text that was read.

    Raises `UserError` if there are none, and for what is neither text nor ids of the tokenizer.
    """
    prompts = _on_host(prompts)
    one = isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence)
    if one or (len(prompts) and isinstance(prompts[0], int | np.integer)):
        prompts = [prompts]
    if not len(prompts):
        raise UserError('no prompts: give at least one; "" starts a new document')
    return [_ids(tokenizer, _on_host(prompt), continue_text) for prompt in prompts]


def _on_host(prompt: Any) -> Any:
    """Arrays as lists, of Python's numbers."""
    return np.asarray(prompt).tolist() if isinstance(prompt, jax.Array | np.ndarray) else prompt


def _ids(tokenizer: Tokenizer, prompt: object, continue_text: bool) -> list[int]:
    if isinstance(prompt, str):
        special = tokenizer.with_special_tokens()
        return continuation(special, prompt) if continue_text else special.encode(prompt)
    if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
        raise UserError(f"prompt {prompt!r:.40}: a text, or a list of token ids")
    ids = []
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
            raise UserError(f"prompt with {token!r:.40}: a text, or a list of token ids")
        if not 0 <= token < tokenizer.vocab_size:
            raise UserError(
                f"prompt with the token {token}: the tokenizer has the ids 0 to"
                f" {tokenizer.vocab_size - 1:,}"
            )
        ids.append(int(token))
    return ids


def between(tokenizer: Tokenizer, before: str, after: str) -> list[int]:
    """The prompt after which a model writes what belongs between two texts, up to a `FLOWER`; for
    G1 models since G1c."""
    text = f"{FLOWER}prefix{FLOWER}{FLOWER}suffix{FLOWER}{after}{FLOWER}middle{FLOWER}{before}"
    return [tokenizer.eod, *tokenizer.encode(text)]
