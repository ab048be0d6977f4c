"""The files behind `data.source`, and the bytes inside them, compressed or not.

Everything is read in chunks, so a file larger than memory costs one chunk; a document that does not
fit in memory is an error before it is read. A `.gz` or `.zst` file must end where its last member
ends: a truncated one is an error, never a shorter corpus."""

import codecs
import contextlib
import glob
import itertools
import json
import os
import re
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import zstandard

from rwkv_jax import disk
from rwkv_jax.errors import UserError

CHUNK = 1 << 20
BOM = codecs.BOM_UTF8
"""The mark that some editors put at the start of a file; it is no part of the text."""
COMPRESSED = (".gz", ".zst")
TABLES = (".parquet", ".arrow")
JSON, JSON_LINES = ".json", (".jsonl", ".ndjson", ".jsonlines")
HEAD = 1 << 16
"""Bytes at the start of a file that say what is in it."""
CUT = 16
"""Characters at the end of a JSON text in which an error may come from its being cut."""
MEMORY_PER_BYTE = 50
"""Bytes of memory needed to tokenise a byte of a document. Measured with one text of 10 MB and with
many small ones: 50 for a BPE of `tokenizers`, 10 to 16 for World, 10 for bytes."""

Report = Callable[[int], None]
"""Called now and then with the number of bytes read from disk since the last call."""


def unreported(count: int) -> None:
    """A `Report` that does nothing."""


class CorpusError(UserError):
    """A source of text that cannot be read or split."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    path: Path
    name: str
    """Path relative to the source's root, with forward slashes: the same on every machine."""
    begin: int = 0
    """Only the lines that start at this byte or later; of a Parquet file, only the row groups from
    this index on."""
    end: int | None = None
    """Only the lines or row groups before this one."""
    kind: Literal["text", "lines", "json", "table"] = "text"
    """Plain text; JSON `lines`, an object each; `json`, an array of objects, or objects of several
    lines; a `table` (Parquet, Arrow), whose rows are read by `tables`."""

    @property
    def compression(self) -> str:
        """`.gz`, `.zst` or empty."""
        suffix = self.path.suffix.lower()
        return suffix if suffix in COMPRESSED else ""

    @property
    def plain_name(self) -> str:
        """Its own name in small letters, without the ending of a compression."""
        return self.path.name.lower().removesuffix(self.compression)


def find_files(
    source: str, setting: str = "data.source = ", *, plain: bool = False
) -> list[SourceFile]:
    """The files of a `data.source`, sorted by name, without hidden ones in folders and globs. Of a
    folder that Hugging Face's `datasets` saved, the files that hold rows. With `plain`, JSON is
    text like any other.

    Raises CorpusError, which begins with `setting` and the source, if there are none.
    """
    if source == "stdlib":
        return _stdlib()
    found = _find(source, setting)
    return [file if plain and not _is_table(file) else with_kind(file) for file in found]


def _find(source: str, setting: str) -> list[SourceFile]:
    """`find_files`, of no kind yet."""
    path = Path(source).expanduser()
    if path.is_file():
        return [SourceFile(path, path.name)]
    if re.match(r"[a-z][a-z0-9+.-]+://", source):
        raise CorpusError(
            f"{setting}{source}: URLs are not read; copy the data to this machine (hf download,"
            " gcloud storage cp, curl) and name the copy"
        )
    if path.is_dir():
        found = _saved_dataset(path) or _walk(path)
    elif glob.has_magic(source):
        pattern = str(path)
        plain = next(i for i, part in enumerate(path.parts) if glob.has_magic(part))
        root = Path(*path.parts[:plain])
        paths = (Path(p) for p in glob.glob(pattern, recursive=True))
        found = [SourceFile(p, p.relative_to(root).as_posix()) for p in paths if p.is_file()]
    else:
        raise CorpusError(
            f"{setting}{source}: no such file or folder; give one that exists, a quoted glob,"
            " or stdlib"
        )
    if not found:
        raise CorpusError(f"{setting}{source}: no files in it; hidden files are not read")
    return sorted(found, key=lambda file: file.name)


