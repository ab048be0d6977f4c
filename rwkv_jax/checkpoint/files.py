"""Files of weights on disk: mapped into memory, recognised by their first bytes, replaced as a
whole.

The formats share three rules: neither needs more of a file in memory than the tensors that are
used, neither trusts a number in it, and neither leaves half a file under the name of a whole one.
Numbers are little-endian, in both formats and on every machine that JAX runs on.
"""

import contextlib
import json
import math
import mmap
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar, runtime_checkable

import ml_dtypes
import numpy as np

from rwkv_jax import disk
from rwkv_jax.checkpoint.errors import WeightsError, shown

Entry = TypeVar("Entry")

MAX_INDEX = 16 << 20
"""The most bytes of the part of a file that describes the tensors; a model needs about 100 a
tensor. Parsed, they take up to a hundred times as much memory."""

_KINDS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the weights; fetch them: git lfs pull",
    b"<": "is a web page, not weights: a failed download; download it again",
    b"gguf": "is a GGUF file; take the model's .pth or .safetensors",
    b"pk\3\4": "is a zip, as PyTorch's are; name it .pth",
    b"\x80": "is from PyTorch before 1.6, or not weights; load and save it with a newer torch",
}
"""The first bytes of other files (in lower case), what the file is, and the remedy."""


@runtime_checkable
class ArrayLike(Protocol):
    """An array, or a deferred one: `__array__` returns values of this shape and dtype."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any:
        """Anything that `numpy.dtype` accepts."""
        ...

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """The values; called once, when they are written."""
        ...


class Deferred:
    """An array that is computed when numpy asks for it, and not kept."""

    def __init__(self, shape: Sequence[int], dtype: Any, make: Callable[[], np.ndarray]):
        self.shape, self.dtype, self._make = tuple(shape), np.dtype(dtype), make

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The values, computed again by each call."""
        return self._make().astype(dtype or self.dtype, copy=False)


FLOATS = {"float16": "bfloat16", "bfloat16": "float32", "float32": "float64", "float64": ""}
"""The types in which weights are written and read, each with one of a larger range."""


def float_type(dtype: Any) -> np.dtype:
    """`dtype` as numpy's. Raises ValueError for a type not in `FLOATS`."""
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in FLOATS:
        raise ValueError(
            f"dtype = {shown(dtype if found is None else found.name)}: weights can be"
            f" {', '.join(FLOATS)}; name one of them"
        )
    return found


def cast(name: str, array: ArrayLike, dtype: np.dtype) -> ArrayLike:
    """The array rounded to a type of `FLOATS`, deferred. NaN and infinity stay; a finite number
    that would become infinite raises WeightsError when the values are computed."""
    if np.dtype(array.dtype) == dtype:
        return array

    def make() -> np.ndarray:
        values = np.asarray(array)
        with np.errstate(over="ignore", invalid="ignore"):
            rounded = values.astype(dtype)
        if dtype.itemsize > values.dtype.itemsize or np.isfinite(rounded).all():
            return rounded
        if lost := int(np.isfinite(values).sum() - np.isfinite(rounded).sum()):
            largest = float(ml_dtypes.finfo(dtype).max)
            raise WeightsError(
                f"{shown(name)} has {lost:,} number{'s' * (lost > 1)} too large for {dtype.name},"
                f" which ends at {largest:.5g}; take {FLOATS[dtype.name]}"
            )
        return rounded

    return Deferred(array.shape, dtype, make)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[mmap.mmap]:
    """A file's bytes, mapped: arrays made of them keep the mapping alive, and only the pages that
    are used are read.

    Names the file in every WeightsError, and raises one for any error due to a damaged file.
    """
    try:
        _check_regular(path)  # opening a pipe would wait for a writer
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise WeightsError("is empty; download or save it again")
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        yield memory
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    except OSError as error:
        raise WeightsError(
            f"{path}: cannot be read ({error.strerror}); name a file that exists and is readable"
        ) from error
    except (ValueError, OverflowError, EOFError, RuntimeError, struct.error) as error:
        raise WeightsError(f"{path}: damaged ({shown(error)}); download it again") from error


def _check_regular(path: Path) -> None:
    if path.is_dir():
        raise WeightsError("is a folder; name a file")
    if path.exists() and not path.is_file():
        raise WeightsError("is not a regular file; name one")


def begins(path: Path) -> bytes:
    """The first bytes of a file."""
    with path.open("rb") as file:
        return file.read(16)


