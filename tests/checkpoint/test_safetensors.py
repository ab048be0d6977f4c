"""safetensors: what the library writes is read, what is written it reads, and what is damaged ends
in one line."""

import json
import mmap
import struct

import ml_dtypes
import numpy as np
import pytest
from checkpoint.damaged_files import check_any_damage
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rwkv_jax.checkpoint.errors import WeightsError
from rwkv_jax.checkpoint.safetensors import read_metadata, read_safetensors, write_safetensors

DTYPES = [np.dtype(ml_dtypes.bfloat16)] + [
    np.dtype(f"{kind}{size}")
    for kind, sizes in {"f": (2, 4, 8), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "b": (1,)}.items()
    for size in sizes
]


@st.composite
def arrays(draw):
    """Any bits of any type, in any order in memory."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    bits = np.random.default_rng(draw(st.integers(0, 99))).bytes(dtype.itemsize * 256)
    if dtype == np.bool_:
        bits = bytes(byte & 1 for byte in bits)
    array = np.frombuffer(bits, dtype)[: np.prod(shape, dtype=int)].reshape(shape)
    return array.T if draw(st.booleans()) else array


NAMES = st.text(st.characters(exclude_categories=("Cs",)))
TENSORS = st.dictionaries(NAMES, arrays())
METADATA = st.none() | st.dictionaries(NAMES, NAMES)


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("safetensors.numpy")


def assert_same(actual, expected):
    assert sorted(actual) == sorted(expected)
    for name, array in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (array.dtype, array.shape)
        assert actual[name].tobytes() == array.tobytes()


def fault(call, *arguments):
    with pytest.raises(WeightsError) as caught:
        call(*arguments)
    assert str(caught.value).isprintable()
    return str(caught.value)


@given(tensors=TENSORS, metadata=METADATA)
def test_any_tensors_come_back(tensors, metadata, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "round.safetensors"
    write_safetensors(path, tensors, metadata)
    assert_same(read_safetensors(path), tensors)
    assert read_metadata(path) == (metadata or {})


@given(tensors=TENSORS, metadata=METADATA)
def test_the_library_reads_what_is_written(library, tensors, metadata, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "library.safetensors"
    write_safetensors(path, tensors, metadata)
    assert_same(library.load_file(path), tensors)


@given(tensors=st.dictionaries(NAMES, arrays(), min_size=1), metadata=METADATA)
def test_what_the_library_writes_is_read(library, tensors, metadata, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "library.safetensors"
    # It writes arrays that are not contiguous in the wrong order.
    tensors = {name: np.array(array, order="C") for name, array in tensors.items()}
    library.save_file(tensors, path, metadata)
    assert_same(read_safetensors(path), tensors)
    assert read_metadata(path) == (metadata or {})


def test_tensors_are_views_of_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": np.ones(3, ml_dtypes.bfloat16), "y": np.ones(5)})
    for array in read_safetensors(path).values():
        assert isinstance(array.base, mmap.mmap)
        assert array.flags.aligned
        assert not array.flags.writeable


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tensors = {"é": np.ones((2, 3), np.float16), "b": np.zeros(2), "a": np.zeros((), np.float16)}
    write_safetensors(first, tensors, {"format": "np"})
    write_safetensors(second, dict(reversed(tensors.items())), {"format": "np"})
    assert first.read_bytes() == second.read_bytes()
    assert list(read_safetensors(first)) == ["b", "a", "é"]
    assert struct.unpack_from("<Q", first.read_bytes())[0] % 8 == 0


def test_impossible_names_and_dtypes(tmp_path):
    path = tmp_path / "a.safetensors"
    message = fault(write_safetensors, path, {"x.y": np.zeros(3, np.complex64)})
    assert message == f"{path}: x.y has the type complex64; make it float32 or bfloat16"
    message = fault(write_safetensors, path, {"__metadata__": np.zeros(3)})
    assert message == f"{path}: no tensor can be named __metadata__; rename it"
    assert not list(tmp_path.iterdir())


def part(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_of(header, data=bytes(8)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "is empty"),
        (b"\1\0\0", "is neither a .pth nor a .safetensors file, or damaged; download it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not the weights"),
        (b"<html></html>", "is a web page"),
        (b"PK\3\4" + bytes(40), "is a zip, as PyTorch's are; name it .pth"),
        (b"GGUF\3\0\0\0", "is a GGUF file; take the model's .pth or .safetensors"),
        (b"\xff" * 7 + b"\x7f{}", "its header reaches beyond the end of the file"),
        (struct.pack("<Q", 17 << 20) + b"{" + bytes(17 << 20), "its list of tensors is too large"),
        (file_of(b"{"), "damaged (Expecting property name"),
        (file_of(b'{"\xff": 1}'), "damaged ('utf-8' codec can't decode"),
        (file_of(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "maximum recursion depth"),
        (file_of(b'{"a": ' + b"9" * 10_000 + b"}"), "damaged (Exceeds the limit"),
        (file_of(b'{"x\\n": {}, "x\\n": {}}'), r"damaged (two entries are named x\n); down"),
        (file_of({"x": part()}, bytes(7)), "x reaches beyond the end of the file"),
        (file_of({"x": part()}, bytes(9)), "1 bytes belong to no tensor"),
        (file_of({"x": part("F8_E4M3", (8,))}), "x has the type F8_E4M3; save it as F32 or BF16"),
        (file_of({"x": part(shape=(3,))}), "x has an impossible shape or offset"),
        (file_of({"x": part(shape=(-1, -2))}), "x has an impossible shape or offset"),
        (file_of({"x": part(shape=(2.0,))}), "x has an impossible shape or offset"),
        (file_of({"x": part(shape=(2, True))}), "x has an impossible shape or offset"),
        (file_of({"x": part(shape=(2,) + (1,) * 64)}), "x has an impossible shape or offset"),
        (file_of({"x": part(shape=(0, 2**62), end=0)}, b""), "x has an impossible shape or offset"),
        (file_of({"x": part(begin=8, end=0)}), "x has an impossible shape or offset"),
        (file_of({"x": part(begin=-8, end=0)}), "x does not begin where the one before it ends"),
        (file_of({"x": part(begin=2**70, end=2**70 + 8)}), "x does not begin where the one before"),
        (file_of({"x": part(), "y": part()}), "y does not begin where the one before it ends"),
        (file_of({"x": part(), "y": part(begin=12, end=20)}, bytes(20)), "y does not begin where"),
        (file_of({"x": {**part(), "dtype": None}}), "x has an impossible shape or offset"),
        (file_of({"x": 3}), "x has an impossible shape or offset"),
        (file_of({"x": part(), "__metadata__": {"a": 1}}), "its metadata is not text"),
        (file_of({"x": part(), "__metadata__": []}), "its metadata is not text"),
    ],
)
def test_damaged_files_are_one_line(content, expected, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    message = fault(read_safetensors, path)
    assert message.startswith(f"{path}: ")
    assert expected in message


def test_any_damage_is_an_error_or_none(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"x": np.ones((2, 3), ml_dtypes.bfloat16), "y": np.zeros((0, 2)), "z": np.ones(5)}
    write_safetensors(path, tensors, {"format": "np"})
    check_any_damage(read_safetensors, path.read_bytes(), path, 300)
