"""`.pth` files: what torch writes is read, what is written torch reads, and what is damaged or
malicious ends in one line, with nothing run."""

import copyreg
import errno
import json
import mmap
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoint.damaged_files import check_any_damage
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rwkv_jax.checkpoint.errors import WeightsError
from rwkv_jax.checkpoint.pth import read_pth, write_pth

GOLDEN = Path(__file__).parent.parent / "golden" / "pth"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
DTYPES = [np.dtype(ml_dtypes.bfloat16)] + [
    np.dtype(f"{kind}{size}")
    for kind, sizes in {"f": (2, 4, 8), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "b": (1,)}.items()
    for size in sizes
]


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


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


TENSORS = st.dictionaries(st.text(st.characters(exclude_categories=("Cs",))), arrays(), min_size=1)


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (array.dtype, array.shape)
        assert actual[name].tobytes() == array.tobytes()


class Lazy:
    """An array that is computed when numpy asks for it."""

    def __init__(self, shape, dtype, make):
        self.shape, self.dtype, self.make = shape, np.dtype(dtype), make

    def __array__(self, dtype=None, copy=None):
        return self.make()


# What torch writes.


@pytest.mark.parametrize("file", EXPECTED)
def test_files_of_torch_give_what_torch_saw(file):
    tensors = read_pth(GOLDEN / file)
    assert sorted(tensors) == sorted(EXPECTED[file])
    for name, (dtype, shape, numbers) in EXPECTED[file].items():
        assert tensors[name].dtype.name == dtype
        assert list(tensors[name].shape) == shape
        assert tensors[name].reshape(-1).tolist() == numbers


def test_tensors_are_views_of_the_file():
    tensors = read_pth(GOLDEN / "plain-2.13.0.pth")
    for array in tensors.values():
        assert isinstance(array.base, mmap.mmap)
        assert not array.flags.writeable
    assert np.shares_memory(tensors["whole"], tensors["transposed"])
    assert tensors["transposed"].strides == (2, 12)


def test_the_path_may_be_text():
    assert read_pth(str(GOLDEN / "module-2.13.0.pth"))["1.num_batches_tracked"].shape == ()


# What is written.


@given(tensors=TENSORS)
def test_any_tensors_come_back(tensors, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "round.pth"
    write_pth(path, tensors)
    assert_same(read_pth(path), tensors)


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    tensors = read_pth(GOLDEN / "plain-2.13.0.pth")
    write_pth(tmp_path / "a.pth", tensors)
    write_pth(tmp_path / "b.pth", read_pth(tmp_path / "a.pth"))
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


def test_entries_are_aligned_as_torch_does(tmp_path):
    path = tmp_path / "a.pth"
    write_pth(path, {"x": np.ones((3, 5), np.float32), "y": np.zeros(1, np.int8)})
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        entries = archive.infolist()
        assert archive.read("archive/byteorder") == b"little"
        assert archive.read("archive/version") == b"3\n"
    names = ["data.pkl", "byteorder", "data/0", "data/1", "version"]
    assert [entry.filename for entry in entries] == [f"archive/{name}" for name in names]
    content = path.read_bytes()
    for entry in entries:
        lengths = struct.unpack_from("<2H", content, entry.header_offset + 26)
        assert (entry.header_offset + 30 + sum(lengths)) % 64 == 0


def test_writes_big_endian_and_lazy_arrays(tmp_path):
    path, calls = tmp_path / "a.pth", []
    lazy = Lazy((2,), "float16", lambda: calls.append(1) or np.array([1, 2], np.float16))
    write_pth(path, {"lazy": lazy, "big": np.array([1.5, -2], ">f4"), "one": np.float32(3)})
    assert calls == [1]
    expected = {
        "lazy": np.array([1, 2], np.float16),
        "big": np.array([1.5, -2], np.float32),
        "one": np.array(3, np.float32),
    }
    assert_same(read_pth(path), expected)


def test_a_file_can_be_written_over_while_it_is_read(tmp_path):
    path = tmp_path / "a.pth"
    write_pth(path, {"x": np.arange(1000)})
    tensors = read_pth(path)
    write_pth(path, {"y": tensors["x"][::-1]})
    np.testing.assert_array_equal(tensors["x"], np.arange(1000))
    np.testing.assert_array_equal(read_pth(path)["y"], np.arange(1000)[::-1])


def interrupted():
    raise KeyboardInterrupt


def full():
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("make", [interrupted, full, lambda: 1 / 0, lambda: np.zeros(3)])
def test_an_older_file_stays_if_writing_fails(tmp_path, make):
    path = tmp_path / "a.pth"
    write_pth(path, {"x": np.arange(3)})
    before = path.read_bytes()
    tensors = {"a": np.zeros(9), "x": Lazy((2,), "float64", make), "z": np.zeros(9)}
    with pytest.raises((KeyboardInterrupt, WeightsError, ZeroDivisionError, ValueError)):
        write_pth(path, tensors)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: full())
    message = fault(write_pth, tmp_path / "a.pth", {"x": np.zeros(3)})
    assert message == f"{tmp_path}/a.pth: No space left on device; free some space"
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "no" / "a.pth", tmp_path / "file" / "a.pth"):
        message = fault(write_pth, path, {"x": np.zeros(3)})
        assert message.startswith(f"{path}: No")
        assert message.endswith("; choose another place")
    assert fault(write_pth, tmp_path, {}).startswith(f"{tmp_path}: not a regular file; choose")


