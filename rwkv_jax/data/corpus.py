"""Documents: the text of a `data.source`, cut into training and held-out documents.

A file is a document (`data.document = "file"`), or each of its lines is (`"line"`, and always for
`.jsonl`), or each row of a table (`.parquet`, `.arrow`). A document is held out if the BLAKE2b hash
of its name (for lines and rows: of its text, so that equal ones stay together) falls below
`data.heldout`: adding a document moves no other, and no random state is involved. One plain file
given alone as one document cannot be split like that; there the last `data.heldout` of it, from a
line start on, is held out.

Only UTF-8 is read. A file in another encoding (PEP 263 allows that in Python sources: 4 of Python
3.11's 1,790) or with NULs is left out of a folder and counted, never guessed at; given alone, it is
an error."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_jax.config import DataConfig
from rwkv_jax.data.conversations import TEMPLATES, ConversationError, Spans, written
from rwkv_jax.data.files import (
    CorpusError,
    SourceFile,
    check_length,
    find_files,
    hash_text,
    lines_before,
    longest_document,
    read_lines,
    read_whole,
)
from rwkv_jax.data.tables import read_rows

Line = tuple[int, str, Spans | None]
"""Its number, its text, and what of it is trained on."""


@dataclass(frozen=True)
class Document:
    """A text, and the side of the split it is on."""

    name: str
    """Path relative to the source's root; with `:line` after it for a line."""
    text: str
    heldout: bool
    spans: Spans | None = None
    """The parts that are trained on; None: all of it."""


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
    longest: int = sys.maxsize
    """Bytes that a document may have."""

    def documents(self, report: Callable[[int], None] | None = None) -> Iterator[Document]:
        """Non-empty documents in the order of the files; `report` is told the bytes read from disk.

        Raises CorpusError naming file and line of what cannot be read.
        """
        for file in self.files:
            if file.json_lines:
                yield from self._lines(file, _json_texts(file, self.cfg, report, self.longest))
            elif file.table:
                yield from self._lines(file, _row_texts(file, self.cfg, report, self.longest))
            elif self.cfg.train_on != "all":
                raise CorpusError(
                    f"{file.path}: data.train_on = {self.cfg.train_on!r} needs JSON lines or a"
                    ' table, which say what is trained on; give one, or set it to "all"'
                )
            elif self.cfg.document == "line":
                yield from self._lines(file, _line_texts(file, report, self.longest))
            else:
                yield from self._whole(file, _whole_text(file, report, self.longest))

    def _lines(self, file: SourceFile, texts: Iterator[Line]) -> Iterator[Document]:
        for number, text, spans in texts:
            if text:
                heldout = hash_share(text) < self.cfg.heldout
                yield Document(f"{file.name}:{number}", text, heldout, spans)

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
            and not self.files[0].table
            and Path(self.cfg.source).expanduser().is_file()
        )


def hash_share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64


def open_corpus(cfg: DataConfig, longest: int | None = None) -> Corpus:
    """The corpus of a config, each file read once to see that it is text and what it holds. A
    document may have `longest` bytes; None: what the memory there is allows.

    Raises CorpusError if nothing is there, or a file given by its own path is not UTF-8 text.
    """
    files, skipped, size = [], 0, 0
    named = Path(cfg.source).expanduser().is_file()
    content = hashlib.blake2b(digest_size=16)
    for file in find_files(cfg.source):
        digest = hashlib.blake2b(digest_size=16)
        fault = fault_of(file, named, digest)
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
    settings = [cfg.field, cfg.document, cfg.heldout, named, cfg.train_on, cfg.template]
    content.update(json.dumps(settings).encode())
    longest = longest_document() if longest is None else longest
    return Corpus(cfg, tuple(files), skipped, size, content.hexdigest(), longest)


