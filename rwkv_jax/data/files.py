"""The files behind `data.source`, and the bytes inside them, compressed or not.

Everything is read in chunks, so a file larger than memory costs one chunk; a document that memory
cannot hold is an error before it is read. A `.gz` or `.zst` file must end where its last member
ends: one cut short is an error, never a shorter corpus."""

import codecs
import contextlib
import glob
import json
import os
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from rwkv_jax.errors import UserError

CHUNK = 1 << 20
COMPRESSED = (".gz", ".zst")
TABLES = (".parquet", ".arrow")
MEMORY_PER_BYTE = 50
"""Bytes of memory that it takes to tokenise a byte of a document. Measured, one text of 10 MB and
many together: 50 for a BPE of `tokenizers`, 10 to 16 for World, 10 for bytes."""


class CorpusError(UserError):
    """A source of text that cannot be read or split."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    path: Path
    name: str
    """Path relative to the source's root, with forward slashes: the same on every machine."""
    begin: int = 0
    """Of lines, only those that begin at this byte or behind it; of a Parquet file, only the groups
    of rows from this one on."""
    end: int | None = None
    """And only those before this one."""

    @property
    def compressed(self) -> bool:
        """Whether its name says that it is."""
        return self.path.suffix in COMPRESSED

    @property
    def json_lines(self) -> bool:
        """Whether each line of it is a JSON object."""
        stem = self.path.stem if self.compressed else self.path.name
        return stem.endswith(".jsonl")

    @property
    def table(self) -> bool:
        """Whether it is Parquet or Arrow, whose rows are read by `tables`."""
        return self.path.suffix in TABLES


def find_files(source: str, asked_as: str = "data.source = ") -> list[SourceFile]:
    """Files of a `data.source`, sorted by name; hidden ones are left out of folders and globs. Of a
    folder that Hugging Face's `datasets` saved, those that hold rows.

    Raises CorpusError, which begins with `asked_as` and the source, if there is none.
    """
    if source == "stdlib":
        return _stdlib()
    path = Path(source).expanduser()
    if path.is_file():
        return [SourceFile(path, path.name)]
    if path.is_dir():
        found = _saved(path) or _below(path)
    elif glob.has_magic(source):
        pattern = str(path)
        plain = next(i for i, part in enumerate(path.parts) if glob.has_magic(part))
        root = Path(*path.parts[:plain])
        paths = (Path(p) for p in glob.glob(pattern, recursive=True))
        found = [SourceFile(p, p.relative_to(root).as_posix()) for p in paths if p.is_file()]
    else:
        raise CorpusError(
            f"{asked_as}{source}: no such file or folder; give one that exists, a quoted glob,"
            " or stdlib"
        )
    if not found:
        raise CorpusError(f"{asked_as}{source}: no files there; hidden files are not read")
    return sorted(found, key=lambda file: file.name)


