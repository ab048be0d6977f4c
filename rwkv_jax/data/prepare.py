"""A corpus tokenised once: flat arrays of ids on disk, found again by content, settings and
tokenizer.

One folder a corpus below the cache: `train.bin` and `heldout.bin` (uint16 or uint32, little-endian;
each document followed by the end-of-document id), `heldout.txt` (the held-out documents
themselves), `tokenizer/`, and `manifest.json`, whose file sizes say whether all of it is there. It
is built in a `.partial` folder and renamed when complete, so that no kill leaves half a cache; a
lock makes a second process wait and then share."""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from rwkv_jax.config import DataConfig
from rwkv_jax.data.bpe import PIECES, train_bpe
from rwkv_jax.data.conversations import trained
from rwkv_jax.data.corpus import Corpus, CorpusError, Document, hash_share, open_corpus
from rwkv_jax.data.tokenizers import (
    JsonTokenizer,
    Tokenizer,
    load_tokenizer,
    open_tokenizer,
    token_sizes,
)
from rwkv_jax.errors import UserError

FORMAT = 2
ARRAYS = ("train", "heldout")
MASK = "train.mask"
BATCH_CHARACTERS = 1 << 22
LONG_DOCUMENT = 1 << 22
BPE_TRAINING_BYTES = 16_000_000


class CacheError(UserError):
    """A token cache that cannot be written."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """A tokenised corpus, memory-mapped."""

    folder: Path
    tokenizer: Tokenizer
    train: np.ndarray
    heldout: np.ndarray
    digest: str
    """Hash of all ids of `train`, then all of `heldout`."""
    train_bytes: int
    """UTF-8 bytes of the documents that `train` holds."""
    heldout_bytes: int
    train_documents: int
    heldout_documents: int
    skipped_files: int
    mask: np.ndarray | None = None
    """Of each token of `train`, whether it is trained on; None: all are."""
    documents: np.ndarray | None = None
    """Where the documents of `train` start, and the end; None: after each end-of-document id."""

    def heldout_text(self) -> bytes:
        """The held-out documents, one behind the other, in the order of `heldout`."""
        if self.documents is not None:
            return self.tokenizer.decode_bytes(self.heldout)
        return (self.folder / "heldout.txt").read_bytes()

    def describe(self) -> dict[str, str]:
        """What was prepared, for printing."""
        sizes = {
            name: f"{documents:,} documents, {size / 1e6:,.2f} MB, {len(ids):,} tokens"
            for name, documents, size, ids in (
                ("training", self.train_documents, self.train_bytes, self.train),
                ("held out", self.heldout_documents, self.heldout_bytes, self.heldout),
            )
        }
        name, ids, size = ("held-out", self.heldout, self.heldout_bytes)
        if not size:
            name, ids, size = ("training", self.train, self.train_bytes)
        rate = f"{size / len(ids):.2f} bytes a token on {name} text"
        described = sizes | {
            "tokenizer": f"{self.tokenizer.kind}, {self.tokenizer.vocab_size:,} ids, {rate}"
        }
        if self.skipped_files:
            described["skipped"] = f"{self.skipped_files:,} files that are not readable UTF-8 text"
        return described


def prepare(cfg: DataConfig, *, progress: bool = True) -> Tokens:
    """The tokens of a corpus, from the cache if they are there, else made and put there.

    Progress, where it is asked for, and notices go to stderr. Raises UserError: a source that
    cannot be read, is empty or has no training or held-out document; a tokenizer that cannot be
    used; a cache that cannot be written."""
    corpus = open_corpus(cfg)
    tokenizer = None if cfg.tokenizer == "bpe" else open_tokenizer(cfg.tokenizer)
    recipe = (
        tokenizer.identity()
        if tokenizer
        else f"bpe {cfg.bpe_vocab_size} {BPE_TRAINING_BYTES} {PIECES}"
    )
    key = hashlib.blake2b(
        json.dumps([FORMAT, corpus.fingerprint, recipe]).encode(), digest_size=12
    ).hexdigest()
    folder = cfg.cache_root / key
    with _writing(folder), _locked(folder, progress):
        if folder.exists():
            try:
                return _open(folder)
            except (OSError, ValueError) as error:
                print(f"token cache {folder} is damaged ({error}): made again", file=sys.stderr)
        partial = folder.with_suffix(".partial")
        # Whoever holds the lock is the only writer: what lies there was left by a killed process.
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            _build(corpus, tokenizer, partial, progress)
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return _open(folder)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns a failure of the file system into one line."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space" if full else "make it writable"
        raise CacheError(
            f"token cache {folder.parent}: {error.strerror}; {remedy}"
            ", or set data.cache to another folder"
        ) from error


@contextlib.contextmanager
def _locked(folder: Path, progress: bool) -> Iterator[None]:
    """Holds the cache entry's lock; the system drops it when the process ends, however it ends."""
    with folder.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                print(f"another process is preparing {folder}: waiting for it", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _open(folder: Path) -> Tokens:
    """Raises OSError or ValueError if a part is missing or not as long as the manifest says."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for name, size in manifest["sizes"].items():
        found = (folder / name).stat().st_size
        if found != size:
            raise ValueError(f"{name} has {found:,} of {size:,} bytes")
    arrays: dict[str, Any] = {
        name: _map(folder / f"{name}.bin", manifest["dtype"]) for name in ARRAYS
    }
    if MASK in manifest["sizes"]:
        arrays["mask"] = _map(folder / MASK, "?")
    return Tokens(
        folder,
        load_tokenizer(folder / "tokenizer"),
        **arrays,
        digest=manifest["digest"],
        **manifest["counts"],
    )


def _map(path: Path, dtype: str) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


def _build(corpus: Corpus, tokenizer: Tokenizer | None, folder: Path, show: bool) -> None:
    bar = reading_bar(show)
    # Older releases of rich print an empty line when a disabled bar stops: it is not started.
    with contextlib.nullcontext() if bar.disable else bar:
        if tokenizer is None:
            tokenizer = _train_tokenizer(corpus, bar)
        counts = _tokenise(corpus, tokenizer, folder, bar)
    tokenizer.save(folder / "tokenizer")
    parts = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        "format": FORMAT,
        "source": corpus.cfg.source,
        "dtype": _dtype(tokenizer).str,
        "digest": _digest(folder),
        "sizes": {path.relative_to(folder).as_posix(): path.stat().st_size for path in parts},
        "counts": counts | {"skipped_files": corpus.skipped},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _digest(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=12)
    mask = [MASK] if (folder / MASK).exists() else []
    for name in (*(f"{name}.bin" for name in ARRAYS), *mask):
        with (folder / name).open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def reading_bar(show: bool = True) -> Progress:
    """Of bytes that are read, on stderr; disabled where that is no terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (show and console.is_terminal),
    )


