"""Documents: the text of a `data.source`, cut into training and held-out documents.

A document is a file (`data.document = "file"`), a line (`"line"`), or a record of JSON or of a
table (`records.py`). A document is held out if the BLAKE2b hash of its name (for lines and records:
of its text, so that equal ones stay together) falls below `data.heldout`: adding a document moves
no other, and no random state is involved. Of a single plain file that is one
document, the last `data.heldout` share is held out, from the start of a line.

Only UTF-8 is read. A file in another encoding (PEP 263 allows that in Python sources: 4 of Python
3.11's 1,790) or with NULs is skipped in a folder and counted, never guessed at; named by its own
path, it is an error."""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rwkv_jax.config import DataConfig
from rwkv_jax.data.conversations import ConversationError, Spans
from rwkv_jax.data.files import (
    JSON_LINES,
    CorpusError,
    Report,
    SourceFile,
    check_length,
    find_files,
    json_problem,
    lines_before,
    longest_document,
    read_lines,
    read_values,
    read_whole,
    text_problem,
    unreported,
)
from rwkv_jax.data.records import (
    MORE_FIELDS,
    TEXT,
    LeftOut,
    NoTextError,
    field_of,
    fields_of,
    has_fields,
    text_of,
)
from rwkv_jax.data.tables import columns_of, read_rows

