"""JSON by its content, whatever its file is called; records of every shape; those without text."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_jax.config import DataConfig
from rwkv_jax.data import files
from rwkv_jax.data.corpus import open_corpus, with_field
from rwkv_jax.data.files import CorpusError, SourceFile, find_files, read_values
from rwkv_jax.data.prepare import prepare
from rwkv_jax.data.records import LeftOut

RECORDS = [{"text": f"text \u4e2d {i}", "id": i} for i in range(40)]
LINES = "".join(json.dumps(x) + "\n" for x in RECORDS)
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hi."}]


def documents(source, left_out=None, **settings):
    cfg = DataConfig(source=str(source), heldout=0.0, **settings)
    return list(open_corpus(cfg).documents(left_out=left_out))


def fault(source, **settings):
    with pytest.raises(CorpusError) as caught:
        documents(source, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", LINES),
        ("DATA.JSONL", LINES),
        ("a.ndjson", LINES),
        ("a.jsonlines", LINES),
        ("a.json", LINES),
        ("a.json", LINES.replace("\n", "\r\n")),
        ("a.json", "\ufeff" + json.dumps(RECORDS)),
        ("a.json", json.dumps(RECORDS, indent=1)),
        ("a.jsonl", json.dumps(RECORDS)),
        ("a.json", "\n".join(json.dumps(x, indent=1) for x in RECORDS)),
        ("a.JSON.GZ", gzip.compress(json.dumps(RECORDS).encode()) + b"\0" * 9),
        ("a.Json.Gz", gzip.compress(LINES.encode())),
        ("a.txt", LINES),
        ("a", LINES),
        ("a.data", "  " + json.dumps(RECORDS, ensure_ascii=False)),
    ],
)
def test_json_under_any_name(tmp_path, name, content):
    path = write(tmp_path / "data" / name, content)
    for source in path, path.parent:
        assert [x.text for x in documents(source)] == [x["text"] for x in RECORDS]
    assert fault(path, field="body").endswith("set data.field to one of its fields: id, text")
    raw = gzip.decompress(path.read_bytes()) if name.lower().endswith("gz") else path.read_bytes()
    (whole,) = documents(path, field="")
    assert whole.text == raw.decode().removeprefix("\ufeff")


@pytest.mark.parametrize(
    "content", ["[1, 2]\n", "{not json}\n", "[x] a task\n", '{"a": 1} and more\n', "{{ x }}\n"]
)
def test_text_that_begins_with_a_bracket_is_text(tmp_path, content):
    """Unless it says that it is JSON by its name, or by more than its first object."""
    assert documents(write(tmp_path / "a.txt", content))[0].text == content


def test_json_for_other_purposes_is_left_out_of_a_folder_and_reported(tmp_path):
    write(tmp_path / "a.md", "some text\n" * 20)
    write(tmp_path / "package.json", '{\n  "name": "x"\n}\n')
    write(tmp_path / "note.ipynb", '{"cells": []}')
    write(tmp_path / "list.json", "[1, 2]")
    assert [x.name for x in documents(tmp_path)] == ["a.md"]
    corpus = open_corpus(DataConfig(source=str(tmp_path)))
    assert corpus.skipped == {"JSON without a field 'text'": 3}
    assert len(documents(tmp_path, field="")) == 4
    message = fault(tmp_path / "package.json")
    assert message.endswith(
        "package.json:1 (record 1): no field 'text'; set data.field to one of its fields: name"
    )


def test_a_field_of_plain_text(tmp_path):
    path = write(tmp_path / "a.txt", "hello\n")
    assert f"data.field = messages: {path} has no fields" in fault(path, field="messages")


@pytest.mark.parametrize(
    "record, field",
    [
        ({"messages": TURNS}, "messages"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "Hi."}]}, 0),
        ({"instruction": "hi", "input": "", "output": "Hi."}, "instruction,output"),
        ({"prompt": "hi", "completion": "Hi."}, "prompt,completion"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "prompt,completion"),
        ({"question": "hi", "answer": "Hi.", "id": 3}, "question,answer"),
        ({"question": "hi", "response": "Hi."}, "question,response"),
    ],
)
@pytest.mark.parametrize("ending", [".json", ".parquet"])
def test_conversations_of_every_shape(tmp_path, record, field, ending):
    path = tmp_path / f"a{ending}"
    if ending == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist([record] * 30), path)
    else:
        path.write_text(json.dumps([record] * 30))
    found = documents(path, train_on="answers")
    assert {(x.text, x.spans) for x in found} == {("User: hi\n\nAssistant: Hi.", ((20, 24),))}
    cfg = DataConfig(source=str(path), heldout=0.0)
    assert with_field(cfg, find_files(str(path))).field == (field or "conversations")
    named = documents(path, field=field or "conversations", train_on="answers")
    assert [x.text for x in named] == [x.text for x in found]


def test_an_instruction_has_more_than_a_question(tmp_path):
    record = {"instruction": "Add.", "input": "1+1", "output": "2"}
    record |= {"system": "Be brief.", "history": [["Hi", "Hello."]]}
    path = write(tmp_path / "alpaca.json", json.dumps([record]))
    assert documents(path)[0].text == (
        "System: Be brief.\n\nUser: Hi\n\nAssistant: Hello.\n\nUser: Add.\n1+1\n\nAssistant: 2"
    )
    write(path, json.dumps([record | {"history": ["x"]}]))
    assert "field 'instruction,output': the field 'history' is not a list of" in fault(path)
    write(path, json.dumps([record | {"output": 5}]))
    assert "question and answer are not both text" in fault(path)
    write(path, json.dumps([record | {"input": [3, 1]}]))
    assert "field 'input' is a list, not text" in fault(path)


def test_a_question_alone_is_text_only_if_its_field_is_named(tmp_path):
    path = write(tmp_path / "a.json", json.dumps([{"prompt": "hi"}] * 3))
    assert [x.text for x in documents(path, field="prompt")] == ["hi"] * 3
    assert "no field 'text'; set data.field to one of its fields: prompt" in fault(path)


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "hi", "output": None},
        {"instruction": "hi"},
        {"instruction": "", "output": "x"},
        {"instruction": "hi", "output": ""},
    ],
)
def test_a_question_without_an_answer_is_no_text(tmp_path, record):
    good = {"instruction": "hi", "output": "Hi."}
    path = write(tmp_path / "a.json", json.dumps([good] * 199 + [record]))
    left_out = LeftOut()
    assert len(documents(path, left_out)) == 199
    assert left_out.count == 1 and "(record 200): field 'instruction,output': field '" not in str(
        left_out
    )
    assert "(record 200): " in str(left_out)


@pytest.mark.parametrize(
    "turns",
    [
        [*TURNS, {"role": "user", "content": None}],
        [TURNS[0], {"role": "assistant", "content": ""}],
    ],
)
def test_conversations_with_an_empty_turn_are_left_out(tmp_path, turns):
    rows = [{"messages": TURNS}] * 199 + [{"messages": turns}]
    path, left_out = write(tmp_path / "a.json", json.dumps(rows)), LeftOut()
    assert len(documents(path, left_out, train_on="answers")) == 199 and left_out.count == 1


def test_replies_that_are_not_to_be_trained(tmp_path):
    """OpenAI's weight; reasoning comes before the reply."""
    turns = [*TURNS, TURNS[0], TURNS[1] | {"weight": 0}]
    path = write(tmp_path / "a.json", json.dumps([{"messages": turns}]))
    (found,) = documents(path, train_on="answers")
    assert [found.text[a:b] for a, b in found.spans] == [" Hi.\n\nUser:"]
    path.write_text(json.dumps([{"messages": [TURNS[0], TURNS[1] | {"reasoning_content": "Hm"}]}]))
    assert documents(path)[0].text.endswith("Assistant: <think>\nHm\n</think>\n\nHi.")


