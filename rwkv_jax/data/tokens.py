"""Token files: what all of them hold, and the opened tokens of a source.

Text becomes token files in one way, `encoded`: each document's ids, followed by the end-of-document
id, appended to a binidx pair (`binidx.py`). `prepare.py` does so for the cache of a run,
`tokenize.py` in parallel for a pair of the user's. `open_cache` and `open_pair` open either as
`Tokens`."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from rwkv_jax.config import DataConfig
from rwkv_jax.data.binidx import Binidx, dtype_for, map_array, open_binidx
from rwkv_jax.data.conversations import loss_mask
from rwkv_jax.data.corpus import UNREADABLE, Document
from rwkv_jax.data.files import CorpusError
from rwkv_jax.data.loader import SCAN
from rwkv_jax.data.pieces import pieces_for
from rwkv_jax.data.tokenizers import (
    Tokenizer,
    load_tokenizer,
    open_tokenizer,
    sizes_of,
    text_size,
)

Item = TypeVar("Item")

SIDES = ("train", "heldout")
"""The two pairs of a cached corpus."""
MASK, HELDOUT_MASK = "train.mask", "heldout.mask"
HELDOUT_TEXT, MANIFEST, TOKENIZER = "heldout.txt", "manifest.json", "tokenizer"

SAMPLED_TOKENS = 1 << 26
"""A pair is read when it is opened. Of a longer one than this only a sample of so many tokens is
read, in chunks spread evenly over it: reading a terabyte would take an hour."""
SAMPLED_CHUNKS = 64


@dataclass(frozen=True, eq=False)
class Tokens:
    """A tokenised source, memory-mapped."""

    folder: Path
    tokenizer: Tokenizer
    train: np.ndarray
    heldout: np.ndarray
    digest: str
    """Hash of the ids; equal for equal data."""
    train_bytes: int
    """UTF-8 bytes of the training documents."""
    heldout_bytes: int
    train_documents: int
    heldout_documents: int
    skipped_files: int
    mask: np.ndarray | None = None
    """bool: which tokens of `train` are trained on; None: all."""
    heldout_mask: np.ndarray | None = None
    """The same of `heldout`."""
    documents: np.ndarray | None = None
    """Where the documents of `train` start and, last, end; None: after each end-of-document id."""
    left_out: Sequence[str] = ()
    """What of the source is not in it, and why."""
    field: str = ""
    """The field of its records; empty if that is not known."""

    def heldout_text(self) -> bytes:
        """The held-out documents, concatenated in the order of `heldout`."""
        if self.documents is not None:  # a pair: it has no text
            return self.tokenizer.decode_bytes(self.heldout)
        return (self.folder / HELDOUT_TEXT).read_bytes()

    def describe(self) -> dict[str, str]:
        """A summary for printing."""
        described = {
            name: f"{documents:,} documents, {_amount(size)}, {len(ids):,} tokens"
            for name, documents, size, ids in (
                ("training", self.train_documents, self.train_bytes, self.train),
                ("held out", self.heldout_documents, self.heldout_bytes, self.heldout),
            )
        }
        name, ids, size = ("held-out", self.heldout, self.heldout_bytes)
        if not size:
            name, ids, size = ("training", self.train, self.train_bytes)
        rate = f"{size / len(ids):.2f} bytes a token on {name} text"
        kind, ids = self.tokenizer.kind, self.tokenizer.vocab_size
        described["tokenizer"] = f"{kind}, {ids:,} ids, {rate}"
        if self.left_out:
            described["left out"] = "; ".join(self.left_out)
        return described


def _amount(size: int) -> str:
    """A number of bytes as text."""
    return f"{size / 1e6:,.2f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


def encoder_of(cfg: DataConfig, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer as a config encodes text with it."""
    return tokenizer.with_special_tokens() if cfg.special_tokens else tokenizer


def encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, characters: int
) -> Iterator[tuple[Document, np.ndarray]]:
    """Each document with its ids, the end-of-document id last, in the type of a token file.

    Documents are encoded in batches of up to `characters` characters: enough to occupy every core
    if the tokenizer is parallel, few enough to fit in memory."""
    dtype = dtype_for(tokenizer.vocab_size)
    end = np.array([tokenizer.eod], dtype)
    sized = ((document, len(document.text)) for document in documents)
    for batch, _ in grouped(sized, characters):
        pieces = [pieces_for(tokenizer, document.text) for document in batch]
        ids = iter(tokenizer.encode_batch(list(itertools.chain.from_iterable(pieces))))
        for document, some in zip(batch, pieces, strict=True):
            parts = [np.fromiter(x, dtype, len(x)) for x in itertools.islice(ids, len(some))]
            yield document, np.concatenate([*parts, end])


