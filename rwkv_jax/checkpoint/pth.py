"""PyTorch's `.pth` files (1.6 and later) without PyTorch.

Such a file is a zip whose entries are stored uncompressed:

    NAME/data.pkl    a pickle of the state dict; each tensor in it names a storage, an offset, a
                     shape and strides
    NAME/data/KEY    a storage: the numbers
    NAME/byteorder   `little`; missing in files of torch before 2.1

A pickle is a program, and Python's unpickler runs whatever it calls. The interpreter here knows
only the few opcodes and names that state dicts consist of, imports nothing, calls nothing,
and raises an error for everything else. Checksums are not verified: that would read the whole file.
"""

import math
import mmap
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rwkv_jax.checkpoint import files
from rwkv_jax.checkpoint.errors import ZERO, WeightsError, shown
from rwkv_jax.checkpoint.files import ArrayLike

_STORAGES = {
    "float64": "Double",
    "float32": "Float",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "int64": "Long",
    "int32": "Int",
    "int16": "Short",
    "int8": "Char",
    "uint8": "Byte",
    "bool": "Bool",
}
"""The storage class of each dtype. Types that torch got later are in untyped storages."""

_DTYPES = {name: np.dtype(name) for name in (*_STORAGES, "uint16", "uint32", "uint64")}

_UNTYPED = "torch.storage.UntypedStorage"

_TYPES = {
    _UNTYPED: np.dtype(np.uint8),
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
    **{f"torch.{storage}Storage": _DTYPES[name] for name, storage in _STORAGES.items()},
}

_TENSORS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_DICT = "collections.OrderedDict"
_SUBCLASS = "torch._tensor._rebuild_from_type_v2"
"""A tensor with attributes, or of a class of its own: (function, class, arguments, attributes)."""
_BUILTINS = ("set", "bytes", "bytearray", "complex", "list", "dict", "int", "float")
_IGNORED = (
    "torch.Size",
    "torch.device",
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    "collections.Counter",
    "collections.defaultdict",
    "_codecs.encode",  # bytes
    "torch._utils._rebuild_sparse_tensor",
    "torch._utils._rebuild_meta_tensor_no_storage",
    "torch.serialization._get_layout",
    *(f"{home}.{name}" for home in ("builtins", "__builtin__") for name in _BUILTINS),
)
"""Objects beside the state dict in a trainer's checkpoint: what torch's `weights_only` takes."""

_CALLS = (*_TENSORS, *_PARAMETERS, _SUBCLASS, _DICT, *_IGNORED)
"""The names that a pickle may call; others it may refer to match `_TYPE`."""

_TYPE = re.compile(
    r"torch\.([A-Za-z0-9]+Storage|storage\.UntypedStorage)"
    r"|torch\.(bool|u?int[0-9]+|b?float[0-9]+(_[a-z0-9]+)?|complex[0-9]+)"
)

_NESTED = ("state_dict", "model_state_dict", "model", "module", "weights", "net")
"""Where trainers keep the state dict in their checkpoints, one in another too."""

_DEPTH = 4
"""How many dicts a state dict may be inside of."""

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}

_REMEDY = (
    "which no state dict needs; save the state dict alone (model.state_dict()), and do not trust"
    " this file if it is not your own: it could run code when loaded"
)


@dataclass(frozen=True, slots=True)
class _Global:
    """A name that a pickle refers to; the Python object of that name is never looked up."""

    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    type: str
    key: str
    length: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """The arguments of a torch tensor. Sizes count elements and are not yet checked."""

    storage: _Storage
    offset: int
    shape: tuple
    strides: tuple
    type: str
    flipped: bool
    """Whether it is a conjugate or negative view of its numbers."""


@dataclass(frozen=True)
class _Archive:
    """A mapped zip."""

    memory: mmap.mmap
    folder: str
    entries: dict[str, zipfile.ZipInfo]

    def find(self, name: str) -> range:
        """The range of an entry's bytes in the file."""
        name = self.folder + name
        if name not in self.entries:
            raise WeightsError(f"its entry {shown(name)} is missing; download it again")
        entry, name = self.entries[name], shown(name)
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise WeightsError(f"its entry {name} is compressed or encrypted; save it with torch")
        header = entry.header_offset
        if header < 0 or self.memory[header : header + 4] != b"PK\3\4":
            raise ValueError(f"its entry {name} is not where it should be")
        start = header + 30 + sum(struct.unpack_from("<2H", self.memory, header + 26))
        if start + entry.file_size > len(self.memory):
            raise ValueError(f"its entry {name} reaches beyond the end of the file")
        return range(start, start + entry.file_size)

    def read(self, name: str) -> bytes:
        """A copy of an entry of moderate size."""
        found = self.find(name)
        if len(found) > files.MAX_INDEX:
            raise WeightsError(f"its entry {shown(name)} is too large; save the state dict alone")
        return self.memory[found.start : found.stop]