def test_each_file_of_a_folder_has_its_own_shape(tmp_path):
    write(tmp_path / "aaa.json", '{"name": "pkg"}')
    write(tmp_path / "chat.json", json.dumps([{"messages": TURNS}] * 3))
    write(tmp_path / "facts.jsonl", '{"question": "hi", "answer": "Hi."}\n')
    write(tmp_path / "n.txt", "a note")
    found = documents(tmp_path)
    assert [x.name for x in found] == [*("chat.json:1" for _ in range(3)), "facts.jsonl:1", "n.txt"]
    assert {x.text for x in found} == {"User: hi\n\nAssistant: Hi.", "a note"}
    corpus = open_corpus(DataConfig(source=str(tmp_path)))
    assert corpus.skipped == {"JSON without a field 'text'": 1} and corpus.cfg.field == "text"


@pytest.mark.parametrize(
    "name, content, texts",
    [
        ("a.json", json.dumps(["one", "two"]), ["one", "two"]),
        ("a.json", '[{"text": "one"}]\n[{"text": "two"}]', ["one", "two"]),
        ("a.txt", '{}\n{"text": "one"}\n', None),
        ("a.jsonl", '{"text": "one"}\n\ufeff{"text": "two"}\n', ["one", "two"]),
        ("a.md", '{"title": "x"}\n\n# one\n', ['{"title": "x"}\n\n# one\n']),
    ],
)
def test_odd_json(tmp_path, name, content, texts):
    path = write(tmp_path / name, content)
    if texts is None:
        assert "a.txt:1: no field 'text'; it has no field" in fault(path)
    else:
        assert [x.text for x in documents(path)] == texts


def test_utf_16_is_named(tmp_path):
    for name in "a.txt", "a.json":
        path = write(tmp_path / name, "[1]".encode("utf-16"))
        assert "UTF-16, not UTF-8" in fault(path) or "not UTF-8" in fault(path)