def kind(memory: mmap.mmap) -> str:
    """What a file of another format is, and the remedy."""
    # A safetensors length may look like any of the other signs, so it comes first.
    if memory[8:9] == b"{" and int.from_bytes(memory[:8], "little") < len(memory):
        return "is a safetensors file; name it .safetensors"
    start = memory[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for sign, verdict in _KINDS.items():
        if start.startswith(sign):
            return verdict
    return "is neither a .pth nor a .safetensors file, or damaged; download it again"


def is_shape(shape: Sequence) -> bool:
    """Whether numpy can make an array of this shape; its limit holds for the other sizes even if
    one is 0."""
    return (
        len(shape) <= 64
        and all(type(size) is int and size >= 0 for size in shape)
        and math.prod(size or 1 for size in shape) < 1 << 59
    )


def unique(pairs: Iterable[tuple[str, Entry]]) -> dict[str, Entry]:
    """Entries by name. Raises ValueError for two of one name."""
    found = {}
    for name, entry in pairs:
        if name in found:
            raise ValueError(f"two entries are named {shown(name)}")
        found[name] = entry
    return found


def json_object(memory: mmap.mmap, start: int, stop: int) -> dict[str, Any]:
    """The JSON object in these bytes. Raises ValueError for anything else, a name that occurs twice
    included."""
    if stop > len(memory):
        raise ValueError("its header reaches beyond the end of the file")
    if stop - start > MAX_INDEX:
        raise WeightsError("its list of tensors is too large; split the model")
    found = json.loads(memory[start:stop].decode("utf-8-sig"), object_pairs_hook=unique)
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


TILE = 256
"""Rows and columns of a matrix that are transposed together: they fit into a core's cache."""


def c_order(values: np.ndarray) -> np.ndarray:
    """The values in C order: themselves, or a copy."""
    if values.flags.c_contiguous:
        return values
    copy = np.empty(values.shape, values.dtype)
    copy_into(copy, values)
    return copy


def copy_into(copy: np.ndarray, values: np.ndarray) -> None:
    """`copy[...] = values`. A transposed matrix goes tile by tile: numpy goes through all of it in
    the order of `copy`, which takes three to twenty times as long."""
    if values.ndim != 2 or values.strides[0] >= values.strides[1]:
        copy[...] = values
        return
    for i in range(0, values.shape[0], TILE):
        for j in range(0, values.shape[1], TILE):
            here = slice(i, i + TILE), slice(j, j + TILE)
            copy[here] = values[here].T.copy().T


def as_bytes(array: ArrayLike) -> memoryview:
    """The values in C order, little-endian, as flat bytes: a view if they are stored like that."""
    dtype = np.dtype(array.dtype).newbyteorder("<")
    values = c_order(np.asarray(np.asarray(array), dtype))
    if values.shape != tuple(array.shape):
        raise ValueError(f"an array of shape {array.shape} gave one of shape {values.shape}")
    return values.reshape(-1).view(np.uint8).data


def check_dtypes(path: Path, tensors: Mapping[str, ArrayLike], known: Container[str]) -> None:
    """Raises WeightsError for a tensor whose type a format does not have."""
    for name, array in tensors.items():
        if (dtype := np.dtype(array.dtype).name) not in known:
            raise WeightsError(
                f"{path}: {shown(name)} has the type {dtype}; make it float32 or bfloat16"
            )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """`disk.replacing` that raises WeightsError if the file cannot be written."""
    with writing(path), disk.replacing(path) as file:
        yield file


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` at the end; if anything is raised, nothing is left of
    it. Raises WeightsError if `path` is a file, or a folder that is not empty."""
    if path.is_file():
        raise WeightsError(f"{path}: is a file; name a new folder")
    if path.exists() and any(path.iterdir()):
        raise WeightsError(f"{path}: is not empty; name a new folder")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    parents = [folder for folder in path.parents if not folder.exists()]  # deepest first
    try:
        with naming(path), writing(path):
            temporary.mkdir(parents=True)
            yield temporary
            os.replace(temporary, path)
    except WeightsError as error:  # the user does not know the temporary folder
        raise WeightsError(str(error).replace(str(temporary), str(path))) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in parents:
            with contextlib.suppress(OSError):  # not empty: the folder was written
                folder.rmdir()


def json_text(table: Mapping[str, Any]) -> bytes:
    """A table as a JSON file."""
    return (json.dumps(table, indent=2) + "\n").encode()


def writing(path: Path) -> contextlib.AbstractContextManager[None]:
    """Turns a refusal of the file system into a WeightsError."""
    return disk.writing(path, "choose another place", error=WeightsError)


def check_writable(path: Path) -> None:
    """Raises WeightsError if `replacing` could not write there, as far as can be known without
    trying."""
    path = path.expanduser()
    with naming(path), writing(path):
        _check_regular(path)
        if not path.parent.is_dir():
            raise WeightsError(f"there is no folder {path.parent}; make it first")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise WeightsError(
                f"cannot be written (no permission in {path.parent}); choose another place"
            )


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Prefixes every WeightsError with the file's name."""
    try:
        yield
    except WeightsError as error:
        if str(error).startswith(str(path)):
            raise
        raise WeightsError(f"{path}: {error}") from error
