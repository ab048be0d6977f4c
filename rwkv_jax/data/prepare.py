"""A corpus tokenised once, into a cache where it is found again by content, settings and tokenizer.

One folder a corpus below `data.cache`:

    train.bin, train.idx       the training documents as a binidx pair
    heldout.bin, heldout.idx   the held-out documents as another (older entries have no .idx, which
                               is not needed here: every document ends with the same id)
    train.mask, heldout.mask   with `data.train_on`: for each token a byte, 1 if it is trained on
    heldout.txt, tokenizer/    the text of the held-out documents; the tokenizer
    manifest.json              counts, and the sizes of all files, which reveal a damaged entry

An entry is built in a `.partial` folder and renamed when it is complete, so that a kill leaves no
half of one; a lock makes a second process wait and then use the same entry."""

import contextlib
import fcntl
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from rwkv_jax import disk
from rwkv_jax.config import DataConfig
from rwkv_jax.console import reading_bar
from rwkv_jax.data.binidx import BinidxWriter, dtype_for
from rwkv_jax.data.bpe import PIECES, train_bpe
from rwkv_jax.data.corpus import (
    Corpus,
    CorpusError,
    hash_share,
    open_corpus,
    with_field,
)
from rwkv_jax.data.files import Report
from rwkv_jax.data.pieces import pieces_of
from rwkv_jax.data.records import LeftOut
from rwkv_jax.data.tokenizers import (
    JsonTokenizer,
    Tokenizer,
    open_tokenizer,
)
from rwkv_jax.data.tokens import (
    HELDOUT_MASK,
    HELDOUT_TEXT,
    MANIFEST,
    MASK,
    SIDES,
    TOKENIZER,
    Tokens,
    encoded,
    encoder_of,
    mask_of,
    open_cache,
)
from rwkv_jax.errors import UserError

FORMAT = 2
BATCH_CHARACTERS = 1 << 22
BPE_TRAINING_BYTES = 16_000_000


class CacheError(UserError):
    """A token cache that cannot be written."""


def prepare(cfg: DataConfig, *, progress: bool = True) -> Tokens:
    """The tokens of a corpus, from the cache; a corpus that is not in it is tokenised into it.

    Progress, if asked for, and notices go to stderr. Raises UserError: a source that cannot be
    read, is empty or has no training or held-out document; a tokenizer that cannot be used; a cache
    that cannot be written."""
    corpus = open_corpus(cfg)
    tokenizer = None if cfg.tokenizer == "bpe" else open_tokenizer(cfg.tokenizer)
    recipe = f"bpe {cfg.bpe_vocab_size} {BPE_TRAINING_BYTES} {PIECES}"
    key = json.dumps([FORMAT, corpus.fingerprint, tokenizer.identity() if tokenizer else recipe])
    root = cfg.cache_root
    folder = root / hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
    remedy = "set data.cache to another folder"
    with disk.writing(
        f"token cache {root}",
        f"make it writable, or {remedy}",
        full=f"free some space, or {remedy}",
        error=CacheError,
    ):
        root.mkdir(parents=True, exist_ok=True)
        with _locked(folder, progress):
            if folder.exists():
                try:
                    return open_cache(folder)
                except (OSError, ValueError) as error:
                    print(f"token cache {folder} is damaged ({error}): rebuilding", file=sys.stderr)
            partial = folder.with_suffix(".partial")
            # Only the holder of the lock writes: an existing one was left by a killed process.
            shutil.rmtree(partial, ignore_errors=True)
            try:
                partial.mkdir()
                _build(corpus, tokenizer, partial, progress)
                if folder.exists():
                    shutil.rmtree(folder)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            return open_cache(folder)


