"""Documents: the text of a `data.source`, cut into training and held-out documents.

A document is a file (`data.document = "file"`), a line (`"line"`, and always for `.jsonl`), or a
row of a table (`.parquet`, `.arrow`). A document is held out if the BLAKE2b hash of its name (for
lines and rows: of its text, so that equal ones stay together) falls below `data.heldout`: adding a
document moves no other, and no random state is involved. Of a single plain file that is one
document, the last `data.heldout` share is held out, from the start of a line.

Only UTF-8 is read. A file in another encoding (PEP 263 allows that in Python sources: 4 of Python
3.11's 1,790) or with NULs is skipped in a folder and counted, never guessed at; named by its own
path, it is an error."""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_jax.config import DataConfig
from rwkv_jax.data.conversations import TEMPLATES, ConversationError, Spans, render
from rwkv_jax.data.files import (
    CorpusError,
    Report,
    SourceFile,
    check_length,
    find_files,
    lines_before,
    longest_document,
    read_lines,
    read_whole,
    text_problem,
    unreported,
)
from rwkv_jax.data.tables import read_rows

Line = tuple[int, str, Spans | None]
"""A line or row: its number, its text, and the parts of it that are trained on."""


@dataclass(frozen=True)
class Document:
    """A text, and its side of the split."""

    name: str
    """Path relative to the source's root; for a line or row followed by `:number`."""
    text: str
    heldout: bool
    spans: Spans | None = None
    """The parts that are trained on; None: all of it."""


@dataclass(frozen=True)
class Corpus:
    """The readable files of a source. `documents` reads them again, one at a time."""

    cfg: DataConfig
    files: tuple[SourceFile, ...]
    skipped: int = 0
    """Files left out because they are not UTF-8 text or cannot be read."""
    bytes_on_disk: int = 0
    fingerprint: str = ""
    """Hash of every file's name and content, and of the settings that decide the documents."""
    longest: int = sys.maxsize
    """The most bytes that a document may have."""

    def documents(self, report: Report = unreported) -> Iterator[Document]:
        """Non-empty documents in the order of the files.

        Raises CorpusError naming file and line of what cannot be read.
        """
        for file in self.files:
            if file.table or file.json_lines:
                read = self._rows if file.table else self._lines
                yield from self._each(file, read(file, report))
            elif self.cfg.train_on != "all":
                raise CorpusError(
                    f"{file.path}: data.train_on = {self.cfg.train_on!r} needs JSON lines or a"
                    ' table, which say what is trained on; give one, or set it to "all"'
                )
            elif self.cfg.document == "line":
                yield from self._each(file, self._lines(file, report))
            else:
                yield from self._whole(file, report)

    def _each(self, file: SourceFile, lines: Iterator[Line]) -> Iterator[Document]:
        for number, text, spans in lines:
            if text:
                heldout = hash_share(text) < self.cfg.heldout
                yield Document(f"{file.name}:{number}", text, heldout, spans)

    def _whole(self, file: SourceFile, report: Report) -> Iterator[Document]:
        data = read_whole(file, report, self.longest)
        try:
            text = _decode(data)
        except _Problem as problem:
            raise CorpusError(f"{file.path}: {problem}") from problem
        if text and self.single_document:
            place = int(len(text) * (1 - self.cfg.heldout))
            cut = text.find("\n", place) + 1
            if not 0 < cut < len(text):  # in the last line, or there is only one
                cut = place or len(text)
            yield Document(file.name, text[:cut], False)
            if cut < len(text):
                yield Document(f"{file.name} (end)", text[cut:], True)
        elif text:
            yield Document(file.name, text, hash_share(file.name) < self.cfg.heldout)

    def _lines(self, file: SourceFile, report: Report) -> Iterator[Line]:
        for number, line in enumerate(read_lines(file, report, self.longest), 1):
            if file.json_lines and not line.strip():
                continue
            try:
                text, spans = _decode(line), None
                if file.json_lines:
                    text, spans = _json_text(text, self.cfg)
            except _Problem as problem:
                # The lines before a part of a file are counted only for an error.
                place = f"{file.path}:{lines_before(file) + number}"
                raise CorpusError(f"{place}: {problem}") from problem
            yield number, text, spans

    def _rows(self, file: SourceFile, report: Report) -> Iterator[Line]:
        more = ["spans"] if self.cfg.train_on == "spans" else []
        for number, record in read_rows(file, self.cfg.field, *more, report=report):
            where = f"{file.path}:{number}"
            try:
                text, spans = _record_text(record, self.cfg)
            except ConversationError as error:
                raise CorpusError(f"{where}: column {self.cfg.field!r}: {error}") from error
            check_length(text, where, self.longest)
            yield number, text, spans

    @property
    def single_document(self) -> bool:
        """Whether the source is one file that is one document."""
        return (
            self.cfg.document == "file"
            and len(self.files) == 1
            and not self.files[0].json_lines
            and not self.files[0].table
            and names_file(self.cfg.source)
        )


