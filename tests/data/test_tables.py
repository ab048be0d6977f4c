"""Rows of Parquet and Arrow files as documents, and the messages about bad ones."""

import builtins
import json
from pathlib import Path

import pytest

from rwkv_jax.config import DataConfig
from rwkv_jax.data.corpus import CorpusError, Document, open_corpus
from rwkv_jax.data.files import SourceFile, find_files
from rwkv_jax.data.tables import group_sizes, read_rows
from rwkv_jax.errors import UserError

pa = pytest.importorskip("pyarrow")
from pyarrow import ipc, parquet  # noqa: E402

TEXTS = ["one\ntwo", "", "é \U0001f600", "one\ntwo", *(f"row {i}" for i in range(700))]


def documents(source: Path | str, **settings) -> list[Document]:
    return list(open_corpus(DataConfig(source=str(source), **settings)).documents())


def fault(source: Path | str, **settings) -> str:
    with pytest.raises(CorpusError) as caught:
        documents(source, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save(path: Path, texts=TEXTS, kind=None, **columns) -> Path:
    """A file of the format of its ending; `.arrow` as `datasets` writes it."""
    table = pa.table({"id": pa.array(range(len(texts))), "text": pa.array(texts, kind), **columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=100)
    else:
        with ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, 100)
    return path


def save_to_disk(root: Path, parts: list[list[str]]) -> Path:
    """A folder as `datasets.save_to_disk` writes it."""
    names = [f"data-{i:05}-of-{len(parts):05}.arrow" for i in range(len(parts))]
    for name, texts in zip(names, parts, strict=True):
        save(root / name, texts)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (root / "state.json").write_text(json.dumps(state))
    (root / "dataset_info.json").write_text("{}")
    return root


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_rows_are_documents(tmp_path, ending, kind):
    kinds = {"string": pa.string(), "large_string": pa.large_string()}
    column = kinds.get(kind) or pa.dictionary(pa.int32(), pa.string())
    path = save(tmp_path / f"a{ending}", kind=column)
    for source in (path, tmp_path, f"{tmp_path}/*{ending}"):
        for document in ("file", "line"):
            found = documents(source, document=document)
            due = [(f"a{ending}:{i}", text) for i, text in enumerate(TEXTS, 1) if text]
            assert [(d.name, d.text) for d in found] == due
    assert 0 < sum(d.heldout for d in documents(path, heldout=0.5)) < len(due)
    sides = [d.heldout for d in documents(path, heldout=0.5) if d.text == "one\ntwo"]
    assert len(set(sides)) == 1


def test_arrow_files_of_the_other_format(tmp_path):
    table = pa.table({"text": TEXTS})
    with ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, 100)
    assert [d.text for d in documents(tmp_path)] == [text for text in TEXTS if text]


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_reported_bytes_are_those_on_disk(tmp_path, ending):
    path, counted = save(tmp_path / f"a{ending}"), []
    corpus = open_corpus(DataConfig(source=str(path)))
    list(corpus.documents(counted.append))
    assert sum(counted) == corpus.bytes_on_disk == path.stat().st_size
    assert len(counted) > 2 and min(counted) >= 0


def test_groups_of_rows_count_from_the_file_s_beginning(tmp_path):
    path = save(tmp_path / "a.parquet")
    groups = len(group_sizes(SourceFile(path, "a")))
    assert groups == 8
    parts = [read_rows(SourceFile(path, "a", i, i + 3), "text") for i in range(0, groups, 3)]
    found = [(number, record["text"]) for part in parts for number, record in part]
    assert found == list(enumerate(TEXTS, 1))


def test_fingerprint_is_of_the_bytes_on_disk(tmp_path):
    seen = set()
    for texts in (["a"], ["b"], ["a"]):
        path = save(tmp_path / "a.parquet", texts)
        seen.add(open_corpus(DataConfig(source=str(path))).fingerprint)
    assert len(seen) == 2


def test_folder_saved_by_datasets(tmp_path):
    root = save_to_disk(tmp_path / "set", [["a", "b"], ["c"]])
    save(root / "cache-1234.arrow", ["no part of it"])
    assert [d.text for d in documents(root)] == ["a", "b", "c"]
    assert documents(root)[2].name == "data-00001-of-00002.arrow:1"