def read_pth(path: Path | str) -> dict[str, np.ndarray]:
    """The tensors of a state dict: read-only views of the file, which stays mapped as long as one
    of them is alive. Other entries are left out.

    Raises WeightsError, one line, for a file that cannot be read, is damaged, or is unsafe.
    """
    with files.reading(Path(path)) as memory:
        archive = _open(memory)
        ordered = f"{archive.folder}byteorder" in archive.entries
        if ordered and archive.read("byteorder") != b"little":
            raise WeightsError("is big-endian; save it again on a little-endian machine")
        tensors = _state_dict(_unpickle(archive.read("data.pkl")))
        return {name: _array(archive, shown(name), tensor) for name, tensor in tensors.items()}


def broken_entry(path: Path) -> str | None:
    """The first entry of a zip whose checksum does not match, which reading leaves unchecked; None
    for other files."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def _open(memory: mmap.mmap) -> _Archive:
    if memory[:4] != b"PK\3\4":
        raise WeightsError(files.kind(memory))
    try:
        with zipfile.ZipFile(memory) as archive:  # pyright: ignore[reportArgumentType, reportCallIssue]
            found = archive.infolist()
    except (zipfile.BadZipFile, ValueError) as error:
        raise WeightsError(
            f"has no complete zip directory at its end ({shown(error)}): truncated? download it"
            " again"
        ) from error
    entries = files.unique((entry.filename, entry) for entry in found)
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise WeightsError(f"holds {len(pickles)} data.pkl, not one; save it with torch.save")
    return _Archive(memory, pickles[0].removesuffix("data.pkl"), entries)


def _unpickle(data: bytes) -> object:
    """The object that a pickle describes, of dicts, lists, tuples, numbers, text and the classes
    above.

    Raises WeightsError for an opcode or a name that state dicts do not need.
    """
    # MARK opens a new stack; the opcode that closes it takes all of its items.
    stack, below, memo = [], [], {}
    try:
        for opcode, argument, _ in pickletools.genops(data):
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case name if name in _CONSTANTS:
                    stack.append(_CONSTANTS[name])
                case "BININT" | "BININT1" | "BININT2" | "INT" | "LONG" | "LONG1" | "LONG4":
                    stack.append(_number(argument))
                case "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                    stack.append(argument)
                case "BINSTRING" | "SHORT_BINSTRING":
                    stack.append(argument)
                case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                    stack.append(None)
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST" | "EMPTY_SET":
                    stack.append([])
                case "MARK":
                    below.append(stack)
                    stack = []
                case "TUPLE":
                    items, stack = stack, below.pop()
                    stack.append(tuple(items))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    items = [stack.pop() for _ in range(int(opcode.name[-1]))]
                    stack.append(tuple(items[::-1]))
                case "APPEND":
                    item = stack.pop()
                    _extend(stack[-1], [item])
                case "FROZENSET":
                    stack = below.pop()
                    stack.append(None)
                case "APPENDS" | "ADDITEMS":
                    items, stack = stack, below.pop()
                    _extend(stack[-1], items)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    _update(stack[-1], [key, value])
                case "SETITEMS":
                    items, stack = stack, below.pop()
                    _update(stack[-1], items)
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "GLOBAL":
                    stack.append(_refer(*str(argument).split(" ", 1)))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    stack.append(_refer(module, name))
                case "BINPERSID":
                    stack.append(_storage(stack.pop()))
                case "REDUCE":
                    arguments, called = stack.pop(), stack.pop()
                    stack.append(_stand_in(called, arguments))
                case "BUILD":
                    # Attributes, such as a module's `_metadata`.
                    stack.pop()
                case "STOP":
                    return stack.pop()
                case name:
                    raise WeightsError(f"its pickle uses {name}, {_REMEDY}")
    except LookupError as error:
        raise ValueError("its pickle uses an item that it never stored") from error
    raise ValueError("its pickle has no end")


def _number(value: Any) -> int | None:
    """None for a number larger than any size, such as a seed: arithmetic on it could be slow."""
    return value if value.bit_length() <= 63 else None


def _extend(target: object, items: list) -> None:
    if not isinstance(target, list):
        raise ValueError("its pickle appends to something that is not a list")
    target.extend(items)


def _update(target: object, items: list) -> None:
    if not isinstance(target, dict):
        raise ValueError("its pickle sets items of something that is not a dict")
    # Only names matter, and hashing nested tuples can take forever.
    pairs = zip(items[::2], items[1::2], strict=True)
    target.update((key, x) for key, x in pairs if isinstance(key, str | int))


def _refer(module: object, name: object) -> _Global:
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("its pickle refers to something that is not a name")
    full = f"{module}.{name}"
    if full.startswith("deepspeed."):
        raise WeightsError(f"is {ZERO}")
    if full not in _CALLS and not _TYPE.fullmatch(full):
        raise WeightsError(f"refers to {shown(full)}, {_REMEDY}")
    return _Global(full)


def _storage(identity: object) -> _Storage:
    match identity:
        case ("storage", _Global(name), str(key), str(), int(length)):
            return _Storage(name, key, length)
    raise ValueError("its pickle describes a storage in another way than torch")


def _tensor(arguments: object) -> _Tensor:
    match arguments:
        case (_Storage() as storage, int(offset), tuple(shape), tuple(strides), _, _, *rest):
            dtype = rest.pop(0).name if rest and isinstance(rest[0], _Global) else storage.type
            return _Tensor(storage, offset, shape, strides, dtype, any(rest))
    raise ValueError("its pickle describes a tensor in another way than torch")


def _stand_in(called: object, arguments: object) -> object:
    """A stand-in for the result of a call."""
    match called, arguments:
        case _Global(name), tuple() if name in _TENSORS:
            return _tensor(arguments)
        case _Global(name), (tensor, *_) if name in _PARAMETERS:
            return tensor
        case _Global(name), (made, _, tuple(inner), *_) if name == _SUBCLASS:
            return _stand_in(made, inner)
        case _Global(name), () if name == _DICT:
            return {}
        case _Global("collections.defaultdict"), (_Global(),):
            return {}
        case _Global(name), tuple() if name in _IGNORED:
            return None
    raise ValueError("its pickle makes a call that torch does not make")


def _state_dict(root: object) -> dict[str, _Tensor]:
    """The tensors of the state dict in a checkpoint: under a trainer's key, or else those of the
    dict that has most."""
    if isinstance(root, dict) and {"_strategy", "_version"} <= root.keys():
        raise WeightsError(
            "was converted by PyPI rwkv for one strategy (turned, rescaled, some of it quantised);"
            " take the file that it was made from"
        )
    dicts = list(_dicts(root, _DEPTH, set()))
    trained = [tensors for tensors, known in dicts if known and tensors]
    if found := max(trained or [tensors for tensors, _ in dicts], key=len, default={}):
        return found
    raise WeightsError("holds no named tensors; save model.state_dict()")


def _dicts(
    root: object, depth: int, seen: set[int], known: bool = False
) -> Iterator[tuple[dict[str, _Tensor], bool]]:
    """The tensors of each dict in a tree of dicts, and whether it is under a trainer's keys."""
    if not isinstance(root, dict) or id(root) in seen:
        return
    seen.add(id(root))
    if depth:
        for key in (*_NESTED, *root):
            named = key in _NESTED and (known or depth == _DEPTH)
            yield from _dicts(root.get(key), depth - 1, seen, named)
    yield _tensors(root), known


