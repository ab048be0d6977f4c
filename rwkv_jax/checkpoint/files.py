"""Files of weights on disk: mapped into memory, told apart by how they begin, replaced as a whole.

What the formats share: neither needs more of a file in memory than what is looked at, neither
trusts a number in it, and neither leaves half a file under the name of a whole one. Numbers are
little-endian, in both and on every machine that JAX runs on.
"""

import contextlib
import errno
import math
import mmap
import os
import secrets
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from rwkv_jax.checkpoint.errors import WeightsError, shown

MAX_INDEX = 16 << 20
"""Bytes of a file that say what the others are; a model takes about 100 of them a tensor. In memory
they become up to a hundred times as many."""

_KINDS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the weights; fetch them: git lfs pull",
    b"<": "is a web page, not weights: a failed download; do it again",
    b"gguf": "is a GGUF file; take the model's .pth or .safetensors",
    b"pk\3\4": "is a zip, as PyTorch's are; name it .pth",
    b"\x80": "is of PyTorch before 1.6, or no weights; load and save it with a newer torch",
}
"""How a file begins (in lower case), what it is then, and the remedy."""


@runtime_checkable
class ArrayLike(Protocol):
    """An array, or the promise of one: what `__array__` gives has this shape and dtype."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        ...

    @property
    def dtype(self) -> Any:
        """What `numpy.dtype` takes."""
        ...

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Its values; asked for once, when they are written."""
        ...


class Deferred:
    """The promise of an array: made when numpy asks for it, not before, and not kept."""

    def __init__(self, shape: Sequence[int], dtype: Any, make: Callable[[], np.ndarray]):
        self.shape, self.dtype, self._make = tuple(shape), np.dtype(dtype), make

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The values, made anew at each call."""
        return self._make().astype(dtype or self.dtype, copy=False)


FLOATS = {"float16": "bfloat16", "bfloat16": "float32", "float32": "float64", "float64": ""}
"""The types that weights can be written in and read again, and one of a larger range each."""


def float_type(dtype: Any) -> np.dtype:
    """What `numpy.dtype` makes of it. Raises `ValueError` for another type than `FLOATS`."""
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
    """The array, or the promise of it, rounded to a type of `FLOATS`. NaN and infinity stay; a
    number that would become infinite is a `WeightsError`, when its turn comes."""
    if np.dtype(array.dtype) == dtype:
        return array

    def make() -> np.ndarray:
        values = np.asarray(array)
        with np.errstate(over="ignore", invalid="ignore"):
            rounded = values.astype(dtype)
        if dtype.itemsize > values.dtype.itemsize or np.isfinite(rounded).all():
            return rounded
        if lost := int(np.isfinite(values).sum() - np.isfinite(rounded).sum()):
            raise WeightsError(
                f"{shown(name)} has {lost:,} number{'s' * (lost > 1)} too large for {dtype.name},"
                " which ends at"
                f" {float(ml_dtypes.finfo(dtype).max):.5g}; take {FLOATS[dtype.name]}"
            )
        return rounded

    return Deferred(array.shape, dtype, make)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[mmap.mmap]:
    """A file's bytes, mapped: arrays made of them keep the map alive, and cost what is looked at.

    Names the file in every `WeightsError`, and makes one of whatever a damaged file raises.
    """
    try:
        if path.is_dir():
            raise WeightsError("is a folder; name a file")
        # Opening a pipe would wait for a writer.
        if path.exists() and not path.is_file():
            raise WeightsError("is no regular file; name one")
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise WeightsError("is empty; download or save it again")
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        yield memory
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    except OSError as error:
        raise WeightsError(
            f"{path}: cannot be read ({error.strerror}); name a file that is there and readable"
        ) from error
    except (ValueError, OverflowError, EOFError, RuntimeError, struct.error) as error:
        raise WeightsError(f"{path}: damaged ({shown(error)}); download it again") from error


def kind(memory: mmap.mmap) -> str:
    """What a file is that is not of the format asked for, and the remedy."""
    # A length may look like any of the other signs.
    if memory[8:9] == b"{" and int.from_bytes(memory[:8], "little") < len(memory):
        return "is a safetensors file; name it .safetensors"
    start = memory[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for sign, verdict in _KINDS.items():
        if start.startswith(sign):
            return verdict
    return "is neither a .pth nor a .safetensors file, or damaged; download it again"


def is_shape(shape: Sequence) -> bool:
    """Whether numpy can make an array of it, which depends on the other sizes even if one is 0."""
    return (
        len(shape) <= 64
        and all(type(size) is int and size >= 0 for size in shape)
        and math.prod(size or 1 for size in shape) < 1 << 59
    )


def as_bytes(array: ArrayLike) -> memoryview:
    """The values in C order, little-endian, as flat bytes: a view where they lie like that."""
    dtype = np.dtype(array.dtype).newbyteorder("<")
    values = np.asarray(np.asarray(array), dtype, order="C")
    if values.shape != tuple(array.shape):
        raise ValueError(f"an array of shape {array.shape} gave one of shape {values.shape}")
    return values.reshape(-1).view(np.uint8).data


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, which takes the place of `path` when all of it is on disk; until then, and if
    anything is raised, `path` is as it was.

    Raises `WeightsError` if it cannot be written.
    """
    _check_replaceable(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with writing(path):
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_writable(path: Path) -> None:
    """Raises `WeightsError` if `replacing` could not write there, as far as can be told without
    doing it."""
    path = path.expanduser()
    with writing(path):
        _check_replaceable(path)
        if not path.parent.is_dir():
            raise WeightsError(f"{path}: there is no folder {path.parent}; make it first")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise WeightsError(
                f"{path}: cannot be written (no permission in {path.parent}); choose another place"
            )


def _check_replaceable(path: Path) -> None:
    if path.is_dir():
        raise WeightsError(f"{path}: is a folder; name a file")
    if path.exists() and not path.is_file():  # a device would be no more
        raise WeightsError(f"{path}: is no regular file; name one")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names `path` in a `WeightsError` of whatever the disk refuses."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WeightsError(f"{path}: no space left on the disk; free some") from error
        raise WeightsError(
            f"{path}: cannot be written ({error.strerror}); choose another place"
        ) from error