def _train_tokenizer(corpus: Corpus, bar: Progress) -> Tokenizer:
    """A BPE of the training documents; of a share of them, chosen by hash, if they are more than
    the pairs need."""
    share = BPE_TRAINING_BYTES / max(1, corpus.bytes_on_disk)
    task = bar.add_task("training the BPE", total=corpus.bytes_on_disk)
    chosen = (
        piece
        for document in corpus.documents(lambda count: bar.advance(task, count))
        if not document.heldout and (share >= 1 or hash_share(f"bpe {document.name}") < share)
        for piece in pieces_of(document.text)
    )
    bpe = train_bpe(chosen, corpus.cfg.bpe_vocab_size)
    return JsonTokenizer(bpe.to_str(), "bpe", "the BPE just trained")


def _tokenise(corpus: Corpus, tokenizer: Tokenizer, folder: Path, bar: Progress) -> dict[str, int]:
    """Writes the arrays and the held-out text; the counts that `Tokens` reports."""
    counts = dict.fromkeys(
        [f"{name}_{what}" for name in ARRAYS for what in ("documents", "bytes")], 0
    )
    task = bar.add_task("tokenising", total=corpus.bytes_on_disk)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in ARRAYS}
        text = stack.enter_context((folder / "heldout.txt").open("wb"))
        writer = _Writer(tokenizer, files)
        if corpus.cfg.train_on != "all":
            files[MASK] = stack.enter_context((folder / MASK).open("wb"))
        for documents in _batches(corpus.documents(lambda count: bar.advance(task, count))):
            for document in documents:
                data = document.text.encode()
                name = ARRAYS[document.heldout]
                counts[f"{name}_documents"] += 1
                counts[f"{name}_bytes"] += len(data)
                if document.heldout:
                    text.write(data)
            writer.write(documents)
        for file in (*files.values(), text):
            file.flush()
            os.fsync(file.fileno())
    _require_both(corpus.cfg, counts)
    if corpus.cfg.train_on != "all" and not writer.trained:
        raise CorpusError(
            f"data.train_on = {corpus.cfg.train_on}: nothing of {corpus.cfg.source} is trained on;"
            " mark some of it, or train on all"
        )
    return counts


