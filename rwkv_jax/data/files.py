"""The files behind `data.source`, and the bytes inside them, compressed or not.

Everything is read in chunks, so a file larger than memory costs one chunk. A `.gz` or `.zst` file
must end where its last member ends: one cut short is an error, never a shorter corpus."""

import codecs
import glob
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

from rwkv_jax.errors import UserError

CHUNK = 1 << 20
COMPRESSED = (".gz", ".zst")


class CorpusError(UserError):
    """A source of text that cannot be read or split."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    path: Path
    name: str
    """Path relative to the source's root, with forward slashes: the same on every machine."""

    @property
    def compressed(self) -> bool:
        """Whether its name says that it is."""
        return self.path.suffix in COMPRESSED

    @property
    def json_lines(self) -> bool:
        """Whether each line of it is a JSON object."""
        stem = self.path.stem if self.compressed else self.path.name
        return stem.endswith(".jsonl")


def find_files(source: str) -> list[SourceFile]:
    """Files of a `data.source`, sorted by name; hidden ones are left out of folders and globs.

    Raises CorpusError if there is none.
    """
    if source == "stdlib":
        return _stdlib()
    path = Path(source).expanduser()
    if path.is_file():
        return [SourceFile(path, path.name)]
    if path.is_dir():
        found = _below(path)
    elif glob.has_magic(source):
        pattern = str(path)
        plain = next(i for i, part in enumerate(path.parts) if glob.has_magic(part))
        root = Path(*path.parts[:plain])
        paths = (Path(p) for p in glob.glob(pattern, recursive=True))
        found = [SourceFile(p, p.relative_to(root).as_posix()) for p in paths if p.is_file()]
    else:
        raise CorpusError(
            f"data.source = {source}: no such file or folder; give one that exists, a quoted glob,"
            " or stdlib"
        )
    if not found:
        raise CorpusError(f"data.source = {source}: no files there; hidden files are not read")
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
    raw = _raw_chunks(file.path, report)
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


def _raw_chunks(path: Path, report: Callable[[int], None] | None = None) -> Iterator[bytes]:
    try:
        with path.open("rb") as stream:
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


def read_lines(file: SourceFile, report: Callable[[int], None] | None = None) -> Iterator[bytes]:
    """The file's lines without their line ends (`\\n` or `\\r\\n`)."""
    rest = b""
    for chunk in read_chunks(file, report):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r")
    if rest:
        yield rest.removesuffix(b"\r")


def hash_text(file: SourceFile, digest) -> str | None:
    """Feed the file's bytes to `digest`; None if they are UTF-8 text without NULs, else what is
    wrong with them.

    JSON lines are hashed as they lie on disk and not looked into: reading them reports a fault by
    its line."""
    if file.json_lines:
        for chunk in _raw_chunks(file.path):
            digest.update(chunk)
        return None
    decoder, length, fault = codecs.getincrementaldecoder("utf-8")(), 0, None
    for chunk in read_chunks(file):
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
