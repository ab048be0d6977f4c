"""How well a model predicts text, as a whole and by position in the document.

    bits per byte         (sum of -log p of all tokens) / (UTF-8 bytes) / ln 2
    perplexity per token  exp(sum / tokens): compares models of one tokenizer only
    perplexity per word   exp(sum / words), words being separated by white space: compares any
                          models, but says little about code, or languages without spaces

Documents are read as in training (`rwkv_jax.evaluation.bits`): each from a fresh state, `eod`
first, and the `eod` that ends it is a token like any other. So held-out text costs the same here as
there.

The position of a token is the number of tokens of its document before it. Positions are grouped in
buckets that double, 0-15, 16-31, 32-63 and so on up to the end of the longest document: where the
curve still falls, the model uses that much context. Late buckets hold long documents only, which
may be easier or harder than the rest.
"""

import itertools
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from rwkv_jax.data.pieces import pieces_for
from rwkv_jax.data.tokenizers import Tokenizer, added
from rwkv_jax.errors import UserError
from rwkv_jax.evaluation.bits import (
    Evaluation,
    Report,
    Settings,
    finite,
    perplexity,
    token_costs,
)
from rwkv_jax.models import Model
from rwkv_jax.renamed import renamed
from rwkv_jax.typing import Array

__getattr__ = renamed(__name__, {"Stretch": "Bucket", "FIRST_STRETCH": "FIRST_BUCKET"})

FIRST_BUCKET = 16
"""Positions; each bucket after the second is twice as long as the one before it."""


@dataclass(frozen=True, eq=False)
class Text:
    """Documents as token ids."""

    name: str
    tokenizer: Tokenizer
    documents: list[np.ndarray]
    """Ids, each with the `eod` that ends it, int32; the last document may be cut."""
    content: bytes
    """The concatenated documents, in UTF-8."""
    words: int


@dataclass(frozen=True)
class Bucket(Evaluation):
    """The cost of the tokens at the positions `start` to `stop` - 1."""

    start: int
    stop: int
    documents: int
    """Number of documents with such tokens."""


@dataclass(frozen=True)
class Measured(Evaluation):
    """The cost of a text."""

    words: int
    documents: int
    buckets: tuple[Bucket, ...]
    """By position."""

    @property
    def word_perplexity(self) -> float:
        """Per word; NaN if there are no words."""
        return perplexity(self.nats, self.words)


def encode(name: str, documents: Iterable[str], tokenizer: Tokenizer, limit: int = 0) -> Text:
    """The documents as ids, or their first `limit` tokens (0: all of them).

    No document is read after the one with the last token. Raises `UserError` if there is no text.
    """
    ids, content, words, left = [], [], 0, limit or sys.maxsize
    for document in filter(None, documents):
        some, data = _ids(document, tokenizer, left), document.encode()
        if len(some) > left:
            some = some[:left]
            data = tokenizer.decode_bytes(some)
        ids.append(np.asarray(some, np.int32))
        content.append(data)
        words += len(data.decode(errors="ignore").split())
        left -= len(some)
        if not left:
            break
    if not ids:
        raise UserError(f"{name}: no text in it; give one that has some")
    return Text(name, tokenizer, ids, b"".join(content), words)


def _ids(document: str, tokenizer: Tokenizer, enough: int) -> list[int]:
    """The ids of a document, its `eod` included, or more than `enough` of them."""
    ids: list[int] = []
    for piece in pieces_for(tokenizer, document):
        ids += tokenizer.encode(piece)
        if len(ids) > enough:
            return ids
    return [*ids, tokenizer.eod]


def measure(
    params: Model[Array], text: Text, settings: Settings, *, report: Report | None = None
) -> Measured:
    """The cost of the text; `report` counts tokens.

    Raises `UserError` for a model that predicts NaN.

    >>> import jax
    >>> from rwkv_jax import ModelConfig, init_params
    >>> from rwkv_jax.data.tokenizers import ByteTokenizer
    >>> cfg = ModelConfig(version="7", layers=1, width=64, vocab_size=257)
    >>> text = encode("a line", ["All is well that ends well."], ByteTokenizer())
    >>> found = measure(init_params(cfg, jax.random.key(0)), text, Settings(cfg))
    >>> found.tokens, [(x.start, x.stop) for x in found.buckets]
    (28, [(0, 16), (16, 28)])
    >>> round(found.bits_per_byte)  # an untrained model guesses
    8
    """
    lengths = np.array([len(document) for document in text.documents])
    edges = _edges(int(lengths.max()))
    nats, eod = np.zeros(len(edges) - 1), text.tokenizer.eod
    for costs in token_costs(params, text.documents, settings, eod=eod, report=report):
        bucket = np.searchsorted(edges, costs.position, side="right") - 1
        nats += np.bincount(bucket, weights=costs.nats, minlength=len(nats))
    buckets = tuple(
        _bucket(text, lengths, start, stop, float(some))
        for (start, stop), some in zip(itertools.pairwise(edges), finite(nats), strict=True)
    )
    return Measured(
        nats=float(nats.sum()),
        tokens=int(lengths.sum()),
        bytes=len(text.content),
        words=text.words,
        documents=len(lengths),
        buckets=buckets,
    )


def _edges(longest: int) -> list[int]:
    edges, stop = [0], FIRST_BUCKET
    while stop < longest:
        edges.append(stop)
        stop *= 2
    return [*edges, longest]


def _bucket(text: Text, lengths: np.ndarray, start: int, stop: int, nats: float) -> Bucket:
    parts = [
        (document[:start], document[start:stop])
        for document in text.documents
        if len(document) > start
    ]
    return Bucket(
        nats=nats,
        tokens=int(np.clip(lengths - start, 0, stop - start).sum()),
        bytes=sum(len(added(text.tokenizer, *part)) for part in parts),
        start=start,
        stop=stop,
        documents=len(parts),
    )