class _Writer:
    """Writes documents' ids, and of training documents which are trained on if that is asked."""

    def __init__(self, tokenizer: Tokenizer, files: Mapping[str, IO[bytes]]):
        self._tokenizer, self._files = tokenizer, files
        self.trained = 0
        """Tokens so far that are marked to be trained on."""
        self._dtype = _dtype(tokenizer)

    def write(self, documents: list[Document]) -> None:
        """Appends them, each followed by the end-of-document id."""
        pieces = [pieces_for(self._tokenizer, document.text) for document in documents]
        encoded = iter(self._tokenizer.encode_batch([piece for some in pieces for piece in some]))
        for document, some in zip(documents, pieces, strict=True):
            parts = [np.asarray(ids, self._dtype) for ids in itertools.islice(encoded, len(some))]
            file = self._files[ARRAYS[document.heldout]]
            for ids in (*parts, np.asarray([self._tokenizer.eod], self._dtype)):
                file.write(ids.tobytes())
            if document.spans is not None and not document.heldout:
                mask = self._mask(document, np.concatenate(parts))
                self._files[MASK].write(mask.tobytes())
                self.trained += int(mask.sum())

    def _mask(self, document: Document, ids: np.ndarray) -> np.ndarray:
        mask = trained(document.text, document.spans or (), self._sizes[ids])
        if mask is None:
            raise CorpusError(
                f"{document.name}: the tokens do not give the text back byte for byte, so what is"
                " trained on cannot be found in them; name a byte-level data.tokenizer (world)"
            )
        return mask

    @cached_property
    def _sizes(self) -> np.ndarray:
        return token_sizes(self._tokenizer)


def _dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups large enough to keep every core busy and small enough to hold."""
    group, size = [], 0
    for document in documents:
        group.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def pieces_for(tokenizer: Tokenizer, text: str) -> list[str]:
    """`pieces_of`, where the tokens of the pieces, together, are those of the text. Our BPE and
    World have no token with a line end before a character that is no space, and bytes have none of
    two; what another vocabulary does at a cut is not known."""
    return [text] if tokenizer.kind == "file" else pieces_of(text)


def pieces_of(text: str) -> list[str]:
    """The text cut into parts of a few MB, as a tokenizer's own memory is many times that of what
    it encodes.

    Cuts lie at a line end before a line that is not indented, where our BPE never has a token
    across. Text without such a place stays whole."""
    pieces, start = [], 0
    while len(text) - start > LONG_DOCUMENT:
        place = re.compile(r"\n(?=\S)").search(text, start + LONG_DOCUMENT)
        if not place:
            break
        pieces.append(text[start : place.end()])
        start = place.end()
    return [*pieces, text[start:]]


def _require_both(cfg: DataConfig, counts: dict[str, int]) -> None:
    train, heldout = (counts[f"{name}_documents"] for name in ARRAYS)
    if not train + heldout:
        raise CorpusError(
            f"data.source = {cfg.source}: no text in it; give a file, folder or glob that has some"
        )
    if not train:
        raise CorpusError(
            f"data.heldout = {cfg.heldout} holds out every one of the {heldout:,} documents:"
            " lower it or add documents"
        )
    if not heldout and cfg.heldout:
        raise CorpusError(
            f"data.heldout = {cfg.heldout} holds out none of the {train:,} documents:"
            f" raise it, add documents, or set data.heldout=0 to train without held-out text"
        )