def _below(root: Path, suffix: str = "", without: tuple[str, ...] = ()) -> list[SourceFile]:
    """Regular files below a folder that end in `suffix`, hidden ones and folders `without` left
    out."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in without]
        for name in names:
            path = Path(folder, name)
            if name.endswith(suffix) and not name.startswith(".") and path.is_file():
                found.append(SourceFile(path, path.relative_to(root).as_posix()))
    return found


def _saved(root: Path) -> list[SourceFile]:
    """Files of `datasets.save_to_disk`, in the order of their rows; none if it made no such
    folder. Of several splits `train` is read."""
    if (splits := root / "dataset_dict.json").is_file():
        names = _described(splits, "splits")
        if "train" not in names:
            raise CorpusError(
                f"{root}: its splits are {', '.join(map(str, names))}, and none is train; name one:"
                f" {root / str(names[0] if names else '')}"
            )
        return [SourceFile(file.path, f"train/{file.name}") for file in _saved(root / "train")]
    if not (state := root / "state.json").is_file() or not (root / "dataset_info.json").is_file():
        return []
    if _described(state, "_indices_files", []):
        raise CorpusError(
            f"{root}: a selection of rows, which only datasets reads; save it again after"
            " .flatten_indices()"
        )
    try:
        names = [file["filename"] for file in _described(state, "_data_files")]
    except (TypeError, KeyError) as error:
        raise CorpusError(f"{state}: names no files; save the data set again") from error
    return [SourceFile(root / name, name) for name in names]


def _described(path: Path, key: str, default: list | None = None) -> list:
    """A list in a description that `datasets` left."""
    try:
        found = json.loads(path.read_bytes()).get(key, default)
    except (OSError, ValueError, AttributeError) as error:
        raise CorpusError(f"{path}: not readable JSON; save the data set again") from error
    if not isinstance(found, list):
        raise CorpusError(f"{path}: has no list {key!r}; save the data set again")
    return found or []


def _stdlib() -> list[SourceFile]:
    root = Path(sysconfig.get_path("stdlib"))
    found = _below(root, ".py", without=("site-packages", "dist-packages"))
    if not found:
        raise CorpusError(
            f"data.source = stdlib: no .py files below {root}; name a file or a folder instead"
        )
    return sorted(found, key=lambda file: file.name)


def read_chunks(file: SourceFile, report: Callable[[int], None] | None = None) -> Iterator[bytes]:
    """The file's decompressed bytes, in pieces; `report` is told how many bytes were read from
    disk.

    Raises CorpusError if the file cannot be read, or its compressed data is broken or cut short.
    """
    # A line that begins at `begin` is known by the line end before it.
    raw = _raw_chunks(file.path, report, 0 if file.table else max(0, file.begin - 1))
    try:
        if file.path.suffix == ".gz":
            yield from _decompress(raw, lambda: zlib.decompressobj(wbits=31))
        elif file.path.suffix == ".zst":
            yield from _decompress(
                raw, zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
            )
        else:
            yield from raw
    except (zlib.error, zstandard.ZstdError) as error:
        raise CorpusError(
            f"{file.path}: not valid {file.path.suffix} data ({error}); compress it again"
        ) from error
    except EOFError as error:
        raise CorpusError(
            f"{file.path}: compressed data is cut short; copy or compress it again"
        ) from error


def _raw_chunks(
    path: Path, report: Callable[[int], None] | None = None, start: int = 0
) -> Iterator[bytes]:
    try:
        with path.open("rb") as stream:
            stream.seek(start)
            while chunk := stream.read(CHUNK):
                if report:
                    report(len(chunk))
                yield chunk
    except OSError as error:
        raise CorpusError(
            f"{path}: cannot be read ({error.strerror}); make it readable, or leave it out"
        ) from error


def _decompress(raw: Iterator[bytes], new_member: Callable) -> Iterator[bytes]:
    """Bytes of one or more concatenated gzip members or zstd frames; EOFError if the last is cut
    short."""
    member = new_member()
    for chunk in raw:
        while chunk:
            if member.eof:
                member = new_member()
            yield member.decompress(chunk)
            chunk = member.unused_data
    if not member.eof:
        raise EOFError


def read_lines(
    file: SourceFile,
    report: Callable[[int], None] | None = None,
    longest: int = sys.maxsize,
) -> Iterator[bytes]:
    """The file's lines without their line ends (`\\n` or `\\r\\n`); of a part, those that begin in
    it.

    Raises CorpusError for a line of more than `longest` bytes, before all of it is read.
    """
    place, end = max(0, file.begin - 1), sys.maxsize if file.end is None else file.end
    before = place < file.begin  # the line that begins before the part is not its own
    held, size = [], 0  # a line without its end, so far
    for chunk in read_chunks(file, report):
        *pieces, rest = chunk.split(b"\n")
        for piece in pieces:
            if place >= end:
                return
            line = b"".join([*held, piece]) if held else piece
            if not before:
                if len(line) > longest:
                    raise _too_long(f"{file.path}: byte {place:,}: a line", longest)
                yield line.removesuffix(b"\r")
            place += len(line) + 1
            held, size, before = [], 0, False
        if place >= end:
            return
        held.append(rest)
        size += len(rest)
        if size > longest and not before:
            raise _too_long(f"{file.path}: byte {place:,}: a line", longest)
    if size and not before:
        yield b"".join(held).removesuffix(b"\r")


def lines_before(file: SourceFile) -> int:
    """How many lines begin before this part of the file does."""
    # All but the first begin behind a line end.
    count, left = min(file.begin, 1), file.begin - 1
    for chunk in _raw_chunks(file.path):
        if left <= 0:
            break
        count += chunk[:left].count(b"\n")
        left -= len(chunk)
    return count


def read_whole(
    file: SourceFile,
    report: Callable[[int], None] | None = None,
    longest: int = sys.maxsize,
) -> bytes:
    """All bytes of the file; raises CorpusError, before reading them all, for more than
    `longest`."""
    pieces, size = [], 0
    for chunk in read_chunks(file, report):
        pieces.append(chunk)
        size += len(chunk)
        if size > longest:
            raise _too_long(f"{file.path}: a document", longest, ', or set data.document = "line"')
    return b"".join(pieces)


def _too_long(what: str, longest: int, otherwise: str = "") -> CorpusError:
    return CorpusError(
        f"{what} of more than {longest / 1e6:,.1f} MB, and tokenising it takes {MEMORY_PER_BYTE}"
        f" times that in memory, which is not there; split it{otherwise}"
    )


def check_length(text: str, where: str, longest: int) -> None:
    """Raises CorpusError for a text of more than `longest` characters."""
    if len(text) > longest:
        raise _too_long(f"{where}: a text", longest)


def longest_document(workers: int = 1) -> int:
    """Bytes of the longest document that each of these processes has the memory to tokenise."""
    memory = available_memory()
    return sys.maxsize if memory is None else memory // (MEMORY_PER_BYTE * workers)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take: of the machine, or of its control groups if one has
    less; None where the system does not say."""
    left = []
    with contextlib.suppress(OSError, IndexError, ValueError):
        meminfo = (root / "proc/meminfo").read_text()
        left.append(1024 * int(meminfo.split("MemAvailable:")[1].split()[0]))
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                left += _left_in_groups(root / "sys/fs/cgroup" / controllers, path, controllers)
    return max(0, min(left)) if left else None


