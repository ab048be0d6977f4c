"""Files, folders, globs and JSON lines as documents, and the messages about bad ones."""

import gzip
import json
import sysconfig
from pathlib import Path

import pytest
import zstandard

from rwkv_jax.config import DataConfig
from rwkv_jax.data.corpus import CorpusError, Document, open_corpus
from rwkv_jax.data.files import CHUNK, SourceFile, find_files, read_chunks, read_lines


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def documents(source: Path | str, **settings) -> list[Document]:
    return list(open_corpus(DataConfig(source=str(source), **settings)).documents())


def compress(data: bytes, suffix: str) -> bytes:
    return {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix](data)


def fault(source: Path | str, **settings) -> str:
    with pytest.raises(CorpusError) as caught:
        documents(source, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def tree(tmp_path) -> Path:
    root = tmp_path / "text"
    for name in ("b.txt", "a/z.txt", "a/b/c.md", "a.txt"):
        write(root / name, f"text of {name}\r\n\tsecond line")
    write(root / "empty.txt", "")
    write(root / ".hidden/x.txt", "hidden")
    write(root / "a/.hidden.txt", "hidden")
    return root


def test_folder_is_read_in_order_of_names_byte_for_byte(tree):
    found = documents(tree)
    assert [d.name for d in found] == ["a.txt", "a/b/c.md", "a/z.txt", "b.txt"]
    assert all(d.text == f"text of {d.name}\r\n\tsecond line" for d in found)


def test_names_do_not_depend_on_where_the_folder_lies(tree, tmp_path):
    moved = tree.rename(tmp_path / "elsewhere")
    before = open_corpus(DataConfig(source=str(moved))).fingerprint
    again = moved.rename(tmp_path / "text")
    assert open_corpus(DataConfig(source=str(again))).fingerprint == before


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.txt", ["a.txt", "b.txt"]),
        ("**/*.txt", ["a.txt", "a/z.txt", "b.txt"]),
        ("a/*/c*", ["b/c.md"]),
    ],
)
def test_globs(tree, pattern, names):
    assert [d.name for d in documents(f"{tree}/{pattern}")] == names


def test_relative_glob(tree, monkeypatch):
    monkeypatch.chdir(tree)
    assert [d.name for d in documents("*.txt")] == ["a.txt", "b.txt"]


def test_stdlib_is_this_interpreters_source_without_installed_packages():
    files = find_files("stdlib")
    names = [file.name for file in files]
    assert names == sorted(names)
    assert {"ast.py", "json/decoder.py"} <= set(names)
    assert all(name.endswith(".py") and "-packages/" not in name for name in names)
    assert str(files[0].path).startswith(sysconfig.get_path("stdlib"))


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_file_of_one_line_has_a_heldout_end(tmp_path, end):
    path = write(tmp_path / "a.txt", "é" * 1000 + end)
    train, heldout = documents(path, heldout=0.25)
    assert (train.text + heldout.text, heldout.heldout) == ("é" * 1000 + end, True)
    assert 250 <= len(heldout.text) <= 251
    assert [d.heldout for d in documents(path, heldout=0.0)] == [False]


def test_files_that_are_not_utf8_are_skipped_in_a_folder_and_counted(tree):
    clean = open_corpus(DataConfig(source=str(tree)))
    write(tree / "latin.txt", "naïve".encode("latin-1"))
    write(tree / "late.txt", b"x" * (CHUNK - 1) + "é".encode() + b"\xff")
    write(tree / "image.bin", b"abc\0def")
    corpus = open_corpus(DataConfig(source=str(tree)))
    assert (clean.skipped, corpus.skipped) == ({}, {"not readable UTF-8 text": 3})
    assert list(corpus.documents()) == list(clean.documents())


def test_a_character_across_two_chunks_is_text(tmp_path):
    text = "x" * (CHUNK - 1) + "é" + "y" * CHUNK
    write(tmp_path / "a.txt", text)
    write(tmp_path / "b.txt", "b")
    assert documents(tmp_path)[0].text == text


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_lines_of_any_length_and_end(tmp_path, suffix):
    lines = ["first", "", "é" * CHUNK, " indented\r in the middle", "last"]
    path = write(tmp_path / f"a.txt{suffix}", compress("\n".join(lines).encode(), suffix))
    assert [line.decode() for line in read_lines(SourceFile(path, "a"))] == lines
    path = write(
        tmp_path / f"a.txt{suffix}", compress(("\r\n".join(lines) + "\r\n").encode(), suffix)
    )
    assert [line.decode() for line in read_lines(SourceFile(path, "a"))] == lines


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines(tmp_path, suffix):
    texts = ["one\ntwo", "\u2028 and \U0001f600", "", "one\ntwo"]
    lines = [json.dumps({"id": i, "content": text}) for i, text in enumerate(texts)]
    path = write(tmp_path / f"a.jsonl{suffix}", compress("\n\n".join(lines).encode(), suffix))
    for source in (path, tmp_path, f"{tmp_path}/*"):
        found = documents(source, field="content")
        assert [d.text for d in found] == ["one\ntwo", "\u2028 and \U0001f600", "one\ntwo"]
        assert [d.name for d in found] == [f"{path.name}:{n}" for n in (1, 3, 7)]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_text_is_text_and_may_have_several_members(tmp_path, suffix):
    write(tmp_path / f"a.txt{suffix}", compress(b"one ", suffix) + compress(b"two", suffix))
    write(tmp_path / "b.txt", "three")
    assert [d.text for d in documents(tmp_path)] == ["one two", "three"]