def test_a_dtype_that_torch_lacks_names_its_tensor(tmp_path):
    message = fault(write_pth, tmp_path / "a.pth", {"x.y": np.zeros(3, ml_dtypes.float8_e5m2)})
    assert message.endswith("a.pth: x.y has the type float8_e5m2; make it float32 or bfloat16")
    assert not list(tmp_path.iterdir())


REWRITE = """
import resource, sys
import numpy as np
from rwkv_jax.checkpoint.pth import read_pth, write_pth
from rwkv_jax.checkpoint.safetensors import read_safetensors, write_safetensors

def used():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmData")).split()[1])

limit = used() + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    np.ones(2 * int(sys.argv[1]), np.uint8)
    sys.exit("no limit")
except MemoryError:
    pass
tensors = read_safetensors("a.safetensors")
write_pth("a.pth", {name: x.T for name, x in tensors.items()})
write_safetensors("a.safetensors", read_pth("a.pth"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_DATA")
def test_rewriting_takes_memory_for_one_tensor(tmp_path):
    count, rows = 5, 3072
    size = rows * rows * 2
    header = {
        str(i): {"dtype": "F16", "shape": [rows, rows], "data_offsets": [size * i, size * (i + 1)]}
        for i in range(count)
    }
    text = json.dumps(header).encode()
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + count * size)
    done = subprocess.run(
        [sys.executable, "-c", REWRITE, str(size + (8 << 20))],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    if "no limit" in done.stderr:
        pytest.skip("the system does not limit a process's data")
    assert (done.returncode, done.stderr) == (0, "")


# What torch reads.


def test_torch_reads_what_is_written(torch, tmp_path):
    path = tmp_path / "a.pth"
    for file in EXPECTED:
        tensors = read_pth(GOLDEN / file)
        write_pth(path, tensors)
        ours = torch.load(path, weights_only=True, mmap=True)
        assert list(ours) == list(tensors)
        for name, (dtype, shape, numbers) in EXPECTED[file].items():
            assert str(ours[name].dtype) == f"torch.{dtype}"
            assert list(ours[name].shape) == shape
            assert ours[name].is_contiguous()
            assert ours[name].flatten().tolist() == numbers


@given(tensors=TENSORS)
def test_torch_reads_any_tensors(torch, tensors, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "torch.pth"
    write_pth(path, tensors)
    for name, tensor in torch.load(path, weights_only=True).items():
        array = tensors[name]
        assert (str(tensor.dtype), tuple(tensor.shape)) == (f"torch.{array.dtype}", array.shape)
        assert bytes(tensor.reshape(-1).view(torch.uint8).tolist()) == array.tobytes()


# What is damaged or malicious. Pickles are put together by hand.


def fault(call, *arguments):
    with pytest.raises(WeightsError) as caught:
        call(*arguments)
    assert str(caught.value).isprintable()
    return str(caught.value)


def value(x):
    return pickle.dumps(x, 2)[2:-1]


def name(full):
    module, _, last = full.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def stack_name(module, last):
    return value(module) + value(last) + b"\x93"


def storage(kind="torch.FloatStorage", key="0", length=6):
    return b"(" + value("storage") + name(kind) + value(key) + value("cpu") + value(length) + b"tQ"


def tensor(where=None, offset=0, shape=(2, 3), strides=(3, 1), rest=b""):
    return (
        name("torch._utils._rebuild_tensor_v2")
        + b"("
        + (storage() if where is None else where)
        + value(offset)
        + value(shape)
        + value(strides)
        + value(False)
        + name("collections.OrderedDict")
        + b")R"
        + rest
        + b"tR"
    )


def state(part):
    """A pickle of a dict with one item, `w`."""
    return b"\x80\x02}" + value("w") + part + b"s."


NUMBERS = np.arange(6, dtype="<f4")
DATA = NUMBERS.tobytes()
PROTO = b"\x80\x02"


def archive(path, pickled, entries=(("a/data/0", DATA),), **options):
    with zipfile.ZipFile(path, "w", **options) as zipped:
        zipped.writestr("a/data.pkl", pickled)
        for entry, content in entries:
            zipped.writestr(entry, content)
    return path


def test_handmade_pickles_are_read(tmp_path):
    tensors = read_pth(archive(tmp_path / "a.pth", state(tensor())))
    assert_same(tensors, {"w": NUMBERS.reshape(2, 3)})


COMMAND = "touch run"
CODE = "open('run', 'w').close()"
RUN = {
    "os.system": name("os.system") + value((COMMAND,)) + b"R",
    "posix.system": name("posix.system") + value((COMMAND,)) + b"R",
    "builtins.eval": name("builtins.eval") + value((CODE,)) + b"R",
    "__builtin__.eval": name("__builtin__.eval") + value((CODE,)) + b"R",
    "builtins.exec": stack_name("builtins", "exec") + value((CODE,)) + b"R",
    "subprocess.getoutput": name("subprocess.getoutput") + value((COMMAND,)) + b"R",
    "functools.partial": name("functools.partial") + b"(" + name("os.system") + b"tR",
    "builtins.getattr": (
        name("builtins.getattr") + b"(" + name("os.path") + value("genericpath") + b"tR"
    ),
    "OrderedDict.__init__.__globals__": stack_name(
        "collections", "OrderedDict.__init__.__globals__"
    ),
    "INST": b"(" + value(COMMAND) + b"ios\nsystem\n",
}
"""Pickles that run code when unpickled, or refer to functions that do, and the message about
each."""


@pytest.mark.parametrize("culprit", RUN)
def test_no_code_is_run(culprit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = fault(read_pth, archive(tmp_path / "a.pth", state(RUN[culprit])))
    assert culprit in message
    assert "which no state dict needs; save the state dict alone" in message
    assert message.endswith("it could run code when loaded")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("culprit", ["os.system", "builtins.eval", "__builtin__.eval", "INST"])
def test_the_attacks_are_real(culprit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(state(RUN[culprit]))
    assert (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "culprit",
    [
        "builtins.__import__",
        "builtins.object",
        "copyreg._reconstructor",
        "ctypes.CDLL",
        "marshal.loads",
        "numpy.core.multiarray._reconstruct",
        "operator.attrgetter",
        "pickle.loads",
        "runpy.run_path",
        "torch.load",
        "torch.hub.load",
        "torch.storage._load_from_bytes",
        "torch._utils._rebuild_qtensor",
        "torch.FloatStorage.__init__",
        "torch.int32.__class__",
        "xcollections.OrderedDict",
        "types.FunctionType",
        "__main__.RWKV",
    ],
)
def test_names_that_no_state_dict_needs_are_refused(culprit, tmp_path):
    message = fault(read_pth, archive(tmp_path / "a.pth", state(name(culprit))))
    assert f"a.pth: refers to {culprit}, which no state dict needs" in message


def test_names_cannot_write_on_the_terminal(tmp_path):
    pickled = state(stack_name("os", "\x1b[2J\r\u202esystem\n" + "x" * 10**6))
    message = fault(read_pth, archive(tmp_path / "a.pth", pickled))
    assert r"refers to os.\x1b[2J\r\u202esystem\nxxx" in message
    assert len(message) < 300 + len(str(tmp_path))


@pytest.fixture
def extension():
    """`os.system` as number 7 of copyreg's registry, already looked up by someone else."""
    copyreg.add_extension("os", "system", 7)
    assert pickle.loads(b"\x80\x02\x82\x07.") is os.system
    yield
    copyreg.remove_extension("os", "system", 7)


