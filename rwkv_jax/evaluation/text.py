"""How well a model predicts text, as a whole and by how much of it has been read.

    bits per byte         (sum of -log p of all tokens) / (UTF-8 bytes) / ln 2
    perplexity per token  exp(sum / tokens): compares models of one tokenizer only
    perplexity per word   exp(sum / words), a word being what white space separates: compares any
                          models, but says little of code, or where words have no spaces between

Documents are read as in training (`rwkv_jax.evaluation.bits`): each from a fresh state, `eod`
first, and the `eod` that ends it is a token like any other. So whole held-out text costs here what
it costs there.

The place of a token is the number of tokens of its document before it. Places are taken together in
stretches that double, 0-15, 16-31, 32-63 and so on up to the end of the longest document: where the
curve still falls, the model makes use of that much context. Late stretches are of long documents
alone, which may be easier or harder than the rest.
"""

import itertools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from rwkv_jax.config import ModelConfig
from rwkv_jax.data.prepare import pieces_of
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.errors import UserError
from rwkv_jax.evaluation.bits import Evaluation, finite, perplexity, token_costs
from rwkv_jax.models import Model
from rwkv_jax.typing import Array

FIRST_STRETCH = 16
"""Tokens; each stretch after the second is twice as long as the one before it."""

WINDOW = 512
"""Tokens of a document that are read at once."""


@dataclass(frozen=True, eq=False)
class Text:
    """Documents as a model reads them."""

    name: str
    tokenizer: Tokenizer
    documents: list[np.ndarray]
    """Ids, each with the `eod` that ends it, int32; the last document may be cut."""
    content: bytes
    """The documents one behind the other, in UTF-8."""
    words: int


@dataclass(frozen=True)
class Stretch(Evaluation):
    """The cost of the tokens at the places `start` to `stop` - 1."""

    start: int
    stop: int
    documents: int
    """How many have such tokens."""


@dataclass(frozen=True)
class Measured(Evaluation):
    """The cost of a text."""

    words: int
    documents: int
    stretches: tuple[Stretch, ...]

    @property
    def word_perplexity(self) -> float:
        """Of a word; NaN if there is none."""
        return perplexity(self.nats, self.words)


def encode(name: str, documents: Iterable[str], tokenizer: Tokenizer, limit: int = 0) -> Text:
    """The documents as ids, or their first `limit` tokens (0: all of them).

    No document is asked for after the one that has the last token. Raises `UserError` if there is
    no text.
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
    """Of all the document and its end, or of so much of it that they are more than enough."""
    ids: list[int] = []
    for piece in pieces_of(document):
        ids += tokenizer.encode(piece)
        if len(ids) > enough:
            return ids
    return [*ids, tokenizer.eod]


def measure(
    params: Model[Array],
    text: Text,
    *,
    cfg: ModelConfig,
    batch: int = 16,
    dtype: Any = jnp.float32,
    report: Callable[[int, int], None] | None = None,
) -> Measured:
    """What the text costs, at most `batch` documents of it read side by side.

    `report(done, total)` is called with the tokens read so far. Raises `UserError` for a model that
    predicts NaN.

    >>> import jax
    >>> from rwkv_jax import ModelConfig, init_params
    >>> from rwkv_jax.data.tokenizers import ByteTokenizer
    >>> cfg = ModelConfig(version="7", layers=1, width=64, vocab_size=257)
    >>> text = encode("a line", ["All is well that ends well."], ByteTokenizer())
    >>> found = measure(init_params(cfg, jax.random.key(0)), text, cfg=cfg)
    >>> found.tokens, [(x.start, x.stop) for x in found.stretches]
    (28, [(0, 16), (16, 28)])
    >>> round(found.bits_per_byte)  # an untrained model guesses
    8
    """
    lengths = np.array([len(document) for document in text.documents])
    edges = _edges(int(lengths.max()))
    nats, done, count = np.zeros(len(edges) - 1), 0, int(lengths.sum())
    for costs in token_costs(
        params,
        text.documents,
        cfg=cfg,
        eod=text.tokenizer.eod,
        lanes=batch,
        window=WINDOW,
        dtype=dtype,
    ):
        stretch = np.searchsorted(edges, costs.position, side="right") - 1
        nats += np.bincount(stretch, weights=costs.nats, minlength=len(nats))
        done += len(costs.nats)
        if report:
            report(done, count)
    stretches = tuple(
        _stretch(text, lengths, start, stop, float(some))
        for (start, stop), some in zip(itertools.pairwise(edges), finite(nats), strict=True)
    )
    return Measured(
        nats=float(nats.sum()),
        tokens=count,
        bytes=len(text.content),
        words=text.words,
        documents=len(lengths),
        stretches=stretches,
    )


def _edges(longest: int) -> list[int]:
    edges, stop = [0], FIRST_STRETCH
    while stop < longest:
        edges.append(stop)
        stop *= 2
    return [*edges, longest]


def _stretch(text: Text, lengths: np.ndarray, start: int, stop: int, nats: float) -> Stretch:
    parts = [document[start:stop] for document in text.documents if len(document) > start]
    return Stretch(
        nats=nats,
        tokens=int(np.clip(lengths - start, 0, stop - start).sum()),
        bytes=sum(len(text.tokenizer.decode_bytes(part)) for part in parts),
        start=start,
        stop=stop,
        documents=len(parts),
    )
