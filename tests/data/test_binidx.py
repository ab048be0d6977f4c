"""The official pair of files: what is written, byte for byte, and the messages about damaged
ones."""

import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_jax.data import binidx as module
from rwkv_jax.data.binidx import BinidxWriter, dtype_for, is_binidx, merge, open_binidx
from rwkv_jax.data.files import CorpusError

TYPES = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}
"""Code -> the letter of `struct`, from the description of the format."""
NUMPY = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
DOCUMENTS = [[5, 6, 0], [7, 0], [0], [1, 2, 3, 4, 0]]


def official(documents: list[list[int]], code: int = 8, marks: list[int] | None = None):
    """`.bin` and `.idx` by the description alone."""
    letter = TYPES[code]
    data = b"".join(struct.pack(f"<{len(ids)}{letter}", *ids) for ids in documents)
    width, count = struct.calcsize(f"<{letter}"), len(documents)
    ends = list(itertools.accumulate((len(ids) * width for ids in documents), initial=0))
    marks = list(range(count + 1)) if marks is None else marks
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, count, len(marks))
    index += struct.pack(f"<{count}i", *map(len, documents))
    index += struct.pack(f"<{count}q", *ends[:-1]) + struct.pack(f"<{len(marks)}q", *marks)
    return data, index


def put(path: Path, data: bytes, index: bytes) -> Path:
    path.with_name(path.name + ".bin").write_bytes(data)
    path.with_name(path.name + ".idx").write_bytes(index)
    return path


def written(path: Path) -> tuple[bytes, bytes]:
    return tuple(path.with_name(path.name + end).read_bytes() for end in (".bin", ".idx"))


def write(path: Path, documents: list[list[int]], dtype=np.uint16) -> Path:
    with BinidxWriter(path, dtype) as writer:
        for ids in documents:
            writer.add(ids)
    return path