@pytest.mark.parametrize(
    "opcode, pickled",
    [
        ("EXT1", b"\x82\x07" + value((COMMAND,)) + b"R"),
        ("EXT2", b"\x83\x07\0"),
        ("OBJ", b"(" + name("collections.OrderedDict") + b"o"),
        ("NEWOBJ", name("collections.OrderedDict") + b")\x81"),
        ("NEWOBJ_EX", name("collections.OrderedDict") + b")}\x92"),
        ("PERSID", b"P../../etc/passwd\n"),
        ("DUP", b"N2"),
        ("NEXT_BUFFER", b"\x97"),
    ],
)
def test_opcodes_that_no_state_dict_needs_are_refused(opcode, pickled, extension, tmp_path):
    message = fault(read_pth, archive(tmp_path / "a.pth", state(pickled)))
    assert f"a.pth: its pickle uses {opcode}, which no state dict needs" in message


def test_setting_state_changes_nothing(tmp_path):
    """BUILD sets attributes of the object on the stack: here objects have none."""
    poison = value({"items": 1, "__setstate__": 2, "__class__": 3}) + b"b"
    poison += value((None, {"__class__": 3, "get": 4})) + b"b"
    made = name("collections.OrderedDict") + poison + b")R" + poison
    path = archive(
        tmp_path / "a.pth", PROTO + made + value("w") + tensor() + poison + b"s" + poison + b"."
    )
    for _ in range(2):
        assert_same(read_pth(path), {"w": NUMBERS.reshape(2, 3)})


