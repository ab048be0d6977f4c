"""What a run measures at its evaluations besides held-out text: other texts, files of questions.

The same at every evaluation: of a text the first `train.eval_tokens` tokens, of a file all of its
questions.
"""

import hashlib
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from rwkv_jax.config import Config, DataConfig
from rwkv_jax.data.corpus import open_corpus
from rwkv_jax.data.records import LeftOut
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.evaluation import bits, tasks
from rwkv_jax.evaluation.text import encode
from rwkv_jax.typing import Callable, PyTree


@dataclass(frozen=True, eq=False)
class NamedText:
    """A text as `bits.evaluate` reads it."""

    tokenizer: Tokenizer
    heldout: np.ndarray
    heldout_bytes: int
    heldout_mask: None = None


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
    texts = {name: _text(source, cfg, tokenizer) for name, source in cfg.eval.texts.items()}
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


def _text(source: str, cfg: Config, tokenizer: Tokenizer) -> NamedText:
    data = DataConfig(source=source, heldout=0.0, template=cfg.data.template)
    left_out = LeftOut()
    documents = (x.text for x in open_corpus(data).documents(left_out=left_out))
    text = encode(source, documents, tokenizer, cfg.train.eval_tokens)
    left_out.check()
    return NamedText(tokenizer, np.concatenate(text.documents), len(text.content))