def _left_in_groups(base: Path, path: str, controllers: str) -> Iterator[int]:
    """What a control group and those around it have left. Pages of files that nobody has used
    lately count as taken, but make way."""
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
    limit, usage, idle = (
        names if controllers else ("memory.max", "memory.current", "inactive_file ")
    )
    group = base / path.lstrip("/")
    for folder in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
            most, taken = (int((folder / name).read_text()) for name in (limit, usage))
            with contextlib.suppress(OSError, IndexError):
                statistics = "\n" + (folder / "memory.stat").read_text()
                taken -= int(statistics.split("\n" + idle)[1].split()[0])
            yield most - taken
        if folder == base:
            break


def hash_text(file: SourceFile, digest: Any = None) -> str | None:
    """Feed the file's bytes to `digest`; None if they are UTF-8 text without NULs, else what is
    wrong with them.

    JSON lines and tables are hashed as they lie on disk and not looked into: reading them reports a
    fault by its line or row."""
    if file.json_lines or file.table:
        for chunk in _raw_chunks(file.path) if digest else ():
            digest.update(chunk)
        return None
    decoder, length, fault = codecs.getincrementaldecoder("utf-8")(), 0, None
    for chunk in read_chunks(file):
        if digest:
            digest.update(chunk)
        if fault is None:
            fault = _fault(decoder, chunk, length)
        length += len(chunk)
    return fault or _fault(decoder, b"", length, final=True)


def _fault(
    decoder: codecs.IncrementalDecoder, chunk: bytes, start: int, final: bool = False
) -> str | None:
    held_back = len(decoder.getstate()[0])
    try:
        decoder.decode(chunk, final)
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {start - held_back + error.start}"
    return f"a NUL at byte {start + chunk.index(0)}" if 0 in chunk else None