def _tensors(part: object) -> dict[str, _Tensor]:
    items = part.items() if isinstance(part, dict) else ()
    return {key: x for key, x in items if isinstance(key, str) and isinstance(x, _Tensor)}


def _array(archive: _Archive, name: str, tensor: _Tensor) -> np.ndarray:
    """The tensor as a view of the file."""
    storage, offset, shape = tensor.storage, tensor.offset, tensor.shape
    if storage.type not in _TYPES or tensor.type not in _TYPES:
        raise WeightsError(
            f"{name} has the type {shown(tensor.type)}; save it as float32 or bfloat16"
        )
    if tensor.flipped:
        raise WeightsError(f"{name} is a conjugate or negative view; save a clone of it")
    if not files.is_shape(shape) or len(shape) != len(tensor.strides):
        raise ValueError(f"{name} has an impossible shape")
    # The stride of an axis of length 1 is never used and may be any number.
    steps = [0 if n == 1 else step for n, step in zip(shape, tensor.strides, strict=True)]
    if not all(type(n) is int and n >= 0 for n in (offset, storage.length, *steps)):
        raise ValueError(f"{name} has impossible strides")
    dtype, place = _TYPES[tensor.type], archive.find(f"data/{storage.key}")
    numbers = math.prod(shape)
    if not numbers:
        return np.ndarray(shape, dtype, archive.memory)
    end = offset + sum((n - 1) * step for n, step in zip(shape, steps, strict=True)) + 1
    room = min(len(place), storage.length * _TYPES[storage.type].itemsize)
    if end * dtype.itemsize > room:
        raise ValueError(f"{name} reaches outside its storage")
    # Strides of 0 can make a huge array of few numbers.
    if numbers * dtype.itemsize > len(archive.memory):
        raise WeightsError(f"{name} is larger than the file; save a clone of it")
    start = place.start + offset * dtype.itemsize
    return np.ndarray(shape, dtype, archive.memory, start, [n * dtype.itemsize for n in steps])