DEEP = b")" + b"\x85" * 100_000
WIDE = b")" + b"q\0h\0\x86" * 100
"""A tuple in a tuple in ...: too deep to print, or too long, 2^100, to print or to hash."""


@pytest.mark.parametrize(
    "pickled, expected",
    [
        (PROTO + b"}" + value("w") + DEEP + b"s.", "holds no named tensors"),
        (PROTO + b"}" + WIDE + b"Ns.", "holds no named tensors"),
        (PROTO + WIDE + b")\x93.", "refers to something that is not a name"),
        (PROTO + WIDE + b"Q.", "describes a storage in another way"),
        (PROTO + WIDE + b")R.", "makes a call that torch does not make"),
        (PROTO + b"]q\0h\0a.", "holds no named tensors"),
        (PROTO + b"}" + value("model") + b"q\0h\0s.", "holds no named tensors"),
        (PROTO + b"\x95" + b"\xff" * 8 + b"N.", "holds no named tensors"),
        (PROTO + b"Nr\xff\xff\xff\x7f.", "holds no named tensors"),
        (PROTO + b"\x8d" + b"\xff" * 7 + b"\x7f", "damaged"),
        (PROTO + b"\x8b\xff\xff\xff\x7f", "damaged"),
        (PROTO + b"\x8b\0\0\1\0" + bytes(65535) + b"\1.", "holds no named tensors"),
        (PROTO + b"}q\0" + b"".join(value(str(i)) + b"h\0s" for i in range(9999)) + b".", "holds"),
        (PROTO + b"I" + b"9" * 10000 + b"\n", "damaged"),
    ],
)
def test_little_files_take_little_time_and_memory(pickled, expected, tmp_path):
    mega = 1 << (20 if sys.platform == "darwin" else 10)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert expected in fault(read_pth, archive(tmp_path / "a.pth", pickled))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * mega