def with_kind(file: SourceFile) -> SourceFile:
    """The file with its `kind`: by its ending, and by how it begins, as JSON has many endings."""
    if _is_table(file):
        return replace(file, kind="table")
    head = _head(file)
    lines, array = file.plain_name.endswith(JSON_LINES), head.startswith("[")
    if not lines and not file.plain_name.endswith(JSON) and not _is_json(head):
        return file
    whole_line = lines or _begins_with_object(head.partition("\n")[0])
    return replace(file, kind="lines" if whole_line and not array else "json")


def _is_table(file: SourceFile) -> bool:
    return file.plain_name.endswith(TABLES)


def _head(file: SourceFile) -> str:
    """How a file begins, without blanks; empty if it cannot be read."""
    try:
        start = b""
        for chunk in read_chunks(file, size=HEAD):
            start = (start + chunk)[:HEAD]
            if len(start) == HEAD:
                break
    except CorpusError:
        return ""
    return start.removeprefix(BOM).decode(errors="replace").lstrip()


def _is_json(head: str) -> bool:
    """Whether a text begins as objects do, one alone or in an array, and nothing else follows."""
    begins = re.match(r'\[?\s*(?=\{\s*["}])', head)
    if not begins:
        return False
    try:
        first, end = _JSON.raw_decode(head, begins.end())
    except (ValueError, RecursionError) as error:
        return _is_cut(error, head)
    return isinstance(first, dict) and head[_after_blanks(head, end) :][:1] in ("", "{", ",", "]")


def _begins_with_object(text: str) -> bool:
    """Whether a text begins with a whole JSON object."""
    try:
        return isinstance(_JSON.raw_decode(text)[0], dict)
    except (ValueError, RecursionError):
        return False