def mask_of(document: Document, ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """bool: which of a document's ids, as `encoded` gives them, are trained on. Raises CorpusError
    if the tokens do not say where they are in the text."""
    mask = loss_mask(document.text, document.spans or (), sizes_of(tokenizer, ids[:-1]))
    if mask is None:
        raise CorpusError(
            f"{document.name}: the tokens do not decode to the text byte for byte, so the parts"
            " that are trained on cannot be located; choose a byte-level data.tokenizer (world)"
        )
    return mask


def grouped(items: Iterable[tuple[Item, int]], most: int) -> Iterator[tuple[list[Item], int]]:
    """Groups of consecutive items, each with its total size, from items with their sizes. A group
    has as many items as fit in `most`, or a single larger one."""
    group, size = [], 0
    for item, more in items:
        if group and size + more > most:
            yield group, size
            group, size = [], 0
        group.append(item)
        size += more
    if group:
        yield group, size


def open_cache(folder: Path) -> Tokens:
    """A corpus that `prepare` has written, by its manifest.

    Raises OSError or ValueError if a file is missing or does not have the manifest's size."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for name, size in manifest["sizes"].items():
        found = (folder / name).stat().st_size
        if found != size:
            raise ValueError(f"{name} has {found:,} of {size:,} bytes")

    counts = manifest["counts"]
    older = [f"{count:,} files: {UNREADABLE}"] if (count := counts["skipped_files"]) else []

    def array(name: str, dtype: str) -> np.ndarray:
        return map_array(folder / name, dtype, manifest["sizes"][name] // np.dtype(dtype).itemsize)

    return Tokens(
        folder,
        load_tokenizer(folder / TOKENIZER),
        *(array(f"{side}.bin", manifest["dtype"]) for side in SIDES),
        digest=manifest["digest"],
        **counts,
        **{
            name: array(file, "?")
            for name, file in (("mask", MASK), ("heldout_mask", HELDOUT_MASK))
            if file in manifest["sizes"]
        },
        left_out=manifest.get("left_out", older),
        field=manifest.get("field", ""),
    )


def open_pair(cfg: DataConfig) -> Tokens:
    """A binidx pair; its last documents are held out."""
    pair = open_binidx(Path(cfg.source).expanduser())
    if cfg.tokenizer == "bpe":
        raise CorpusError(
            f"{pair.path}.bin holds tokens, not text: name the tokenizer that made them with"
            " data.tokenizer (world, bytes, or a tokenizer.json)"
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
        raise CorpusError(f"{pair.path}.bin: no tokens in it; create the pair from some text")
    documents = len(starts) - 1
    held = round(documents * cfg.heldout)
    if cfg.heldout and not 0 < held < documents:
        raise CorpusError(
            f"data.heldout = {cfg.heldout} holds out {held} of the {documents:,} documents of"
            f" {pair.path}: set it to 0 to train on all, or to a share that leaves some of both"
        )
    cut = int(starts[documents - held])
    samples = _samples(cut)
    sampled = sum(chunk.stop - chunk.start for chunk in samples)
    train_bytes = _bytes(pair, samples, tokenizer)
    return Tokens(
        folder=pair.path.parent,
        tokenizer=tokenizer,
        train=pair.tokens[:cut],
        heldout=pair.tokens[cut:],
        digest=_digest(pair, starts),
        train_bytes=round(train_bytes * cut / sampled) if sampled else 0,
        heldout_bytes=_bytes(pair, _chunks(cut, len(pair.tokens)), tokenizer),
        train_documents=documents - held,
        heldout_documents=held,
        skipped_files=0,
        documents=starts[: documents - held + 1],
    )


def _check_tokenizer(pair: Binidx, tokenizer: Tokenizer, name: str) -> None:
    """Compares it with the description that the `tokenize` command leaves next to a pair."""
    path = pair.path.with_name(pair.path.name + ".json")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    found = described.get("tokenizer") if isinstance(described, Mapping) else None
    # A run's own BPE, opened as a file, has another kind and the same checksum.
    if isinstance(found, str) and found.split()[-1:] != tokenizer.identity().split()[-1:]:
        raise CorpusError(
            f"data.tokenizer = {name} is {tokenizer.identity()}, and {path} says that"
            f" {pair.path.name}.bin was made with {found}; give that one"
        )


def _bytes(pair: Binidx, chunks: list[slice], tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the tokens in chunks of a pair. Raises CorpusError for the first id found that
    the tokenizer does not have."""
    total, count = 0, tokenizer.vocab_size
    for chunk in chunks:
        ids = np.asarray(pair.tokens[chunk])
        wrong = np.flatnonzero((ids < 0) | (ids >= count))
        if len(wrong):
            place = chunk.start + int(wrong[0])
            raise CorpusError(
                f"{pair.path}.bin: token {place:,} is {int(pair.tokens[place]):,}, but"
                f" data.tokenizer ({tokenizer.kind}) has {count:,} ids; name the tokenizer"
                " that made it"
            )
        total += text_size(tokenizer, ids)
    return total


def _digest(pair: Binidx, starts: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=12)
    digest.update(json.dumps([len(pair.tokens), pair.tokens.dtype.str]).encode())
    digest.update(starts.tobytes())
    for chunk in _samples(len(pair.tokens)):
        digest.update(pair.tokens[chunk].tobytes())
    return digest.hexdigest()


def _samples(stop: int) -> list[slice]:
    """Chunks of the first `stop` tokens: all of them, or a sample of very many."""
    if stop <= SAMPLED_TOKENS:
        return _chunks(0, stop)
    size = SAMPLED_TOKENS // SAMPLED_CHUNKS
    starts = np.linspace(0, stop - size, SAMPLED_CHUNKS).astype(np.int64).tolist()
    return [slice(start, start + size) for start in starts]


def _chunks(start: int, stop: int) -> list[slice]:
    return [slice(i, min(i + SCAN, stop)) for i in range(start, stop, SCAN)]