def hash_share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64


def names_file(source: str) -> bool:
    """Whether a `data.source` names a single file by its path."""
    return Path(source).expanduser().is_file()


def open_corpus(cfg: DataConfig, longest: int | None = None) -> Corpus:
    """The corpus of a config, each file read once to check and hash it. A document may have
    `longest` bytes; None: as many as the available memory allows.

    Raises CorpusError if there are no files, or a file named by its own path is not UTF-8 text.
    """
    files, skipped, size = [], 0, 0
    content = hashlib.blake2b(digest_size=16)
    for file in find_files(cfg.source):
        digest = hashlib.blake2b(digest_size=16)
        if skip_reason(file, cfg, digest):
            skipped += 1
            continue
        files.append(file)
        size += file.path.stat().st_size
        content.update(json.dumps([file.name, file.json_lines, digest.hexdigest()]).encode())
    if not files:
        raise CorpusError(
            f"data.source = {cfg.source}: none of its {skipped} files is UTF-8 text; give text"
        )
    named = names_file(cfg.source)
    settings = [cfg.field, cfg.document, cfg.heldout, named, cfg.train_on, cfg.template]
    settings += ["special tokens"] if cfg.special_tokens else []  # older caches stay valid
    content.update(json.dumps(settings).encode())
    longest = longest_document() if longest is None else longest
    return Corpus(cfg, tuple(files), skipped, size, content.hexdigest(), longest)


def skip_reason(file: SourceFile, cfg: DataConfig, digest: Any = None) -> str | None:
    """Why a file of the source is skipped, or None; its bytes are fed to `digest`.

    Raises CorpusError instead if the source names this file by its path, or the file is damaged.
    """
    named = names_file(cfg.source)
    try:
        problem = text_problem(file, digest)
    except CorpusError:
        # Broken compressed data is damage, not a file of another kind: only what is unreadable is
        # skipped.
        if named or file.compressed:
            raise
        problem = "cannot be read"
    if problem and named:
        raise CorpusError(f"{file.path}: {problem}; convert it to UTF-8 text first")
    return problem


class _Problem(ValueError):
    """A fault in a document; the caller adds the place."""


def _decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _Problem(f"not UTF-8 ({error.reason}); convert it to UTF-8 text first") from error


def _json_text(line: str, cfg: DataConfig) -> tuple[str, Spans | None]:
    """The text of a JSON line, and the parts of it that are trained on."""
    field = cfg.field
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise _Problem(
            f"not JSON ({error.msg}, column {error.colno}); one object a line"
        ) from error
    except (ValueError, RecursionError) as error:  # numbers and depths beyond Python's limits
        raise _Problem(f"JSON that cannot be read ({error}); correct the line") from error
    if not isinstance(record, dict):
        raise _Problem(f"a JSON {type(record).__name__}, not an object with a field {field!r}")
    if field not in record:
        found = ", ".join(sorted(record)) or "none"
        raise _Problem(f"no field {field!r}; set data.field to one of its fields: {found}")
    try:
        text, spans = _record_text(record, cfg)
        text.encode()
    except UnicodeEncodeError as error:
        raise _Problem(
            f"field {field!r} holds half a surrogate pair, which is not text; correct the line, or"
            " leave it out"
        ) from error
    except ConversationError as error:
        raise _Problem(f"field {field!r}: {error}") from error
    return text, spans


def _record_text(record: dict, cfg: DataConfig) -> tuple[str, Spans | None]:
    """The text of a record, and the parts of it that are trained on. Raises ConversationError."""
    value = record[cfg.field]
    if isinstance(value, list):
        text, answers = render(value, TEMPLATES[cfg.template])
        if cfg.train_on == "spans":
            raise ConversationError('turns have no spans; set data.train_on = "answers"')
        return text, answers if cfg.train_on == "answers" else None
    if value is None:
        raise ConversationError("null, which is no text; leave the line out")
    if not isinstance(value, str):
        kind = type(value).__name__
        raise ConversationError(f"a {kind}, not text or a list of turns; set data.field")
    if cfg.train_on == "answers":
        raise ConversationError('text, not a list of turns, which data.train_on = "answers" needs')
    return value, _spans(record, value) if cfg.train_on == "spans" else None


def _spans(record: dict, text: str) -> Spans:
    spans = record.get("spans")
    found = []
    for pair in spans if isinstance(spans, list) else [spans]:
        numbers = pair if isinstance(pair, list) and [type(x) for x in pair] == [int, int] else None
        if numbers is None or not 0 <= numbers[0] <= numbers[1] <= len(text):
            raise ConversationError(
                f"the field 'spans' holds {pair!r}, not [first, last + 1] of the text's"
                f" {len(text):,} characters"
            )
        found.append((numbers[0], numbers[1]))
    return tuple(found)