def test_reported_bytes_are_those_on_disk(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 5_000))
    corpus = open_corpus(DataConfig(source=str(path)))
    counted = []
    list(corpus.documents(counted.append))
    assert sum(counted) == corpus.bytes_on_disk == path.stat().st_size


def test_split_is_by_name_and_moves_no_document_when_others_come(tmp_path):
    for i in range(300):
        write(tmp_path / f"{i}.txt", f"text {i}")
    before = {d.name: d.heldout for d in documents(tmp_path, heldout=0.2)}
    for i in range(300):
        write(tmp_path / f"{i}.txt", f"other text {i}")
        write(tmp_path / f"new/{i}.txt", f"text {i}")
    after = {d.name: d.heldout for d in documents(tmp_path, heldout=0.2)}
    assert after.items() >= before.items()
    assert 0.15 < sum(after.values()) / len(after) < 0.25
    larger = {d.name: d.heldout for d in documents(tmp_path, heldout=0.4)}
    assert all(larger[name] for name, heldout in after.items() if heldout)
    assert not any(d.heldout for d in documents(tmp_path, heldout=0.0))


def test_equal_lines_are_on_one_side(tmp_path):
    path = write(tmp_path / "a.txt", "\n".join(str(i % 50) for i in range(500)))
    found = documents(path, document="line", heldout=0.3)
    sides = {d.text: {e.heldout for e in found if e.text == d.text} for d in found}
    assert len(found) == 500
    assert all(len(side) == 1 for side in sides.values())
    assert {frozenset(side) for side in sides.values()} == {frozenset({True}), frozenset({False})}


def test_the_end_of_a_lone_file_is_held_out_from_a_line_start_on(tmp_path):
    text = "".join(f"line {i}\n" for i in range(1000))
    first, last = documents(write(tmp_path / "a.txt", text), heldout=0.1)
    assert (first.heldout, last.heldout) == (False, True)
    assert first.text + last.text == text
    assert first.text.endswith("\n")
    assert abs(len(last.text) - 0.1 * len(text)) < 20
    (whole,) = documents(tmp_path / "a.txt", heldout=0.0)
    assert whole.text == text


@pytest.mark.parametrize(
    "change",
    [{"field": "body"}, {"document": "line"}, {"heldout": 0.04}, {"template": "world"}],
)
def test_fingerprint_changes_with_settings_that_change_documents(tree, change):
    write(tree / "c.jsonl", '{"text": "a", "body": "b"}\n')
    cfg = {"source": str(tree)}
    assert (
        open_corpus(DataConfig(**cfg)).fingerprint
        != open_corpus(DataConfig(**cfg, **change)).fingerprint
    )


def test_fingerprint_changes_with_content_and_names(tree):
    seen = {open_corpus(DataConfig(source=str(tree))).fingerprint}
    write(tree / "b.txt", "text of b.txt\r\n\tsecond lime")
    seen.add(open_corpus(DataConfig(source=str(tree))).fingerprint)
    (tree / "b.txt").rename(tree / "c.txt")
    seen.add(open_corpus(DataConfig(source=str(tree))).fingerprint)
    assert len(seen) == 3


def test_missing_source(tmp_path):
    assert fault(tmp_path / "no").startswith(f"data.source = {tmp_path}/no: no such file or folder")


def test_nothing_in_the_source(tmp_path):
    assert "no files in it" in fault(tmp_path)
    assert "no files in it" in fault(f"{tmp_path}/*.txt")
    write(tmp_path / "x.bin", b"\0")
    assert "none of its files can be read: 1 are not readable UTF-8 text" in fault(tmp_path)


def test_lone_file_in_another_encoding(tmp_path):
    path = write(tmp_path / "a.txt", b"abc\xe9def")
    assert fault(path) == f"{path}: not UTF-8 at byte 3; convert it to UTF-8 text first"
    path = write(tmp_path / "b.txt", b"x" * CHUNK + b"\xc3")
    assert f"not UTF-8 at byte {CHUNK}" in fault(path)
    path = write(tmp_path / "c.txt", b"abc\0")
    assert "a NUL at byte 3" in fault(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "not JSON"),
        ('["text"]', "a list, not an object with a field 'text'"),
        (
            '{"body": "a", "id": 1}',
            "no field 'text'; set data.field to one of its fields: body, id",
        ),
        ('{"text": 5}', "field 'text': a number, not text or a list of turns; set data.field"),
        ('{"text": "\\ud800"}', "field 'text' holds half a surrogate pair; correct it"),
        ('{"text": null}', "field 'text' is null; correct it, or set data.strict"),
    ],
)
def test_bad_json_lines_are_named_by_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n\n' + line + "\n")
    assert fault(path).startswith(f"{path}:3: {message}")


def test_json_lines_in_another_encoding(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "fine"}\n{"text": "\xe9"}\n')
    assert fault(path).startswith(f"{path}:2: not UTF-8")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_compressed_data_truncated_or_damaged(tmp_path, name, suffix):
    whole = compress(b"\n".join(b'{"text": "%d"}' % i for i in range(1000)), suffix)
    path = write(tmp_path / (name + suffix), whole[:-9])
    write(tmp_path / "b.txt", "fine")
    for source in (path, tmp_path):
        assert fault(source).startswith(f"{path}: compressed data is truncated")
    write(path, b"plain text")
    for source in (path, tmp_path):
        assert fault(source).startswith(f"{path}: not valid {suffix} data")
    write(path, b"")
    assert "truncated" in fault(path)


def test_unreadable_file_is_named(tmp_path):
    file = SourceFile(tmp_path / "gone.txt", "gone.txt")
    with pytest.raises(CorpusError, match=r"gone\.txt: cannot be read \(No such file"):
        list(read_chunks(file))