def _walk(root: Path, suffix: str = "", without: tuple[str, ...] = ()) -> list[SourceFile]:
    """Regular files below a folder that end in `suffix`, except hidden files and folders, and
    folders named in `without`."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in without]
        for name in names:
            path = Path(folder, name)
            if name.endswith(suffix) and not name.startswith(".") and path.is_file():
                found.append(SourceFile(path, path.relative_to(root).as_posix()))
    return found


def _saved_dataset(root: Path) -> list[SourceFile]:
    """Files of `datasets.save_to_disk` in the order of their rows; none if the folder is not one of
    these. Of several splits, `train` is read."""
    if (splits := root / "dataset_dict.json").is_file():
        names = _json_list(splits, "splits")
        if "train" not in names:
            raise CorpusError(
                f"{root}: its splits are {', '.join(map(str, names))}, and none is train; name one:"
                f" {root / str(names[0] if names else '')}"
            )
        return [
            SourceFile(file.path, f"train/{file.name}") for file in _saved_dataset(root / "train")
        ]
    if not (state := root / "state.json").is_file() or not (root / "dataset_info.json").is_file():
        return []
    if _json_list(state, "_indices_files", []):
        raise CorpusError(
            f"{root}: a selection of rows, which only datasets can read; save it again after"
            " .flatten_indices()"
        )
    try:
        names = [file["filename"] for file in _json_list(state, "_data_files")]
    except (TypeError, KeyError) as error:
        raise CorpusError(f"{state}: names no files; save the data set again") from error
    return [SourceFile(root / name, name) for name in names]


def _json_list(path: Path, key: str, default: list | None = None) -> list:
    """The list under `key` in a JSON file that `datasets` wrote."""
    try:
        found = json.loads(path.read_bytes()).get(key, default)
    except (OSError, ValueError, AttributeError) as error:
        raise CorpusError(f"{path}: not readable JSON; save the data set again") from error
    if not isinstance(found, list):
        raise CorpusError(f"{path}: has no list {key!r}; save the data set again")
    return found or []


def _stdlib() -> list[SourceFile]:
    root = Path(sysconfig.get_path("stdlib"))
    found = _walk(root, ".py", without=("site-packages", "dist-packages"))
    if not found:
        raise CorpusError(
            f"data.source = stdlib: no .py files below {root}; name a file or a folder instead"
        )
    return sorted(found, key=lambda file: file.name)


def read_chunks(
    file: SourceFile, report: Report = unreported, size: int | None = None
) -> Iterator[bytes]:
    """The file's decompressed bytes, in chunks, `size` bytes of the file (`CHUNK`) at a time.

    Raises CorpusError if the file cannot be read, or its compressed data is broken or truncated.
    """
    # A line that starts at `begin` is recognised by the line end before it.
    start = 0 if file.kind == "table" else max(0, file.begin - 1)
    raw = _raw_chunks(file.path, report, start, size)
    try:
        if file.compression == ".gz":
            yield from _decompress(raw, lambda: zlib.decompressobj(wbits=31), b"\0")
        elif file.compression == ".zst":
            yield from _decompress(
                raw, zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
            )
        else:
            yield from raw
    except (zlib.error, zstandard.ZstdError) as error:
        raise CorpusError(
            f"{file.path}: not valid {file.compression} data ({error}); compress it again"
        ) from error
    except EOFError as error:
        raise CorpusError(
            f"{file.path}: compressed data is truncated; copy or compress it again"
        ) from error


def _raw_chunks(
    path: Path, report: Report = unreported, start: int = 0, size: int | None = None
) -> Iterator[bytes]:
    with (
        disk.reading(path, "make it readable, or leave it out", CorpusError),
        path.open("rb") as stream,
    ):
        stream.seek(start)
        while chunk := stream.read(size or CHUNK):
            report(len(chunk))
            yield chunk


def _decompress(
    raw: Iterator[bytes], new_member: Callable, padding: bytes = b""
) -> Iterator[bytes]:
    """Bytes of one or more concatenated gzip members or zstd frames, with any `padding` after each;
    EOFError if the last one is truncated."""
    member = new_member()
    for chunk in raw:
        while chunk:
            if member.eof:
                chunk = chunk.lstrip(padding)
                if not chunk:
                    break
                member = new_member()
            yield member.decompress(chunk)
            chunk = member.unused_data
    if not member.eof:
        raise EOFError


def read_lines(
    file: SourceFile, report: Report = unreported, longest: int = sys.maxsize
) -> Iterator[bytes]:
    """The file's lines without their line ends (`\\n` or `\\r\\n`), the first without a byte-order
    mark; of a part, the lines that start in it.

    Raises CorpusError for a line of more than `longest` bytes, before all of it is read.
    """
    place, end = max(0, file.begin - 1), sys.maxsize if file.end is None else file.end
    before = place < file.begin  # a line that starts before the part belongs to the part before
    held, size = [], 0  # the line read so far, whose end is in a later chunk
    for chunk in read_chunks(file, report):
        *pieces, rest = chunk.split(b"\n")
        for piece in pieces:
            if place >= end:
                return
            line = b"".join([*held, piece]) if held else piece
            if not before:
                if len(line) > longest:
                    raise _too_long(f"{file.path}: byte {place:,}: a line", longest)
                yield _plain(line, place)
            place += len(line) + 1
            held, size, before = [], 0, False
        if place >= end:
            return
        held.append(rest)
        size += len(rest)
        if size > longest and not before:
            raise _too_long(f"{file.path}: byte {place:,}: a line", longest)
    if size and not before:
        yield _plain(b"".join(held), place)


def _plain(line: bytes, place: int) -> bytes:
    return (line if place else line.removeprefix(BOM)).removesuffix(b"\r")


def read_values(
    file: SourceFile, report: Report = unreported, longest: int = sys.maxsize
) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON array, or the JSON values that follow one another, each with the line
    that it starts in.

    Raises CorpusError for what is not JSON or not UTF-8, a file that is cut, and a value of more
    than `longest` characters.
    """
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    text, line, read = "", 1, 0
    started = array = closed = False
    for chunk in itertools.chain(read_chunks(file, report), [b""]):
        try:
            text += decode(chunk, not chunk)
        except UnicodeDecodeError as error:
            raise CorpusError(f"{file.path}: not UTF-8 at byte {read + error.start}") from None
        read, at, counted = read + len(chunk), 0, 0
        while (at := _after_blanks(text, at)) < len(text):
            line, counted = line + text.count("\n", counted, at), at
            if text[at] == "[" and (closed or not started):
                started, array, closed = True, True, False
                at += 1
            elif array and text[at] in ",]":
                closed = text[at] == "]"
                at += 1
            else:
                try:
                    value, end = _JSON.raw_decode(text, at)
                except (ValueError, RecursionError) as error:
                    if chunk and _is_cut(error, text):
                        break  # its rest is in a later chunk
                    raise CorpusError(f"{file.path}:{line}: {json_problem(error)}") from None
                started = True
                yield line, value
                at = end
        if len(text) - at > longest:
            raise _too_long(f"{file.path}:{line}: a value", longest)
        line, text = line + text.count("\n", counted, at), text[at:]
    if array and not closed:
        raise CorpusError(f"{file.path}: ends inside its array: it is cut; copy it again")