def test_of_several_splits_train_is_read(tmp_path):
    root = tmp_path / "set"
    save_to_disk(root / "train", [["a"], ["b"]])
    save_to_disk(root / "test", [["c"]])
    splits = root / "dataset_dict.json"
    splits.write_text('{"splits": ["train", "test"]}')
    assert [d.text for d in documents(root)] == ["a", "b"]
    assert next(f.name for f in find_files(str(root))) == "train/data-00000-of-00002.arrow"
    assert [d.text for d in documents(root / "test")] == ["c"]
    splits.write_text('{"splits": ["test", "validation"]}')
    assert fault(root) == (
        f"{root}: its splits are test, validation, and none is train; name one: {root}/test"
    )


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("{", "not readable JSON; save the data set again"),
        ('{"_data_files": 5}', "has no list '_data_files'"),
        ('{"_data_files": [5]}', "names no files"),
        ('{"_data_files": [], "_indices_files": [1]}', "a selection of rows"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', "are not readable UTF-8 text"),
    ],
)
def test_damaged_folder_of_datasets(tmp_path, state, message):
    root = save_to_disk(tmp_path / "set", [["a"]])
    (root / "state.json").write_text(state)
    assert message in fault(root)


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_bad_columns_are_named_by_file_and_row(tmp_path, ending):
    path = save(tmp_path / f"a{ending}", ["fine"] * 300 + [None])
    assert fault(path) == (
        f"{path}:301: field 'text' is null; correct it, or set data.strict = false"
    )
    assert fault(path, field="id") == (
        f"{path}:1: column 'id' holds int64, not text or a list of turns; set data.field to another"
    )
    assert fault(path, field="body") == (
        f"{path}: no column 'body'; set data.field to one of its columns: id, text"
    )
    raw = pa.array([b"fine", b"\xff"], pa.binary()).view(pa.string())
    path = save(tmp_path / f"b{ending}", ["fine"] * 2, raw=raw)
    assert fault(path, field="raw").startswith(f"{path}:2: column 'raw' is not UTF-8")


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_conversations_are_those_of_json_lines(tmp_path, ending):
    turns = [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"{i}"}] * 2
        for i in range(3)
    ]
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"messages": some}) + "\n" for some in turns))
    path = save(tmp_path / f"a{ending}", list("abc"), messages=turns)
    asked = {"field": "messages", "train_on": "answers"}
    found, due = documents(path, **asked), documents(lines, **asked)
    assert [(d.text, d.spans) for d in found] == [(d.text, d.spans) for d in due]
    assert all(d.spans for d in found)
    assert [d.text for d in documents(path, field="messages")] == [d.text for d in due]
    path = save(tmp_path / f"b{ending}", ["fine"], messages=[[{"role": "cook", "content": "x"}]])
    message = f"{path}:1: field 'messages': turn 1 has the role 'cook', not one of system"
    assert fault(path, field="messages").startswith(message)
    assert fault(path, train_on="answers").startswith(f"{path}:1: field 'text': text, not a list")


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_spans_are_a_column(tmp_path, ending):
    path = save(tmp_path / f"a{ending}", ["abc", "de"], spans=[[[0, 1]], [[0, 1], [1, 2]]])
    found = documents(path, train_on="spans")
    assert [d.spans for d in found] == [((0, 1),), ((0, 1), (1, 2))]
    assert fault(save(tmp_path / f"b{ending}", ["abc"]), train_on="spans").startswith(
        f"{tmp_path}/b{ending}:1: field 'text': the field 'spans' holds None"
    )


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_damaged_files(tmp_path, ending):
    path = save(tmp_path / f"a{ending}")
    whole = path.read_bytes()
    for damaged in (b"text", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        assert fault(path).startswith(f"{path}: cannot be read as {ending} (")


def test_without_pyarrow(tmp_path, monkeypatch):
    path, real = save(tmp_path / "a.parquet"), builtins.__import__

    def none(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", none)
    with pytest.raises(UserError, match=r"a\.parquet: .*: pip install 'rwkv_jax\[parquet\]'$"):
        documents(path)


def test_a_row_that_does_not_fit_in_memory(tmp_path):
    path = save(tmp_path / "a.parquet", ["fine", "x" * 2000])
    with pytest.raises(CorpusError, match=r"a\.parquet:2: a text of more than .* split it"):
        list(open_corpus(DataConfig(source=str(path)), longest=1000).documents())