def fault(path: Path) -> str:
    with pytest.raises(CorpusError) as caught:
        open_binidx(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and "; " in message
    return message


@st.composite
def of_a_type(draw):
    code = draw(st.sampled_from(sorted(TYPES)))
    limits = np.iinfo(NUMPY[code])
    ids = st.integers(int(limits.min), int(limits.max))
    return code, draw(st.lists(st.lists(ids, max_size=5), max_size=6))


@given(of_a_type(), st.integers(1, 3))
def test_round_trip_and_every_byte(tmp_path_factory, drawn, rows):
    code, documents = drawn
    path = tmp_path_factory.mktemp("pair") / "a.v1"  # a dot is no ending
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROWS", rows)
        write(path, documents, NUMPY[code])
        pair = open_binidx(path)
    assert written(path) == official(documents, code)
    assert pair.path == path and pair.tokens.dtype == NUMPY[code]
    starts = pair.starts
    assert starts.dtype == np.int64 and starts[-1] == len(pair.tokens)
    found = [pair.tokens[a:b].tolist() for a, b in itertools.pairwise(starts)]
    assert found == documents and pair.sizes.tolist() == [len(ids) for ids in documents]


@given(of_a_type(), st.lists(st.integers(0, 6), max_size=3))
def test_merged_is_what_one_writer_writes(tmp_path_factory, drawn, cuts):
    code, documents = drawn
    folder = tmp_path_factory.mktemp("parts")
    bounds = [0, *sorted(cuts), len(documents)]
    parts = [
        write(folder / str(i), documents[a:b], NUMPY[code])
        for i, (a, b) in enumerate(itertools.pairwise(bounds))
    ]
    copied = []
    merge(parts, folder / "all", copied.append)
    assert written(folder / "all") == official(documents, code)
    assert sum(copied) == len(written(folder / "all")[0])


def test_merging_keeps_documents_of_several_items(tmp_path):
    first = put(tmp_path / "a", *official(DOCUMENTS, marks=[0, 2, 2, 4]))
    second = put(tmp_path / "b", *official(DOCUMENTS[:2], marks=[0, 2]))
    merge([first, second], tmp_path / "c")
    assert written(tmp_path / "c") == official(DOCUMENTS + DOCUMENTS[:2], marks=[0, 2, 2, 4, 6])


def test_merging_without_copy_file_range(tmp_path, monkeypatch):
    def none(*_):
        raise OSError("not between these")

    monkeypatch.setattr(module.os, "copy_file_range", none, raising=False)
    parts = [write(tmp_path / name, DOCUMENTS) for name in "ab"]
    merge(parts, tmp_path / "c")
    assert written(tmp_path / "c") == official(DOCUMENTS * 2)


def test_only_pairs_of_one_type_are_merged(tmp_path):
    parts = [write(tmp_path / "a", DOCUMENTS), write(tmp_path / "b", DOCUMENTS, np.int32)]
    with pytest.raises(CorpusError, match=r"b\.bin: int32 tokens, but those before it are uint16"):
        merge(parts, tmp_path / "c")
    assert not list(tmp_path.glob("c*"))


def test_a_document_may_come_in_pieces(tmp_path):
    with BinidxWriter(tmp_path / "a", np.uint16) as writer:
        writer.add([1, 2], np.array([3, 4]), [], [0])
    assert (writer.documents, writer.tokens) == (1, 5)
    assert written(tmp_path / "a") == official([[1, 2, 3, 4, 0]])


def test_documents_of_several_items_and_of_none(tmp_path):
    path = put(tmp_path / "a", *official(DOCUMENTS, marks=[0, 2, 2, 4, 4]))
    assert open_binidx(path).starts.tolist() == [0, 5, 5, 11, 11]


def test_named_by_prefix_or_either_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a", DOCUMENTS)
    for name in (path, f"{path}.bin", f"{path}.idx", str(path)):
        assert open_binidx(name).path == path
        assert is_binidx(str(name))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert is_binidx("~/a") and open_binidx("~/a").path == path
    assert is_binidx(f"{tmp_path}/gone.bin")  # opening it names the missing file
    for name in (f"{tmp_path}/gone", f"{tmp_path}/*.bin", "stdlib", str(tmp_path)):
        assert not is_binidx(name)
    path.mkdir()
    assert not is_binidx(str(path))


def test_tokens_are_mapped_and_read_only(tmp_path):
    tokens = open_binidx(write(tmp_path / "a", DOCUMENTS)).tokens
    assert isinstance(tokens, np.memmap) and not tokens.flags.writeable


def test_types_of_vocabularies():
    assert [dtype_for(n) for n in (257, 65536, 65537)] == [np.uint16, np.uint16, np.int32]


def test_ids_that_do_not_fit(tmp_path):
    before = written(write(tmp_path / "a", DOCUMENTS))
    for ids in ([1, 65536], np.array([-1]), [2**40]):
        with (
            pytest.raises(CorpusError, match=r"document 1 has the id .* uint16 cannot hold"),
            BinidxWriter(tmp_path / "a", np.uint16) as writer,
        ):
            writer.add([0])
            writer.add(ids)
    assert written(tmp_path / "a") == before


def test_items_longer_than_their_index_can_say(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LONGEST", 3)
    with pytest.raises(CorpusError, match="document 0 has 4 tokens, more than the 3 of an item"):
        write(tmp_path / "a", [[1, 2, 3, 4]])


@pytest.mark.parametrize("there", [False, True])
def test_an_exception_leaves_an_older_pair(tmp_path, there):
    if there:
        write(tmp_path / "a", DOCUMENTS)
    names = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt), BinidxWriter(tmp_path / "a", np.uint16) as writer:
        writer.add([1, 2, 3])
        assert {"a.bin.partial", "a.idx.partial"} <= {path.name for path in tmp_path.iterdir()}
        raise KeyboardInterrupt
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == names


def test_a_new_pair_replaces_the_old_one(tmp_path):
    write(tmp_path / "a", DOCUMENTS)
    (tmp_path / "a.bin.partial").write_bytes(b"left by a kill, and longer than what comes")
    write(tmp_path / "a", DOCUMENTS[:2])
    assert written(tmp_path / "a") == official(DOCUMENTS[:2])
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin", "a.idx"}


def test_missing_partner(tmp_path):
    write(tmp_path / "a", DOCUMENTS)
    (tmp_path / "a.idx").unlink()
    assert "a.idx: no such file; a pair is .bin and .idx" in fault(tmp_path / "a")
    (tmp_path / "a.bin").rename(tmp_path / "b")
    (tmp_path / "a.idx").write_bytes(b"")
    assert "a.bin: no such file; a pair is .bin and .idx" in fault(tmp_path / "a")


def test_unreadable(tmp_path, monkeypatch):
    path = write(tmp_path / "a", DOCUMENTS)

    def barred(*_, **__):
        raise PermissionError(13, "Permission denied", f"{path}.bin")

    monkeypatch.setattr(module, "map_array", barred)
    assert "a.bin: cannot be read (Permission denied)" in fault(path)


def packed(at: int, form: str, value: int):
    """Overwrites a number of the index."""

    def damage(data: bytes, index: bytes) -> tuple[bytes, bytes]:
        place = at if at >= 0 else len(index) + at
        new = struct.pack(f"<{form}", value)
        return data, index[:place] + new + index[place + len(new) :]

    return damage


SIZES, POINTERS, MARKS = 34, 34 + 4 * 4, 34 + 12 * 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data, index: (data, b"NOTANIDX\0" + index[9:]), "not a binidx index"),
        (lambda data, index: (data, b""), "ends at byte 0, inside its header of 34"),
        (lambda data, index: (data, index[:33]), "ends at byte 33, inside its header"),
        (packed(9, "Q", 2), "byte 9: version 2, only 1 is known"),
        (packed(17, "B", 9), "byte 17: items are of an unknown type (code 9)"),
        (packed(17, "B", 0), "byte 17: items are of an unknown type (code 0)"),
        (packed(17, "B", 6), "floating-point numbers, not tokens (code 6)"),
        (packed(17, "B", 7), "floating-point numbers, not tokens (code 7)"),
        (lambda data, index: (data, index[:-1]), "a.idx: truncated: 121 bytes"),
        (lambda data, index: (data, index + b"\0"), "a.idx: too long: 123 bytes"),
        (packed(18, "Q", 2**64 - 1), "a.idx: truncated: 122 bytes, but 18,446,744,073,709,551,615"),
        (lambda data, index: (data[:-1], index), "a.bin: truncated at byte 21, inside a token"),
        (lambda data, index: (data[:-2], index), "a.bin: truncated: 20 bytes, but item 3 ends"),
        (lambda data, index: (b"", index), "a.bin: truncated: 0 bytes, but item 0 ends"),
        (lambda data, index: (data + b"\0\0", index), "24 bytes, but the items of a.idx end at"),
        (packed(SIZES + 4, "i", -2), "item 1 has -2 tokens"),
        (packed(SIZES, "i", 4), "item 1 begins at byte 6 of a.bin, inside another"),
        (packed(POINTERS, "q", 2), "item 0 begins at byte 2 of a.bin, after bytes of no item"),
        (packed(POINTERS + 8, "q", 7), "item 1 begins at byte 7 of a.bin, inside a token of 2"),
        (packed(POINTERS + 8, "q", 40), "item 1 begins at byte 40 of a.bin, outside its 22"),
        (packed(POINTERS + 16, "q", -2), "item 2 begins at byte -2 of a.bin, outside its 22"),
        (packed(SIZES + 12, "i", 6), "a.bin: truncated: 22 bytes, but item 3 ends at byte 24"),
        (packed(MARKS, "q", 1), "its document marks begin at item 1, not 0"),
        (packed(MARKS + 8, "q", 3), "document 2 begins at item 2, before the last one at 3"),
        (packed(MARKS + 16, "q", 9), "document 2 begins at item 9 of 4"),
        (packed(MARKS + 32, "q", 9), "document 4 begins at item 9 of 4"),
        (packed(MARKS + 32, "q", 3), "its documents end at item 3 of 4"),
    ],
)
@pytest.mark.parametrize("rows", [1, 2, 1 << 20])
def test_damage_is_named_by_file_and_place(tmp_path, monkeypatch, damage, message, rows):
    monkeypatch.setattr(module, "ROWS", rows)
    path = put(tmp_path / "a", *damage(*official(DOCUMENTS)))
    assert message in fault(path)


def test_marks_may_not_be_missing(tmp_path):
    assert "document marks are missing" in fault(put(tmp_path / "a", *official([], marks=[])))
