"""Documents: the text of a `data.source`, cut into training and held-out documents.

A file is a document (`data.document = "file"`), or each of its lines is (`"line"`, and always for
`.jsonl`). A document is held out if the BLAKE2b hash of its name (for lines: of its text, so that
equal lines stay together) falls below `data.heldout`: adding a document moves no other, and no
random state is involved. One plain file given alone as one document cannot be split like that;
there the last `data.heldout` of it, from a line start on, is held out.

Only UTF-8 is read. A file in another encoding (PEP 263 allows that in Python sources: 4 of Python
3.11's 1,790) or with NULs is left out of a folder and counted, never guessed at; given alone, it is
an error."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rwkv_jax.config import DataConfig
from rwkv_jax.data.files import (
    CorpusError,
    SourceFile,
    find_files,
    hash_text,
    read_chunks,
    read_lines,
)


@dataclass(frozen=True)
class Document:
    """A text, and the side of the split it is on."""

    name: str
    """Path relative to the source's root; with `:line` after it for a line."""
    text: str
    heldout: bool


@dataclass(frozen=True)
class Corpus:
    """The files that were found readable. Iterating `documents` reads them again, one at a time."""

    cfg: DataConfig
    files: tuple[SourceFile, ...]
    skipped: int
    """Files left out because they are not UTF-8 text or cannot be read."""
    bytes_on_disk: int
    fingerprint: str
    """Hash of every file's name and content, and of the settings that decide the documents."""

    def documents(self, report: Callable[[int], None] | None = None) -> Iterator[Document]:
        """Non-empty documents in the order of the files; `report` is told the bytes read from disk.

        Raises CorpusError naming file and line of what cannot be read.
        """
        for file in self.files:
            if file.json_lines:
                yield from self._lines(file, _json_texts(file, self.cfg.field, report))
            elif self.cfg.document == "line":
                yield from self._lines(file, _line_texts(file, report))
            else:
                yield from self._whole(
                    file, _decode(b"".join(read_chunks(file, report)), file.path)
                )

    def _lines(self, file: SourceFile, texts: Iterator[tuple[int, str]]) -> Iterator[Document]:
        for number, text in texts:
            if text:
                yield Document(f"{file.name}:{number}", text, hash_share(text) < self.cfg.heldout)

    def _whole(self, file: SourceFile, text: str) -> Iterator[Document]:
        if text and self.alone:
            place = int(len(text) * (1 - self.cfg.heldout))
            cut = text.find("\n", place) + 1
            if not 0 < cut < len(text):  # the last line, or the only one
                cut = place or len(text)
            yield Document(file.name, text[:cut], False)
            if cut < len(text):
                yield Document(f"{file.name} (end)", text[cut:], True)
        elif text:
            yield Document(file.name, text, hash_share(file.name) < self.cfg.heldout)

    @property
    def alone(self) -> bool:
        """Whether the source is a single file that is a single document."""
        return (
            self.cfg.document == "file"
            and len(self.files) == 1
            and not self.files[0].json_lines
            and Path(self.cfg.source).expanduser().is_file()
        )


def hash_share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64


def open_corpus(cfg: DataConfig) -> Corpus:
    """The corpus of a config, each file read once to see that it is text and what it holds.

    Raises CorpusError if nothing is there, or a file given by its own path is not UTF-8 text.
    """
    files, skipped, size = [], 0, 0
    named = Path(cfg.source).expanduser().is_file()
    content = hashlib.blake2b(digest_size=16)
    for file in find_files(cfg.source):
        digest = hashlib.blake2b(digest_size=16)
        try:
            fault = hash_text(file, digest)
        except CorpusError:
            # Broken compressed data is damage, not a file of another kind: only what is unreadable
            # is left out.
            if named or file.compressed:
                raise
            fault = "cannot be read"
        if fault and named:
            raise CorpusError(f"{file.path}: {fault}; convert it to UTF-8 text first")
        if fault:
            skipped += 1
            continue
        files.append(file)
        size += file.path.stat().st_size
        content.update(json.dumps([file.name, file.json_lines, digest.hexdigest()]).encode())
    if not files:
        raise CorpusError(
            f"data.source = {cfg.source}: none of the {skipped} files there is UTF-8 text"
        )
    content.update(json.dumps([cfg.field, cfg.document, cfg.heldout, named]).encode())
    return Corpus(cfg, tuple(files), skipped, size, content.hexdigest())


def _decode(data: bytes, where: object) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{where}: not UTF-8 ({error.reason}); convert it to UTF-8 text first"
        ) from error


def _line_texts(
    file: SourceFile, report: Callable[[int], None] | None
) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(read_lines(file, report), 1):
        yield number, _decode(line, f"{file.path}:{number}")


def _json_texts(
    file: SourceFile, field: str, report: Callable[[int], None] | None
) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(read_lines(file, report), 1):
        if not line.strip():
            continue
        where = f"{file.path}:{number}"
        try:
            record = json.loads(_decode(line, where))
        except json.JSONDecodeError as error:
            raise CorpusError(
                f"{where}: not JSON ({error.msg}, column {error.colno}); one object a line"
            ) from error
        if not isinstance(record, dict):
            raise CorpusError(
                f"{where}: a JSON {type(record).__name__}, not an object with a field {field!r}"
            )
        if field not in record:
            there = ", ".join(sorted(record)) or "none"
            raise CorpusError(
                f"{where}: no field {field!r}; set data.field to one of those there: {there}"
            )
        text = record[field]
        if not isinstance(text, str):
            raise CorpusError(
                f"{where}: field {field!r} holds a {type(text).__name__}, not text; set data.field"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise CorpusError(
                f"{where}: field {field!r} holds half a surrogate pair, which is not text"
            ) from error
        yield number, text
