"""The format of token files, that of the official trainers: a pair `PREFIX.bin` and `PREFIX.idx`
("binidx").

`.bin` holds all tokens. `.idx`, little-endian, divides them into items and documents:

    9 bytes "MMIDIDX\\0\\0", u64 version = 1, u8 code of the tokens' type, u64 items, u64 marks
    i32 number of tokens of each item, i64 byte of `.bin` at which each item starts
    i64 marks: the first item of each document and, last, the number of items

Source: `MMapIndexedDataset` of NVIDIA's Megatron-LM; RWKV-LM's `make_data.py` writes the same, one
item a document, and so does the writer here. No file is held in memory: files are mapped to be
read, and checked, written and merged a few MB at a time. An `.idx` appears once its whole pair is
on disk.
"""

import contextlib
import glob
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rwkv_jax import disk
from rwkv_jax.data.files import CorpusError, Report, unreported

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\0\0"
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
FLOATS = (6, 7)
CODES = {np.dtype(name): code for code, name in DTYPES.items()}
LONGEST = 2**31 - 1
"""The most tokens of an item: sizes are int32."""
ROWS = 1 << 20
"""Entries of an index processed at a time."""
COPY_BYTES = 1 << 26
COPY = "copy it again"
"""The remedy for a file that did not arrive whole."""

Ids = Sequence[int] | np.ndarray


@dataclass(frozen=True, eq=False)
class Binidx:
    """A checked pair, memory-mapped.

    path       without `.bin` and `.idx`
    tokens     all of `.bin`
    sizes      the number of tokens of each item
    pointers   the byte of `.bin` at which each item starts
    documents  the first item of each document and, last, the number of items
    """

    path: Path
    tokens: np.ndarray
    sizes: np.ndarray
    pointers: np.ndarray
    documents: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """int64 [documents + 1]: token at which each document starts and, last, where they end."""
        starts = np.full(len(self.documents), len(self.tokens), np.int64)
        inside = self.documents < len(self.sizes)
        starts[inside] = self.pointers[self.documents[inside]] // self.tokens.itemsize
        return starts


def is_binidx(source: str) -> bool:
    """Whether a `data.source` names a pair, by its `.bin`, its `.idx` or their common prefix.

    A file or folder of exactly that name, or a glob, is not a pair.
    """
    path = Path(source).expanduser()
    if path.is_dir() or glob.has_magic(source):
        return False
    if path.suffix in (".bin", ".idx"):
        return True
    return not path.exists() and all(file.is_file() for file in files_of(path))