def fault_of(file: SourceFile, named: bool, digest: Any = None) -> str | None:
    """Why a file is left out of its folder, or None; its bytes are fed to `digest`.

    Raises CorpusError if it was `named` by its own path instead, or is damaged.
    """
    try:
        fault = hash_text(file, digest)
    except CorpusError:
        # Broken compressed data is damage, not a file of another kind: only what is unreadable is
        # left out.
        if named or file.compressed:
            raise
        fault = "cannot be read"
    if fault and named:
        raise CorpusError(f"{file.path}: {fault}; convert it to UTF-8 text first")
    return fault


class _Fault(ValueError):
    """What is wrong with a document, without its place."""


def _decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _Fault(f"not UTF-8 ({error.reason}); convert it to UTF-8 text first") from error


def _place(file: SourceFile, number: int) -> str:
    """File and line, for an error: only then are the lines before a part of a file counted."""
    return f"{file.path}:{lines_before(file) + number}"


def _whole_text(file: SourceFile, report: Callable[[int], None] | None, longest: int) -> str:
    data = read_whole(file, report, longest)
    try:
        return _decode(data)
    except _Fault as fault:
        raise CorpusError(f"{file.path}: {fault}") from fault


def _row_texts(
    file: SourceFile, cfg: DataConfig, report: Callable[[int], None] | None, longest: int
) -> Iterator[Line]:
    more = ["spans"] if cfg.train_on == "spans" else []
    for number, record in read_rows(file, cfg.field, *more, report=report):
        where = f"{file.path}:{number}"
        try:
            text, spans = _said(record, cfg)
        except ConversationError as error:
            raise CorpusError(f"{where}: column {cfg.field!r}: {error}") from error
        check_length(text, where, longest)
        yield number, text, spans


def _line_texts(
    file: SourceFile, report: Callable[[int], None] | None, longest: int
) -> Iterator[Line]:
    for number, line in enumerate(read_lines(file, report, longest), 1):
        try:
            yield number, _decode(line), None
        except _Fault as fault:
            raise CorpusError(f"{_place(file, number)}: {fault}") from fault


def _json_texts(
    file: SourceFile, cfg: DataConfig, report: Callable[[int], None] | None, longest: int
) -> Iterator[Line]:
    for number, line in enumerate(read_lines(file, report, longest), 1):
        if not line.strip():
            continue
        try:
            text, spans = _json_text(line, cfg)
        except _Fault as fault:
            raise CorpusError(f"{_place(file, number)}: {fault}") from fault
        yield number, text, spans


def _json_text(line: bytes, cfg: DataConfig) -> tuple[str, Spans | None]:
    """The text of a line, and what of it is trained on."""
    field, text = cfg.field, _decode(line)
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise _Fault(f"not JSON ({error.msg}, column {error.colno}); one object a line") from error
    except (ValueError, RecursionError) as error:  # numbers and depths beyond Python's limits
        raise _Fault(f"JSON that cannot be read ({error}); mend the line") from error
    if not isinstance(record, dict):
        raise _Fault(f"a JSON {type(record).__name__}, not an object with a field {field!r}")
    if field not in record:
        there = ", ".join(sorted(record)) or "none"
        raise _Fault(f"no field {field!r}; set data.field to one of those there: {there}")
    try:
        text, spans = _said(record, cfg)
        text.encode()
    except UnicodeEncodeError as error:
        raise _Fault(f"field {field!r} holds half a surrogate pair, which is not text") from error
    except ConversationError as error:
        raise _Fault(f"field {field!r}: {error}") from error
    return text, spans


def _said(record: dict, cfg: DataConfig) -> tuple[str, Spans | None]:
    """The text of a record, and what of it is trained on. Raises `ConversationError`."""
    value = record[cfg.field]
    if isinstance(value, list):
        text, answers = written(value, TEMPLATES[cfg.template])
        if cfg.train_on == "spans":
            raise ConversationError('turns have no spans; set data.train_on = "answers"')
        return text, answers if cfg.train_on == "answers" else None
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
