"""The safetensors format: a length, a JSON header of as many bytes, and the numbers.

    8 bytes     the header's length
    header      {"__metadata__": {TEXT: TEXT},
                 NAME: {"dtype": TEXT, "shape": [...], "data_offsets": [begin, end]}, ...}
    the rest    the numbers; offsets count from here, and every byte belongs to one tensor

Read and written here rather than with the library (version 0.8.0). Its numpy functions copy each
tensor where a view of the mapped file would do, need all tensors at once to write them, and
silently write a tensor that is not contiguous in the wrong order: `numpy._flatten` passes its
`data_ptr` without testing for contiguity.
"""

import json
import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_jax.checkpoint import files
from rwkv_jax.checkpoint.errors import WeightsError, shown
from rwkv_jax.checkpoint.files import ArrayLike

_METADATA = "__metadata__"

_CODES = {
    "bool": "BOOL",
    "bfloat16": "BF16",
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
}
_DTYPES = {code: np.dtype(name) for name, code in _CODES.items()}


def read_safetensors(path: Path | str) -> dict[str, np.ndarray]:
    """The tensors of a file: read-only views of it; it stays mapped as long as one of them is
    alive.

    Raises WeightsError, one line, for a file that cannot be read or is damaged.
    """
    with files.reading(Path(path)) as memory:
        return _read(memory)[0]


def read_metadata(path: Path | str) -> dict[str, str]:
    """The metadata of a file. Raises as `read_safetensors`."""
    with files.reading(Path(path)) as memory:
        return _read(memory)[1]


def _read(memory: mmap.mmap) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the metadata of a file."""
    if memory[8:9] != b"{":
        raise WeightsError(files.kind(memory))
    start = 8 + int.from_bytes(memory[:8], "little")
    header = files.json_object(memory, 8, start)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise ValueError("its metadata is not text")
    parts = [(*_part(shown(name), entry), name) for name, entry in header.items()]
    tensors, end = {}, start
    for begin, size, dtype, shape, name in sorted(parts, key=lambda part: part[:2]):
        if start + begin != end:
            raise ValueError(f"{shown(name)} does not begin where the one before it ends")
        end += size
        if end > len(memory):
            raise ValueError(f"{shown(name)} reaches beyond the end of the file")
        tensors[name] = np.ndarray(shape, dtype, memory, start + begin)
    if end != len(memory):
        raise ValueError(f"{len(memory) - end} bytes belong to no tensor")
    return tensors, metadata


def _part(name: str, entry: object) -> tuple[int, int, np.dtype, list[int]]:
    """The offset, bytes, type and shape of a tensor."""
    match entry:
        case {"dtype": str(code), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            if code not in _DTYPES:
                raise WeightsError(f"{name} has the type {shown(code)}; save it as F32 or BF16")
            dtype = _DTYPES[code]
            if files.is_shape(shape) and math.prod(shape) * dtype.itemsize == end - begin:
                return begin, end - begin, dtype, shape
    raise ValueError(f"{name} has an impossible shape or offset")


def write_safetensors(
    path: Path | str,
    tensors: Mapping[str, ArrayLike],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file that the library reads; the same tensors give the same bytes.

    Holds one tensor in memory at a time. Raises WeightsError, one line, for a dtype that the format
    does not have or a file that cannot be written; an older file at `path` is then unchanged.
    """
    path = Path(path)
    if _METADATA in tensors:
        raise WeightsError(f"{path}: no tensor can be named {_METADATA}; rename it")
    files.check_dtypes(path, tensors, _CODES)
    # Wide types first, so that all are aligned.
    ranks = {name: (-np.dtype(array.dtype).itemsize, name) for name, array in tensors.items()}
    order = sorted(tensors, key=ranks.__getitem__)
    header: dict[str, Any] = {} if metadata is None else {_METADATA: dict(metadata)}
    end = 0
    for name in order:
        dtype, shape = np.dtype(tensors[name].dtype), [int(n) for n in tensors[name].shape]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        offsets = [begin, end]
        header[name] = {"dtype": _CODES[dtype.name], "shape": shape, "data_offsets": offsets}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with files.replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(files.as_bytes(tensors[name]))