def files_of(path: Path) -> tuple[Path, Path]:
    """`.bin` and `.idx` of a pair named by either, or by their prefix."""
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """The type in which the official tools store tokens of a vocabulary."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<i4")


def open_binidx(path: str | Path) -> Binidx:
    """The pair named by its `.bin`, its `.idx` or their prefix; all of its index is checked.

    Items have to follow each other and fill `.bin`, so that its tokens are those of its documents.
    Raises CorpusError, which names file and place, for anything else.
    """
    data, index = files_of(Path(path).expanduser())
    for file, other in ((data, index), (index, data)):
        if not file.is_file():
            raise CorpusError(
                f"{file}: no such file; a pair is .bin and .idx: put this one beside {other.name}"
            )
    with disk.reading(index, "make it readable", CorpusError):
        pair = _map_pair(data, index)
        _check_items(pair, data, index)
        _check_documents(pair, index)
        return pair


def _damaged(file: Path, problem: str, remedy: str = "create the pair again") -> CorpusError:
    return CorpusError(f"{file}: {problem}; {remedy}")


def _map_pair(data: Path, index: Path) -> Binidx:
    with index.open("rb") as stream:
        head = stream.read(HEADER.size)
    if len(head) < HEADER.size:
        raise _damaged(index, f"ends at byte {len(head)}, inside its header of {HEADER.size}", COPY)
    magic, version, code, items, marks = HEADER.unpack(head)
    if magic != MAGIC:
        problem = f"not a binidx index: its first bytes are {magic!r}, not {MAGIC!r}"
        raise _damaged(index, problem, "create the pair with: python -m rwkv_jax tokenize")
    if version != 1:
        raise _damaged(index, f"byte 9: version {version}, only 1 is known")
    if code not in DTYPES:
        kind = "floating-point numbers, not tokens" if code in FLOATS else "of an unknown type"
        known = ", ".join(f"{code} ({np.dtype(name).name})" for code, name in DTYPES.items())
        remedy = f"create the pair again with one of {known}"
        raise _damaged(index, f"byte 17: items are {kind} (code {code})", remedy)
    size, expected = index.stat().st_size, HEADER.size + 12 * items + 8 * marks
    if size != expected:
        wrong = "truncated" if size < expected else "too long"
        found = f"{items:,} items with {marks:,} document marks"
        raise _damaged(index, f"{wrong}: {size:,} bytes, but {found} take {expected:,}", COPY)
    dtype = np.dtype(DTYPES[code])
    tokens, rest = divmod(data.stat().st_size, dtype.itemsize)
    if rest:
        place = f"byte {data.stat().st_size:,}, inside a token of {dtype.itemsize} bytes"
        raise _damaged(data, f"truncated at {place}", COPY)
    return Binidx(
        data.with_suffix(""),
        map_array(data, dtype, tokens),
        map_array(index, "<i4", items, HEADER.size),
        map_array(index, "<i8", items, HEADER.size + 4 * items),
        map_array(index, "<i8", marks, HEADER.size + 12 * items),
    )


def map_array(path: Path, dtype: Any, count: int, offset: int = 0) -> np.ndarray:
    """Numbers of a file, mapped read-only."""
    if not count:
        return np.zeros(0, dtype)  # an empty range cannot be mapped
    return np.memmap(path, dtype, mode="r", offset=offset, shape=(count,))


def _check_items(pair: Binidx, data: Path, index: Path) -> None:
    """Items have sizes, follow each other and fill `.bin`."""
    end, width, length = 0, pair.tokens.itemsize, pair.tokens.nbytes
    for first in range(0, len(pair.sizes), ROWS):
        sizes = pair.sizes[first : first + ROWS].astype(np.int64)
        if (bad := np.flatnonzero(sizes < 0)).size:
            item, size = first + bad[0], sizes[bad[0]]
            raise _damaged(index, f"item {item:,} has {size:,} tokens")
        ends = end + width * np.cumsum(sizes)
        begins = ends - width * sizes
        found = pair.pointers[first : first + ROWS]
        if (bad := np.flatnonzero(found != begins)).size:
            item, pointer, expected = first + bad[0], int(found[bad[0]]), int(begins[bad[0]])
            place = f"byte {pointer:,} of {data.name}{_misplaced(pointer, expected, width, length)}"
            before = f"the items before it end at {expected:,}"
            raise _damaged(index, f"item {item:,} begins at {place}, but {before}")
        end = int(ends[-1])
        if end > length:
            item = first + np.searchsorted(ends, length, "right")
            place = f"item {item:,} ends at byte {ends[item - first]:,}"
            raise _damaged(data, f"truncated: {length:,} bytes, but {place}", COPY)
    if end < length:
        problem = f"{length:,} bytes, but the items of {index.name} end at byte {end:,}"
        raise _damaged(data, f"{problem}: the files do not match", "copy both again")


def _misplaced(pointer: int, expected: int, width: int, length: int) -> str:
    if pointer % width:
        return f", inside a token of {width} bytes"
    if not 0 <= pointer <= length:
        return f", outside its {length:,}"
    return ", inside another" if pointer < expected else ", after bytes of no item"


def _check_documents(pair: Binidx, index: Path) -> None:
    """Marks begin at 0, never decrease, and end at the number of items; an empty document ends
    where it starts."""
    marks, items = pair.documents, len(pair.sizes)
    if not len(marks) or marks[0]:
        found = f"begin at item {marks[0]:,}, not 0" if len(marks) else "are missing"
        raise _damaged(index, f"its document marks {found}")
    for first in range(0, len(marks), ROWS):
        some = marks[first : first + ROWS + 1]  # and the next one's first
        if (bad := np.flatnonzero(some > items)).size:
            place = f"item {some[bad[0]]:,} of {items:,}"
            raise _damaged(index, f"document {first + bad[0]:,} begins at {place}")
        if (bad := np.flatnonzero(some[1:] < some[:-1])).size:
            at = bad[0] + 1
            place = f"item {some[at]:,}, before the last one at {some[at - 1]:,}"
            raise _damaged(index, f"document {first + at:,} begins at {place}")
    if marks[-1] != items:
        raise _damaged(index, f"its documents end at item {marks[-1]:,} of {items:,}")


class BinidxWriter:
    """Writes a pair, one item a document, which appears at the end of the `with` block.

    Until then the files end in `.partial`; an exception removes them and leaves an older pair as it
    was. Raises CorpusError for ids that the type cannot hold, and OSError.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with BinidxWriter(f"{folder}/two", np.uint16) as writer:
    ...         writer.add([5, 6, 0])
    ...         writer.add([7], [0])
    ...     pair = open_binidx(f"{folder}/two")
    ...     pair.tokens.tolist(), pair.starts.tolist()
    ([5, 6, 0, 7, 0], [0, 3, 5])
    """

    def __init__(self, path: str | Path, dtype: Any):
        self.data, self.index = files_of(Path(path))
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.code, self._limits = CODES[self.dtype], np.iinfo(self.dtype)
        self.documents = self.tokens = 0
        self._writing = self._write()

    def __enter__(self) -> "BinidxWriter":
        self._writing.__enter__()
        return self

    def __exit__(self, *exception: Any) -> bool | None:
        return self._writing.__exit__(*exception)

    @contextlib.contextmanager
    def _write(self) -> Iterator[None]:
        with disk.replacing_all(self.data, self.index) as (self._data, self._index):
            self._index.write(bytes(HEADER.size))  # the counts are known at the end
            yield
            self._finish()

    def add(self, *pieces: Ids) -> None:
        """Appends one document: the ids of its pieces."""
        count = 0
        for ids in pieces:
            count += len(ids)
            self._data.write(self._typed(ids).data)
        if count > LONGEST:
            raise CorpusError(
                f"{self.data}: document {self.documents:,} has {count:,} tokens, more than the"
                f" {LONGEST:,} of an item; split it"
            )
        self._index.write(struct.pack("<i", count))
        self.documents, self.tokens = self.documents + 1, self.tokens + count

    def _typed(self, ids: Ids) -> np.ndarray:
        array, limits = np.asarray(ids), self._limits
        if array.dtype == self.dtype or not array.size:
            return np.ascontiguousarray(array, self.dtype)
        if array.min() < limits.min or array.max() > limits.max:
            odd = int(array.min() if array.min() < limits.min else array.max())
            raise CorpusError(
                f"{self.data}: document {self.documents:,} has the id {odd:,}, which"
                f" {self.dtype.name} cannot hold; take a larger type"
            )
        return array.astype(self.dtype)

    def _finish(self) -> None:
        self._index.flush()
        sizes = map_array(Path(self._index.name), "<i4", self.documents, HEADER.size)
        _write_pointers(self._index, [sizes], self.dtype.itemsize)
        marks = self.documents + 1
        for first in range(0, marks, ROWS):
            self._index.write(np.arange(first, min(first + ROWS, marks), dtype="<i8").data)
        self._index.seek(0)
        self._index.write(HEADER.pack(MAGIC, 1, self.code, self.documents, marks))


def merge(parts: Iterable[str | Path], path: str | Path, report: Report = unreported) -> None:
    """Writes the pair of all the parts' documents in order, byte for byte what one writer would
    have written. `report` is called with the bytes of `.bin` copied.

    Raises CorpusError for a part that is damaged or of another type than the first, and OSError.
    """
    parts, dtype, items, marks = list(parts), None, 0, 1
    with disk.replacing_all(*files_of(Path(path))) as (data, index):
        for part in parts:
            pair = open_binidx(part)
            dtype = dtype or pair.tokens.dtype
            if pair.tokens.dtype != dtype:
                raise CorpusError(
                    f"{pair.path}.bin: {pair.tokens.dtype.name} tokens, but those before it are"
                    f" {dtype.name}; create one of them again"
                )
            items, marks = items + len(pair.sizes), marks + len(pair.documents) - 1
            _append(files_of(pair.path)[0], data, report)
        if dtype is None:
            raise ValueError("nothing to merge")
        index.write(HEADER.pack(MAGIC, 1, CODES[dtype], items, marks))
        for pair in _mapped(parts):
            for some in _chunks(pair.sizes):
                index.write(some.data)
        _write_pointers(index, (pair.sizes for pair in _mapped(parts)), dtype.itemsize)
        index.write(bytes(8))
        before = 0
        for pair in _mapped(parts):
            for some in _chunks(pair.documents[1:]):
                index.write((some + before).data)
            before += len(pair.sizes)


def _mapped(parts: Iterable[str | Path]) -> Iterator[Binidx]:
    """One at a time: all of them could exceed the limit of open files."""
    for part in parts:
        yield _map_pair(*files_of(Path(part)))


def _write_pointers(index: BinaryIO, sizes: Iterable[np.ndarray], width: int) -> None:
    end = 0
    for array in sizes:
        for some in _chunks(array):
            lengths = width * some.astype("<i8")
            ends = end + np.cumsum(lengths)
            index.write((ends - lengths).data)
            end = int(ends[-1])


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(array), ROWS):
        yield array[first : first + ROWS]


def _append(path: Path, target: BinaryIO, report: Report) -> None:
    """Copies a file to the end of another, inside the kernel where it can."""
    target.flush()
    with path.open("rb", buffering=0) as source:
        with contextlib.suppress(AttributeError, OSError):  # no such call, or not between these
            while copied := os.copy_file_range(source.fileno(), target.fileno(), COPY_BYTES):
                report(copied)
        target.seek(0, os.SEEK_END)
        rest = os.fstat(source.fileno()).st_size - source.tell()
        shutil.copyfileobj(source, target, 1 << 20)
        report(rest)