def json_problem(error: Exception) -> str:
    """What is wrong with a text that is not JSON, or beyond Python's limits."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg}, column {error.colno}); correct the line"
    return f"JSON that cannot be read ({error}); correct the line"


def _is_cut(error: Exception, text: str) -> bool:
    """Whether an error in a JSON text may come from its being cut."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos > len(text) - CUT


def _after_blanks(text: str, at: int) -> int:
    return _BLANKS.match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]


_JSON, _BLANKS = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")


def lines_before(file: SourceFile) -> int:
    """The number of lines that start before this part of the file."""
    # Every line but the first starts after a line end.
    count, left = min(file.begin, 1), file.begin - 1
    for chunk in _raw_chunks(file.path):
        if left <= 0:
            break
        count += chunk[:left].count(b"\n")
        left -= len(chunk)
    return count


def read_whole(file: SourceFile, report: Report = unreported, longest: int = sys.maxsize) -> bytes:
    """All bytes of the file, without a byte-order mark. Raises CorpusError for more than `longest`,
    before reading them all."""
    pieces, size = [], 0
    for chunk in read_chunks(file, report):
        pieces.append(chunk)
        size += len(chunk)
        if size > longest:
            raise _too_long(f"{file.path}: a document", longest, ', or set data.document = "line"')
    return b"".join(pieces).removeprefix(BOM)


def _too_long(what: str, longest: int, otherwise: str = "") -> CorpusError:
    return CorpusError(
        f"{what} of more than {longest / 1e6:,.1f} MB: tokenising it takes {MEMORY_PER_BYTE} times"
        f" as much memory, which is not available; split it{otherwise}"
    )


def check_length(text: str, where: str, longest: int) -> None:
    """Raises CorpusError for a text of more than `longest` characters."""
    if len(text) > longest:
        raise _too_long(f"{where}: a text", longest)


def longest_document(workers: int = 1) -> int:
    """Bytes of the longest document that each of `workers` processes has the memory to tokenise."""
    memory = available_memory()
    return sys.maxsize if memory is None else memory // (MEMORY_PER_BYTE * workers)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still allocate: what the machine has free, or its control groups
    if that is less; None where the system does not say."""
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
    """Bytes left in a control group and in each of its parents. Cached pages of files count as used
    but are reclaimed on demand, so the inactive ones are added."""
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
    limit, usage, inactive = (
        names if controllers else ("memory.max", "memory.current", "inactive_file ")
    )
    group = base / path.lstrip("/")
    for folder in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
            most, used = (int((folder / name).read_text()) for name in (limit, usage))
            with contextlib.suppress(OSError, IndexError):
                statistics = "\n" + (folder / "memory.stat").read_text()
                used -= int(statistics.split("\n" + inactive)[1].split()[0])
            yield most - used
        if folder == base:
            break


def text_problem(file: SourceFile, digest: Any = None) -> str | None:
    """Why the file is not UTF-8 text without NULs, or None; its bytes are fed to `digest`.

    JSON and tables are hashed as they are on disk and not checked: reading them reports an error
    with its line or row."""
    if file.kind != "text":
        for chunk in _raw_chunks(file.path) if digest else ():
            digest.update(chunk)
        return None
    decoder, length, problem = codecs.getincrementaldecoder("utf-8")(), 0, None
    for chunk in read_chunks(file):
        if not length and chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            problem = "UTF-16, not UTF-8"
        if digest:
            digest.update(chunk)
        if problem is None:
            problem = _chunk_problem(decoder, chunk, length)
        length += len(chunk)
    return problem or _chunk_problem(decoder, b"", length, final=True)


def _chunk_problem(
    decoder: codecs.IncrementalDecoder, chunk: bytes, start: int, final: bool = False
) -> str | None:
    held_back = len(decoder.getstate()[0])
    try:
        decoder.decode(chunk, final)
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {start - held_back + error.start}"
    return f"a NUL at byte {start + chunk.index(0)}" if 0 in chunk else None
