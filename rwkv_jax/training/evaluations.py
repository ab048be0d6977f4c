"""What a run measures at its evaluations besides held-out text: other texts, files of questions.

The same at every evaluation: of a text the first `train.eval_tokens` tokens, of a file all of its
questions.
"""

import hashlib
from dataclasses import dataclass, field, replace

import numpy as np

from rwkv_jax.config import Config
from rwkv_jax.data.corpus import open_corpus, with_field
from rwkv_jax.data.files import CorpusError, find_files
from rwkv_jax.data.records import LeftOut
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.data.tokens import encoded, encoder_of, mask_of
from rwkv_jax.evaluation import tasks
from rwkv_jax.typing import Callable

BATCH_CHARACTERS = 1 << 16
"""Characters that are encoded at a time: a text may be much longer than what is read of it."""


@dataclass(frozen=True, eq=False)
class NamedText:
    """A text as `rwkv_jax.evaluation.bits.evaluate` reads it."""

    tokenizer: Tokenizer
    heldout: np.ndarray
    heldout_bytes: int
    heldout_mask: np.ndarray | None = None


@dataclass(frozen=True)
class NamedSets:
    """The sets of `[eval]` by name: texts, and questions with the function that scores them."""

    texts: dict[str, NamedText] = field(default_factory=dict)
    questions: dict[str, tuple[Callable[..., tasks.Result], list]] = field(default_factory=dict)

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
    questions = {}
    for files, read, score in (
        (cfg.eval.choices, tasks.read_choices, tasks.score_choices),
        (cfg.eval.lambada, tasks.read_endings, tasks.score_endings),
    ):
        questions |= {name: (score, read(path)) for name, path in files.items()}
    return NamedSets(texts, questions)


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
        masked = document.spans is not None
        mask = mask_of(document, some, tokenizer) if masked else np.ones(len(some), bool)
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