def write_pth(path: Path | str, tensors: Mapping[str, ArrayLike]) -> None:
    """Writes a state dict that torch loads with `weights_only=True`; the same tensors give the same
    bytes.

    Holds one tensor in memory at a time. Raises WeightsError, one line, for a dtype that torch does
    not have or a file that cannot be written; an older file at `path` is then unchanged.
    """
    path = Path(path)
    files.check_dtypes(path, tensors, _DTYPES)
    with files.replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        _write(file, archive, "data.pkl", memoryview(_pickle(tensors)))
        _write(file, archive, "byteorder", memoryview(b"little"))
        for key, array in enumerate(tensors.values()):
            _write(file, archive, f"data/{key}", files.as_bytes(array))
        _write(file, archive, "version", memoryview(b"3\n"))


def _write(file: BinaryIO, archive: zipfile.ZipFile, name: str, data: memoryview) -> None:
    """Adds an entry whose bytes start at a multiple of 64, as torch's do."""
    entry = zipfile.ZipInfo(f"archive/{name}")
    # Unix: the default depends on the platform.
    entry.create_system = 3
    # The header: 30 bytes and the name, 20 for sizes beyond 4 GiB, 4 for the padding's own header.
    padding = -(file.tell() + 30 + len(entry.filename) + 20 + 4) % 64
    entry.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(entry, "w", force_zip64=True) as stream:
        stream.write(data)


def _pickle(tensors: Mapping[str, ArrayLike]) -> bytes:
    """A pickle that builds a dict of tensors, each in a storage of its own."""
    program = [b"\x80\x02}("]
    for key, (name, array) in enumerate(tensors.items()):
        dtype, shape = np.dtype(array.dtype), tuple(int(n) for n in array.shape)
        strides = tuple(math.prod(n or 1 for n in shape[i + 1 :]) for i in range(len(shape)))
        if typed := dtype.name in _STORAGES:
            storage, length = f"torch.{_STORAGES[dtype.name]}Storage", math.prod(shape)
        else:
            storage, length = _UNTYPED, math.prod(shape) * dtype.itemsize
        program += [_value(name), _name(_TENSORS[0 if typed else 1]), b"(("]
        program += [_value("storage"), _name(storage), _value(str(key)), _value("cpu")]
        program += [_value(length), b"tQ", _value(0), _value(shape), _value(strides)]
        program += [_value(False), _name(_DICT), b")R"]
        program += [b"tR" if typed else _name(f"torch.{dtype.name}") + b"tR"]
    return b"".join([*program, b"u."])


def _value(value: object) -> bytes:
    """The opcodes that push a value."""
    return pickle.dumps(value, 2)[2:-1]


def _name(full: str) -> bytes:
    """The opcode that pushes the object of a name."""
    module, _, name = full.rpartition(".")
    return f"c{module}\n{name}\n".encode()
