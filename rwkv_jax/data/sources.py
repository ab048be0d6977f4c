"""The data of a run: one tokenised source, or a mixture of several."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from rwkv_jax.config import DataConfig
from rwkv_jax.data.binidx import is_binidx
from rwkv_jax.data.files import CorpusError
from rwkv_jax.data.loader import Stream
from rwkv_jax.data.prepare import prepare
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.data.tokens import Tokens, open_pair


@dataclass(frozen=True, eq=False)
class Data:
    """One source or several, by name, with their weights."""

    sources: dict[str, Tokens]
    weights: tuple[float, ...]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, which all sources share."""
        return next(iter(self.sources.values())).tokenizer

    @cached_property
    def streams(self) -> tuple[Stream, ...]:
        """The training tokens of each source."""
        return tuple(
            Stream(name, x.train, self.tokenizer.eod, x.mask, x.documents, weight)
            for (name, x), weight in zip(self.sources.items(), self.weights, strict=True)
        )

    @property
    def train_tokens(self) -> int:
        """The number of training tokens of all sources together."""
        return sum(len(tokens.train) for tokens in self.sources.values())

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of a training token, averaged over the sources by their weights."""
        shares = zip(self.sources.values(), self.weights, strict=True)
        size = sum(weight * x.train_bytes / len(x.train) for x, weight in shares)
        return size / sum(self.weights)

    @property
    def heldout(self) -> np.ndarray:
        """The held-out documents of all sources, concatenated."""
        return self._heldout  # no cached_property itself: a protocol asks for a property

    @cached_property
    def _heldout(self) -> np.ndarray:
        parts = [tokens.heldout for tokens in self.sources.values()]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    @property
    def heldout_mask(self) -> np.ndarray | None:
        """bool: which tokens of `heldout` are such as are trained on; None: all."""
        masks = [x.heldout_mask for x in self.sources.values()]
        if all(mask is None for mask in masks):
            return None
        every = zip(masks, self.sources.values(), strict=True)
        return np.concatenate([np.ones(len(x.heldout), bool) if m is None else m for m, x in every])

    @property
    def heldout_bytes(self) -> int:
        """UTF-8 bytes of `heldout`."""
        return sum(tokens.heldout_bytes for tokens in self.sources.values())

    def heldout_text(self) -> bytes:
        """The text of `heldout`."""
        return b"".join(tokens.heldout_text() for tokens in self.sources.values())

    def heldout_documents(self) -> Iterator[str]:
        """The held-out documents one by one, decoded from their tokens."""
        ends = np.flatnonzero(self.heldout == self.tokenizer.eod)
        for ids in np.split(self.heldout, ends + 1):
            if text := self.tokenizer.decode_bytes(ids):
                yield text.decode(errors="replace")

    @property
    def field(self) -> str:
        """The field of the records of a single source; empty if that is not known."""
        fields = [tokens.field for tokens in self.sources.values()]
        return fields[0] if len(fields) == 1 else ""

    @property
    def digest(self) -> str:
        """A hash of all sources: equal for equal data."""
        digests = [tokens.digest for tokens in self.sources.values()]
        if len(digests) == 1:
            return digests[0]
        return hashlib.blake2b(json.dumps(digests).encode(), digest_size=12).hexdigest()

    def describe(self) -> dict[str, str]:
        """A summary for printing."""
        if len(self.sources) == 1:
            return next(iter(self.sources.values())).describe()
        described, total, rows = {}, sum(self.weights), {}
        for (name, tokens), weight in zip(self.sources.items(), self.weights, strict=True):
            rows = tokens.describe()
            described[name] = f"{weight / total:.1%} of the samples; {rows['training']}"
        return described | {"tokenizer": rows["tokenizer"]}


def open_data(cfg: DataConfig, *, progress: bool = True) -> Data:
    """The sources named by a config: binidx pairs as they are, text from its cache.

    Raises UserError for a source that cannot be read, tokenised or cached, and for settings that do
    not fit it.
    """
    if cfg.mixture and cfg.tokenizer == "bpe":
        raise CorpusError(
            "data.tokenizer = bpe is trained on one source; name another one for data.mixture"
        )
    weights = cfg.mixture or {cfg.source: 1.0}
    sources = {}
    for name in weights:
        each = replace(cfg, source=name, mixture={})
        sources[name] = open_pair(each) if is_binidx(name) else prepare(each, progress=progress)
    return Data(sources, tuple(weights.values()))