Record = tuple[int, Any]
"""The number of a line or row, and what it holds."""


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
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Why files were left out -> how many."""
    bytes_on_disk: int = 0
    fingerprint: str = ""
    """Hash of every file's name and content, and of the settings that decide the documents."""
    longest: int = sys.maxsize
    """The most bytes that a document may have."""

    def documents(
        self, report: Report = unreported, left_out: LeftOut | None = None
    ) -> Iterator[Document]:
        """Non-empty documents in the order of the files.

        Records without a text are counted in `left_out`; without it the first one is an error.
        Raises CorpusError naming file and line of what cannot be read.
        """
        left_out = left_out or LeftOut(strict=True)
        for file in self.files:
            if file.kind != "text":
                yield from self._records(file, report, left_out)
            elif self.cfg.train_on != "all":
                raise CorpusError(
                    f"{file.path}: data.train_on = {self.cfg.train_on!r} needs JSON lines or a"
                    ' table, which say what is trained on; give one, or set it to "all"'
                )
            elif self.cfg.document == "line":
                for number, line in enumerate(read_lines(file, report, self.longest), 1):
                    yield from self._one(file, number, _decoded(line, file, number))
            else:
                yield from self._whole(file, report)

    def _one(
        self, file: SourceFile, number: int, text: str, spans: Spans | None = None
    ) -> Iterator[Document]:
        """The document of a line or row, unless it is empty."""
        if text:
            yield Document(
                f"{file.name}:{number}", text, hash_share(text) < self.cfg.heldout, spans
            )

    def _whole(self, file: SourceFile, report: Report) -> Iterator[Document]:
        text = _decoded(read_whole(file, report, self.longest), file)
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

    def _records(self, file: SourceFile, report: Report, left_out: LeftOut) -> Iterator[Document]:
        cfg = with_field(self.cfg, [file])
        reading = _read_records(file, cfg, report, self.longest)
        for count, (number, record) in enumerate(reading, 1):
            left_out.records += 1
            try:
                text, spans = text_of(record, cfg)
            except NoTextError as error:
                left_out.add(_place(file, number, count), error)
                continue
            except ConversationError as error:
                raise CorpusError(f"{_place(file, number, count)}: {error}") from error
            if file.kind != "lines":  # whose lines are short enough
                check_length(text, _place(file, number, count), self.longest)
            yield from self._one(file, number, text, spans)

    @property
    def single_document(self) -> bool:
        """Whether the source is one file that is one document."""
        return (
            self.cfg.document == "file"
            and len(self.files) == 1
            and self.files[0].kind == "text"
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
    found = find_files(cfg.source, plain=not cfg.field)
    check_field(cfg, found)
    files, skipped, size = [], {}, 0
    content = hashlib.blake2b(digest_size=16)
    for file in found:
        digest = hashlib.blake2b(digest_size=16)
        if reason := skip_reason(file, cfg, digest):
            skipped[reason] = skipped.get(reason, 0) + 1
            continue
        files.append(file)
        size += file.path.stat().st_size
        kind = "json" if file.kind == "json" else file.kind == "lines"
        content.update(json.dumps([file.name, kind, digest.hexdigest()]).encode())
    if not files:
        why = "; ".join(f"{count} are {reason}" for reason, count in skipped.items())
        raise CorpusError(f"data.source = {cfg.source}: none of its files can be read: {why}")
    named = names_file(cfg.source)
    settings = [cfg.field, cfg.document, cfg.heldout, named, cfg.train_on, cfg.template]
    settings += ["special tokens"] if cfg.special_tokens else []  # older caches stay valid
    newer = cfg.train_on == "answers" or (cfg.template == "flower" and cfg.field != TEXT)
    settings += ["stops"] if newer and cfg.train_stops else []
    settings += ["heldout mask"] if cfg.train_on != "all" else []
    content.update(json.dumps(settings).encode())
    longest = longest_document() if longest is None else longest
    return Corpus(cfg, tuple(files), skipped, size, content.hexdigest(), longest)


def with_field(cfg: DataConfig, files: Iterable[SourceFile]) -> DataConfig:
    """The config with the field that the records of the files have (`field_of`), if it is the same
    for all of them that have one."""
    records = [_first_record(file, cfg) for file in files if file.kind != "text"]
    fields = {field_of(record, cfg.field) for record in records}
    fields = {x for x in fields if any(has_fields(record, x) for record in records)}
    return replace(cfg, field=fields.pop()) if len(fields) == 1 else cfg


def check_field(cfg: DataConfig, files: Iterable[SourceFile]) -> None:
    """Raises CorpusError if a field is named and none of the files has records."""
    if cfg.field not in ("", TEXT) and all(file.kind == "text" for file in files):
        raise CorpusError(
            f"data.field = {cfg.field}: {cfg.source} has no fields: it is plain text; leave"
            " data.field out, or give JSON or a table"
        )


def _first_record(file: SourceFile, cfg: DataConfig) -> Any:
    """The first record of a file that is not null, or something with its fields; None if there is
    none, or it cannot be read. The same for every part of the file."""
    file = replace(file, begin=0, end=None)
    try:
        if file.kind == "table":
            return dict.fromkeys(columns_of(file))
        return next((x for _, x in _read_records(file, cfg) if x is not None), None)
    except CorpusError:  # reading all of it will say why
        return None


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
        if named or file.compression:
            raise
        problem = "cannot be read"
    if problem and named:
        raise CorpusError(f"{file.path}: {problem}; convert it to UTF-8 text first")
    if problem:
        return UNREADABLE
    # Among texts there are often some JSON files for other purposes.
    if not named and file.kind in ("lines", "json") and not file.plain_name.endswith(JSON_LINES):
        record = _first_record(file, cfg)
        if not has_fields(record, field_of(record, cfg.field)):
            return f"JSON without a field {cfg.field!r}"
    return None


UNREADABLE = "not readable UTF-8 text"
"""Why most files that are skipped are."""


def _read_records(
    file: SourceFile,
    cfg: DataConfig,
    report: Report = unreported,
    longest: int = sys.maxsize,
) -> Iterator[Record]:
    """The records of JSON or a table. Raises CorpusError with file and line of what is neither."""
    if file.kind == "table":
        first, *more = fields_of(cfg.field)
        more += [x for x in MORE_FIELDS if x != first]
        yield from read_rows(file, first, *more, report=report)
    elif file.kind == "json":
        yield from read_values(file, report, longest)
    else:
        for number, line in enumerate(read_lines(file, report, longest), 1):
            if line.strip():
                try:
                    yield number, json.loads(_decoded(line, file, number).removeprefix("\ufeff"))
                except (ValueError, RecursionError) as error:
                    if isinstance(error, CorpusError):
                        raise
                    place = _place(file, number)
                    raise CorpusError(f"{place}: {json_problem(error)}") from error


def _place(file: SourceFile, number: int, count: int = 0) -> str:
    """Where a record is; the lines before a part of a file are counted only for this. Of an array,
    which may be one line, also how many records there are up to it."""
    before = lines_before(file) if file.kind != "table" and file.begin else 0
    record = f" (record {count:,})" if file.kind == "json" and count else ""
    return f"{file.path}:{before + number}{record}"


def _decoded(data: bytes, file: SourceFile, number: int = 0) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        place = _place(file, number) if number else file.path
        raise CorpusError(
            f"{place}: not UTF-8 ({error.reason}); convert it to UTF-8 text first"
        ) from error
