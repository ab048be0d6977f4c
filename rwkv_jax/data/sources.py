"""What a run trains and is evaluated on: text, tokenised once into a cache; binidx pairs as they
are; or several of these in turns."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from rwkv_jax.config import DataConfig
from rwkv_jax.data.binidx import Binidx, is_binidx, open_binidx
from rwkv_jax.data.files import CorpusError
from rwkv_jax.data.loader import SCAN, Stream
from rwkv_jax.data.prepare import Tokens, prepare
from rwkv_jax.data.tokenizers import Tokenizer, open_tokenizer, token_sizes

LOOKED_AT = 1 << 26
"""Tokens of a longer pair that are looked at, in stretches spread over it: all of a terabyte would
take an hour."""
STRETCHES = 64


@dataclass(frozen=True, eq=False)
class Data:
    """One source or several, by name, with their weights."""

    sources: dict[str, Tokens]
    weights: tuple[float, ...]

    @property
    def tokenizer(self) -> Tokenizer:
        """That of all sources."""
        return next(iter(self.sources.values())).tokenizer

    @cached_property
    def streams(self) -> tuple[Stream, ...]:
        """What is trained on."""
        return tuple(
            Stream(name, x.train, self.tokenizer.eod, x.mask, x.documents, weight)
            for (name, x), weight in zip(self.sources.items(), self.weights, strict=True)
        )

    @property
    def train_tokens(self) -> int:
        """Of all sources together."""
        return sum(len(tokens.train) for tokens in self.sources.values())

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes that a token of training stands for, on average over the turns."""
        shares = zip(self.sources.values(), self.weights, strict=True)
        size = sum(weight * x.train_bytes / len(x.train) for x, weight in shares)
        return size / sum(self.weights)

    @property
    def heldout(self) -> np.ndarray:
        """The held-out documents of all sources, one behind the other."""
        return self._heldout

    @cached_property
    def _heldout(self) -> np.ndarray:
        parts = [tokens.heldout for tokens in self.sources.values()]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    @property
    def heldout_bytes(self) -> int:
        """UTF-8 bytes of `heldout`."""
        return sum(tokens.heldout_bytes for tokens in self.sources.values())

    def heldout_text(self) -> bytes:
        """The held-out documents themselves."""
        return b"".join(tokens.heldout_text() for tokens in self.sources.values())

    def heldout_documents(self) -> Iterator[str]:
        """Each of them, from its tokens."""
        ends = np.flatnonzero(self.heldout == self.tokenizer.eod)
        for ids in np.split(self.heldout, ends + 1):
            if text := self.tokenizer.decode_bytes(ids):
                yield text.decode(errors="replace")

    @property
    def digest(self) -> str:
        """Equal for data that is equal."""
        digests = [tokens.digest for tokens in self.sources.values()]
        return digests[0] if len(digests) == 1 else _hash(json.dumps(digests).encode())

    def describe(self) -> dict[str, str]:
        """What was prepared, for printing."""
        if len(self.sources) == 1:
            return next(iter(self.sources.values())).describe()
        described, total, rows = {}, sum(self.weights), {}
        for (name, tokens), weight in zip(self.sources.items(), self.weights, strict=True):
            rows = tokens.describe()
            described[name] = f"{weight / total:.1%} of the samples; {rows['training']}"
        return described | {"tokenizer": rows["tokenizer"]}


def open_data(cfg: DataConfig, *, progress: bool = True) -> Data:
    """The sources that a config names, each from its cache or made.

    Raises `UserError` for what `prepare` and `open_binidx` reject, and for sources that do not
    belong together.
    """
    if not cfg.mixture:
        return Data({cfg.source: _open(cfg, progress)}, (1.0,))
    sources = {name: _open(replace(cfg, source=name, mixture={}), progress) for name in cfg.mixture}
    return Data(sources, tuple(cfg.mixture.values()))


def _open(cfg: DataConfig, progress: bool) -> Tokens:
    return _pair(cfg) if is_binidx(cfg.source) else prepare(cfg, progress=progress)