@contextlib.contextmanager
def _locked(folder: Path, progress: bool) -> Iterator[None]:
    """Holds the entry's lock, which the system drops when the process ends, however it ends."""
    with folder.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                print(f"another process is preparing {folder}: waiting for it", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(corpus: Corpus, tokenizer: Tokenizer | None, folder: Path, show: bool) -> None:
    bar = reading_bar(show)

    def reporting(action: str) -> Report:
        task = bar.add_task(action, total=corpus.bytes_on_disk)
        return lambda count: bar.advance(task, count)

    left_out = LeftOut(corpus.cfg.strict)
    # Older releases of rich print an empty line when a disabled bar stops: it is not started.
    with contextlib.nullcontext() if bar.disable else bar:
        tokenizer = tokenizer or _train_tokenizer(corpus, reporting("training the BPE"))
        counts = _write(corpus, tokenizer, folder, reporting("tokenising"), left_out)
    files_left_out = [f"{count:,} files: {why}" for why, count in corpus.skipped.items()]
    tokenizer.save(folder / TOKENIZER)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        "format": FORMAT,
        "source": corpus.cfg.source,
        "dtype": dtype_for(tokenizer.vocab_size).str,
        "digest": _digest(folder),
        "sizes": {path.relative_to(folder).as_posix(): path.stat().st_size for path in files},
        "counts": counts | {"skipped_files": sum(corpus.skipped.values())},
        "left_out": [*files_left_out, *filter(None, [str(left_out)])],
        "field": with_field(corpus.cfg, corpus.files).field,
    }
    disk.write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def _digest(folder: Path) -> str:
    """Hash of the ids and of the mask."""
    digest = hashlib.blake2b(digest_size=12)
    for path in (*(folder / f"{side}.bin" for side in SIDES), folder / MASK):
        if path.exists():
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()


def _train_tokenizer(corpus: Corpus, report: Report) -> Tokenizer:
    """A BPE of the training documents; of a sample of them, chosen by hash, if there is more text
    than its training needs."""
    share = BPE_TRAINING_BYTES / max(1, corpus.bytes_on_disk)
    chosen = (
        piece
        for document in corpus.documents(report, LeftOut(corpus.cfg.strict))
        if not document.heldout and (share >= 1 or hash_share(f"bpe {document.name}") < share)
        for piece in pieces_of(document.text)
    )
    bpe = train_bpe(chosen, corpus.cfg.bpe_vocab_size)
    return JsonTokenizer(bpe.to_str(), "bpe", "the BPE just trained")


def _write(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, report: Report, left_out: LeftOut
) -> dict[str, int]:
    """Writes the pairs, the mask and the held-out text; returns the manifest's counts. Raises
    CorpusError if too many records are left out."""
    cfg, dtype = corpus.cfg, dtype_for(tokenizer.vocab_size)
    masked, encoder = cfg.train_on != "all", encoder_of(cfg, tokenizer)
    counts, trained = {f"{side}_bytes": 0 for side in SIDES}, 0
    with contextlib.ExitStack() as stack:
        pairs = {side: stack.enter_context(BinidxWriter(folder / side, dtype)) for side in SIDES}
        text = stack.enter_context(disk.replacing(folder / HELDOUT_TEXT))
        masks = [
            stack.enter_context(disk.replacing(folder / name))
            for name in (MASK, HELDOUT_MASK)
            if masked
        ]
        documents = corpus.documents(report, left_out)
        for document, ids in encoded(documents, encoder, BATCH_CHARACTERS):
            side, data = SIDES[document.heldout], document.text.encode()
            pairs[side].add(ids)
            counts[f"{side}_bytes"] += len(data)
            if document.heldout:
                text.write(data)
            if masks:
                chosen = mask_of(document, ids, tokenizer)
                masks[document.heldout].write(chosen.tobytes())
                trained += 0 if document.heldout else int(chosen.sum())
    left_out.check()
    counts |= {f"{side}_documents": pair.documents for side, pair in pairs.items()}
    _require_documents(cfg, counts["train_documents"], counts["heldout_documents"])
    if masked and not trained:
        raise CorpusError(
            f"data.train_on = {cfg.train_on}: nothing of {cfg.source} is trained on; mark some of"
            " it, or train on all"
        )
    return counts


def _require_documents(cfg: DataConfig, train: int, heldout: int) -> None:
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
            " raise it, add documents, or set data.heldout=0 to train without held-out text"
        )