BAD = {"null": {"text": None}, "surrogate": {"text": "a\ud800"}, "row": None}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("array", [False, True])
def test_records_without_text_are_left_out_and_counted(tmp_path, name, array):
    records = [{"text": f"text {i}"} for i in range(200)]
    records[50] = records[70] = BAD[name]
    lines = [json.dumps(x) for x in records]
    content = "[\n" + ",\n".join(lines) + "\n]" if array else "\n".join(lines)
    path = write(tmp_path / "a.json", content)
    cfg = DataConfig(source=str(path), tokenizer="bytes", cache=str(tmp_path / "cache"))
    tokens = prepare(cfg, progress=False)
    assert tokens.train_documents + tokens.heldout_documents == 198
    place = f"{path}:52 (record 51)" if array else f"{path}:51"
    (left_out,) = tokens.left_out
    assert left_out.startswith(f"2 of 200 records without text, the first at {place}: ")
    assert tokens.describe()["left out"] == left_out
    assert fault(path, strict=True).startswith(f"{place}: ")
    assert fault(path).startswith(f"{place}: ")  # as nobody counts
    records[90] = BAD[name]
    write(path, "\n".join(json.dumps(x) for x in records))
    with pytest.raises(CorpusError, match=r"^3 of 200 records have no text, the first at .*:51: "):
        prepare(cfg, progress=False)


def test_left_out_of_parts_add_up():
    one, other = LeftOut(records=100, count=1, first="a:3: null"), LeftOut(records=10)
    other.merge(one)
    assert other == LeftOut(False, 110, 1, "a:3: null") and not str(LeftOut(records=5))
    other.check()
    with pytest.raises(CorpusError, match="1 of 1 records have no text, the first at b:1: null"):
        LeftOut(records=1, count=1, first="b:1: null").check()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x, max_size=3)
)
OBJECTS = st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), max_size=6)


@given(OBJECTS, st.integers(1, 40), st.sampled_from([None, 1]), st.booleans(), st.booleans())
def test_values_are_those_of_json_whatever_the_chunks(
    tmp_path_factory, values, chunk, indent, array, escaped
):
    some = [json.dumps(x, indent=indent, ensure_ascii=escaped) for x in values]
    text = json.dumps(values, indent=indent) if array else " \n".join(some)
    path = write(tmp_path_factory.getbasetemp() / "values.json", text.encode("utf-8", "replace"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK", chunk)
        found = list(read_values(SourceFile(path, "a", kind="json")))
    due = [json.loads(x) for x in some] if not array else values
    if escaped or array:
        assert [x for _, x in found] == due
    assert len(found) == len(due)


@pytest.mark.parametrize(
    "content, message",
    [
        (b'[{"text": "a"},\n{"text": "b"}', "ends inside its array"),
        (b'[{"text": "a"},\n{"text": "b"', ":2: not JSON"),
        (b'[{"text": "a"},\n{"text": b"}]' + b" " * 99, ":2: not JSON"),
        (b'[{"text": "a"},\n{"text": "\xff"}]', "not UTF-8 at byte 26"),
        (b'[{"text": "a"},\n5]', ":2 (record 2): a number, not an object with a field 'text'"),
        (b'[{"text": ' + b"1" * 5000 + b"}]", ":1: JSON that cannot be read"),
        (b"[[[[" * 50_000, ":1: JSON that cannot be read"),
    ],
)
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_damaged_json_is_named_by_file_and_line(tmp_path, monkeypatch, content, message, chunk):
    monkeypatch.setattr(files, "CHUNK", chunk if len(content) < 5000 else 1 << 20)
    assert message in fault(write(tmp_path / "a.json", content))


def test_a_value_that_does_not_fit_in_memory(tmp_path):
    path = write(tmp_path / "a.json", json.dumps([{"text": "x" * 5000}]))
    with pytest.raises(
        CorpusError, match=r"a\.json:1 \(record 1\): a text of more than .* split it"
    ):
        list(open_corpus(DataConfig(source=str(path)), longest=1000).documents())


def test_urls_are_refused():
    with pytest.raises(CorpusError, match=r"gs://bucket/x: URLs are not read; copy the data"):
        find_files("gs://bucket/x")


def test_a_part_of_a_file_has_the_field_of_the_file(tmp_path):
    """Whatever record it begins with."""
    first = '{"text": "one"}\n'
    path = write(tmp_path / "a.jsonl", first + json.dumps({"messages": TURNS}) + "\n")
    assert ":2: no field 'text'" in fault(path)
    corpus = open_corpus(DataConfig(source=str(path)))
    part = SourceFile(path, "a", len(first), 10**6, "lines")
    with pytest.raises(CorpusError, match=r"a\.jsonl:2: no field 'text'"):
        list(type(corpus)(corpus.cfg, (part,)).documents())