def _pair(cfg: DataConfig) -> Tokens:
    """A binidx pair; held out are its last documents."""
    pair = open_binidx(Path(cfg.source).expanduser())
    if cfg.tokenizer == "bpe":
        raise CorpusError(
            f"{pair.path}.bin holds tokens, not text: say by data.tokenizer which tokenizer made"
            " them (world, bytes, or a tokenizer.json)"
        )
    if cfg.train_on != "all":
        raise CorpusError(
            f"{pair.path}.bin does not say who speaks: data.train_on = {cfg.train_on!r} needs the"
            " text, as JSON lines"
        )
    tokenizer = open_tokenizer(cfg.tokenizer)
    _check_tokenizer(pair, tokenizer, cfg.tokenizer)
    starts = pair.starts
    if not len(pair.tokens):
        raise CorpusError(f"{pair.path}.bin: no tokens in it")
    documents = len(starts) - 1
    held = round(documents * cfg.heldout)
    if cfg.heldout and not 0 < held < documents:
        raise CorpusError(
            f"data.heldout = {cfg.heldout} holds out {held} of the {documents:,} documents of"
            f" {pair.path}: set it to 0 to train on all, or to a share that leaves some of both"
        )
    cut = int(starts[documents - held])
    train, heldout = pair.tokens[:cut], pair.tokens[cut:]
    sizes = token_sizes(tokenizer)
    return Tokens(
        folder=pair.path.parent,
        tokenizer=tokenizer,
        train=train,
        heldout=heldout,
        digest=_digest(pair, starts),
        train_bytes=_bytes(pair, train, 0, tokenizer, sizes),
        heldout_bytes=_bytes(pair, heldout, cut, tokenizer, sizes, exact=True),
        train_documents=documents - held,
        heldout_documents=held,
        skipped_files=0,
        documents=starts[: documents - held + 1],
    )


def _check_tokenizer(pair: Binidx, tokenizer: Tokenizer, name: str) -> None:
    """Against what the `tokenize` command has left beside the pair, if it made it."""
    path = pair.path.with_name(pair.path.name + ".json")
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    found = made.get("tokenizer") if isinstance(made, Mapping) else None
    # A run's own BPE, opened as a file, has another kind and the same checksum.
    if isinstance(found, str) and found.split()[-1:] != tokenizer.identity().split()[-1:]:
        raise CorpusError(
            f"data.tokenizer = {name} is {tokenizer.identity()}, and {path} says that"
            f" {pair.path.name}.bin was made with {found}; give that one"
        )


def _bytes(
    pair: Binidx,
    ids: np.ndarray,
    first: int,
    tokenizer: Tokenizer,
    sizes: np.ndarray,
    exact: bool = False,
) -> int:
    """How many bytes the tokens from the `first` on stand for, estimated from some of very many.

    Raises `CorpusError` for the first id found that the tokenizer has not.
    """
    seen = size = 0
    for start, some in _stretches(ids, exact):
        wrong = np.flatnonzero((some < 0) | (some >= len(sizes)))
        if len(wrong):
            place = first + start + int(wrong[0])
            raise CorpusError(
                f"{pair.path}.bin: token {place:,} is {int(pair.tokens[place]):,}, and"
                f" data.tokenizer ({tokenizer.kind}) has {len(sizes):,} ids; name the one"
                " that made it"
            )
        seen, size = seen + len(some), size + int(sizes[some].sum())
    return round(size * len(ids) / seen) if seen else 0


def _stretches(ids: np.ndarray, exact: bool = False):
    """Where stretches of the tokens begin, and they: all of them, or some of very many."""
    if exact or len(ids) <= LOOKED_AT:
        for start in range(0, len(ids), SCAN):
            yield start, np.asarray(ids[start : start + SCAN])
        return
    size = LOOKED_AT // STRETCHES
    for start in np.linspace(0, len(ids) - size, STRETCHES).astype(np.int64).tolist():
        yield start, np.asarray(ids[start : start + size])


def _digest(pair: Binidx, starts: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=12)
    digest.update(json.dumps([len(pair.tokens), pair.tokens.dtype.str]).encode())
    digest.update(starts.tobytes())
    for _, some in _stretches(pair.tokens):
        digest.update(some.tobytes())
    return digest.hexdigest()


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=12).hexdigest()
