"""What a run measures at its evaluations besides held-out text: other texts, files of questions.

The same at every evaluation: of a text the first `train.eval_tokens` tokens, of a file all of its
questions.
"""

import hashlib
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from rwkv_jax.config import Config
from rwkv_jax.data.conversations import loss_mask
from rwkv_jax.data.corpus import open_corpus, with_field
from rwkv_jax.data.files import CorpusError, find_files
from rwkv_jax.data.records import LeftOut
from rwkv_jax.data.tokenizers import Tokenizer, sizes_of
from rwkv_jax.data.tokens import encoded, encoder_of
from rwkv_jax.evaluation import bits, tasks
from rwkv_jax.typing import Callable, PyTree

BATCH_CHARACTERS = 1 << 16
"""Characters that are encoded at a time: a text may be much longer than what is read of it."""


@dataclass(frozen=True, eq=False)
class NamedText:
    """A text as `bits.evaluate` reads it."""

    tokenizer: Tokenizer
    heldout: np.ndarray
    heldout_bytes: int
    heldout_mask: np.ndarray | None = None


@dataclass(frozen=True)
class NamedSets:
    """The sets of `[eval]` by name: texts, and functions that score a model on questions."""

    texts: dict[str, NamedText] = field(default_factory=dict)
    questions: dict[str, Callable[[PyTree, bits.Settings], tasks.Result]] = field(
        default_factory=dict
    )

    @property
    def digest(self) -> str:
        """A hash of the texts: equal if they are."""
        digest = hashlib.blake2b(digest_size=8)
        for text in self.texts.values():
            digest.update(text.heldout.tobytes())
        return digest.hexdigest()


def open_sets(cfg: Config, tokenizer: Tokenizer) -> NamedSets:
    """Reads the files of `[eval]`. Raises `UserError` for one that cannot be read."""
    texts = {name: _text(name, x, cfg, tokenizer) for name, x in cfg.eval.texts.items()}
    questions: dict[str, Any] = {
        name: partial(_scored, tasks.score_choices, tasks.read_choices(path), tokenizer)
        for name, path in cfg.eval.choices.items()
    }
    questions |= {
        name: partial(_scored, tasks.score_endings, tasks.read_endings(path), tokenizer)
        for name, path in cfg.eval.lambada.items()
    }
    return NamedSets(texts, questions)


def _scored(
    score: Callable, questions: list, tokenizer: Tokenizer, params: PyTree, settings: bits.Settings
) -> tasks.Result:
    return score(params, questions, settings, tokenizer=tokenizer)


def _text(name: str, source: str, cfg: Config, tokenizer: Tokenizer) -> NamedText:
    """The first `train.eval_tokens` tokens of a source, which is read as `data.source` is."""
    data = replace(cfg.data, source=source, mixture={}, heldout=0.0)
    files, left_out = find_files(source, f"eval.texts.{name} = ", plain=not data.field), LeftOut()
    if all(file.kind == "text" for file in files):
        data = replace(data, field="text", train_on="all")
    elif with_field(data, files) == data:
        data = with_field(replace(data, field="text"), files)  # it may have another one
    ids, masks, size, left = [], [], 0, cfg.train.eval_tokens
    documents = open_corpus(data).documents(left_out=left_out)
    for document, some in encoded(documents, encoder_of(data, tokenizer), BATCH_CHARACTERS):
        mask = np.ones(len(some), bool)
        if document.spans is not None:
            found = loss_mask(document.text, document.spans, sizes_of(tokenizer, some[:-1]))
            mask = mask if found is None else found
        whole = len(some) <= left
        ids.append(some[:left].astype(np.int32))
        masks.append(mask[:left])
        size += len(document.text.encode() if whole else tokenizer.decode_bytes(some[:left]))
        left -= len(ids[-1])
        if not left:
            break
    left_out.check()
    if not ids:
        raise CorpusError(f"eval.texts.{name} = {source}: no text in it; give one that has some")
    mask = np.concatenate(masks)
    return NamedText(tokenizer, np.concatenate(ids), size, None if mask.all() else mask)