@pytest.mark.parametrize(
    "pickled, expected",
    [
        (b"", "damaged"),
        (b"N", "damaged"),
        (PROTO + b"h\5.", "its pickle uses an item that it never stored"),
        (PROTO + b"s.", "its pickle uses an item that it never stored"),
        (PROTO + b"NNNs.", "sets items of something that is not a dict"),
        (PROTO + b"NNa.", "appends to something that is not a list"),
        (PROTO + b"}(Nu.", "damaged"),
        (PROTO + name("torch.FloatStorage") + b")R.", "makes a call that torch does not make"),
        (
            PROTO + name("collections.OrderedDict") + b"K\1\x85R.",
            "makes a call that torch does not make",
        ),
        (state(b"(" + value("storage") + b"tQ"), "describes a storage in another way"),
        (state(storage(key="../../etc/passwd")), "holds no named tensors"),
        (state(tensor(b"N")), "describes a tensor in another way"),
        (state(tensor(shape=[2, 3])), "describes a tensor in another way"),
        (state(tensor(storage(key="7"))), "its entry a/data/7 is missing; download it again"),
        (state(tensor(storage(key="../data.pkl"))), "its entry a/data/../data.pkl is missing"),
        (state(tensor(storage(length=5))), "w reaches outside its storage"),
        (state(tensor(storage(length=-6))), "w has impossible strides"),
        (state(tensor(storage(length=2**40), shape=(7,), strides=(1,))), "w reaches outside"),
        (state(tensor(storage("torch.DoubleStorage"))), "w reaches outside its storage"),
        (state(tensor(offset=1)), "w reaches outside its storage"),
        (state(tensor(offset=-1)), "w has impossible strides"),
        (state(tensor(strides=(4, 1))), "w reaches outside its storage"),
        (state(tensor(strides=(2**62, 2**62))), "w reaches outside its storage"),
        (state(tensor(offset=6, strides=(-3, -1))), "w has impossible strides"),
        (state(tensor(strides=(3,))), "w has an impossible shape"),
        (state(tensor(strides=("3", 1))), "w has impossible strides"),
        (state(tensor(shape=(-2, -3))), "w has an impossible shape"),
        (state(tensor(shape=(2, 3.0))), "w has an impossible shape"),
        (state(tensor(shape=(1,) * 65, strides=(0,) * 65)), "w has an impossible shape"),
        (state(tensor(shape=(0, 2**62), strides=(1, 1))), "w has an impossible shape"),
        (state(tensor(shape=(2**29, 2**29), strides=(0, 0))), "w is larger than the file; save"),
        (
            state(tensor(storage("torch.ComplexFloatStorage"))),
            "w has the type torch.ComplexFloatStorage",
        ),
        (
            state(tensor(storage("torch.QInt8Storage"))),
            "w has the type torch.QInt8Storage; save it as",
        ),
        (
            state(tensor(rest=name("torch.float8_e5m2"))),
            "w has the type torch.float8_e5m2; save it as",
        ),
        (state(tensor(rest=value({"conj": True}))), "w is a conjugate or negative view; save a"),
        (PROTO + tensor() + b".", "holds no named tensors; save model.state_dict()"),
        (PROTO + b"}K\1" + tensor() + b"s.", "holds no named tensors"),
    ],
)
def test_damaged_pickles_are_one_line(pickled, expected, tmp_path):
    message = fault(read_pth, archive(tmp_path / "a.pth", pickled))
    assert message.startswith(f"{tmp_path}/a.pth: ")
    assert expected in message


def test_empty_and_broadcast_tensors_may_have_any_strides(tmp_path):
    one = tensor(shape=(1, 6, 1), strides=(2**62, 1, 2**62))
    none = tensor(offset=2**62, shape=(0, 6), strides=(2**62, 2**62))
    same = tensor(shape=(3, 2), strides=(0, 0))
    for part, expected in (one, NUMBERS.reshape(1, 6, 1)), (none, np.zeros((0, 6), "f4")):
        assert_same(read_pth(archive(tmp_path / "a.pth", state(part))), {"w": expected})
    assert not read_pth(archive(tmp_path / "a.pth", state(same)))["w"].any()


def patched(path, old, new):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    return path


def test_damaged_archives_are_one_line(tmp_path):
    good, path = state(tensor()), tmp_path / "a.pth"
    number = [("a/data/0", DATA)]
    for pickled, entries, options, expected in (
        (good, [], {}, "its entry a/data/0 is missing; download it again"),
        (good, [("a/data/0", DATA[:-1])], {}, "w reaches outside its storage"),
        (good, [("b/data/0", DATA)], {}, "its entry a/data/0 is missing; download it again"),
        (good, [*number, ("a/byteorder", "big")], {}, "is big-endian; save it again on a little"),
        (good, [*number, ("b/data.pkl", good)], {}, "holds 2 data.pkl, not one; save it with"),
        (good, number, {"compression": zipfile.ZIP_DEFLATED}, "is compressed or encrypted; save"),
        (
            good + bytes(16 << 20),
            number,
            {},
            "its entry data.pkl is too large; save the state dict",
        ),
    ):
        assert expected in fault(read_pth, archive(path, pickled, entries, **options))
    archive(path, good, [*number, ("a/data/1", DATA)])
    assert "two entries are named a/data/0" in fault(
        read_pth, patched(path, b"a/data/1", b"a/data/0")
    )
    archive(path, good)
    assert "holds 0 data.pkl, not one" in fault(read_pth, patched(path, b"data.pkl", b"data.txt"))


def test_damaged_directories_are_one_line(tmp_path):
    path = archive(tmp_path / "a.pth", state(tensor()))
    content = path.read_bytes()
    last = content.rindex(b"PK\1\2")
    for offset, field, expected in (
        (8, b"\1\0", "a/data/0 is compressed or encrypted"),
        (24, b"\xff\0\0\0", "a/data/0 reaches beyond the end of the file"),
        (42, b"\xff\xff\xff\0", "a/data/0 is not where it should be"),
        (0, b"PK\1\3", "(Bad magic number for central directory): truncated? download it"),
    ):
        at = last + offset
        path.write_bytes(content[:at] + field + content[at + len(field) :])
        assert expected in fault(read_pth, path)


LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "is empty; download or save it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer, not"),
        (b"\n <!DOCTYPE html>\n<html>", "is a web page, not weights: a failed download; down"),
        (b"GGUF\3\0\0\0", "is a GGUF file; take the model's .pth or .safetensors"),
        (b"\2\0\0\0\0\0\0\0{}", "is a safetensors file; name it .safetensors"),
        (LEGACY, "is from PyTorch before 1.6, or not weights; load and save it with a newer torch"),
        (b"Entry not found", "is neither a .pth nor a .safetensors file, or damaged; download it"),
        (
            b"PK\3\4",
            "has no complete zip directory at its end (seek out of range): truncated? down",
        ),
        (
            b"PK\3\4" + bytes(99),
            "has no complete zip directory at its end (File is not a zip file)",
        ),
    ],
)
def test_other_files_are_recognised_by_their_first_bytes(content, expected, tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    assert fault(read_pth, path).startswith(f"{path}: {expected}")


def test_paths_that_are_not_files(tmp_path):
    path = tmp_path / "a.pth"
    assert fault(read_pth, path) == (
        f"{path}: cannot be read (No such file or directory);"
        " name a file that exists and is readable"
    )
    assert fault(read_pth, tmp_path) == f"{tmp_path}: is a folder; name a file"
    os.mkfifo(path)
    assert fault(read_pth, path) == f"{path}: is not a regular file; name one"


@pytest.mark.parametrize("file", EXPECTED)
def test_any_damage_is_an_error_or_none(file, tmp_path):
    check_any_damage(read_pth, (GOLDEN / file).read_bytes(), tmp_path / "a.pth", 40)
