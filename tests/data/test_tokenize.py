"""`tokenize`: the same pair whatever the units, the workers and the interruptions."""

import errno
import functools
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkv_jax import __main__ as program
from rwkv_jax.config import DataConfig
from rwkv_jax.data import tokenize as module
from rwkv_jax.data.binidx import BinidxWriter, open_binidx
from rwkv_jax.data.corpus import CorpusError, open_corpus
from rwkv_jax.data.pieces import LONG_DOCUMENT
from rwkv_jax.data.tokenize import Counts, Result
from rwkv_jax.data.tokenizers import Tokenizer, open_tokenizer
from rwkv_jax.errors import UserError

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

ROOT = Path(program.__file__).parents[1]


def tokenize(sources: list[str], out: Path, **settings: Any) -> Result:
    """With arguments of the function and settings of its config."""
    arguments = {x: settings.pop(x) for x in ("workers", "overwrite", "progress") if x in settings}
    cfg = DataConfig(**{"tokenizer": "world"} | settings)
    return module.tokenize(sources, out, cfg, **arguments)


@functools.cache
def opened(name: str, *_) -> Tokenizer:
    return open_tokenizer(name)


@pytest.fixture
def here(monkeypatch):
    """Does the work in this process, one unit after another; yields the units that are done."""
    done = []

    def work(units, workers, tokenizer, report):
        for unit in units:
            module._make_part(unit, opened(tokenizer), 1 << 40, report)
            done.append(unit)

    monkeypatch.setattr(module, "_work", work)
    monkeypatch.setattr(module, "open_tokenizer", opened)
    return done


@pytest.fixture
def sources(tmp_path, monkeypatch) -> list[str]:
    """Every kind of source, cut into many units."""
    monkeypatch.setattr(module, "UNIT", 300)
    root = tmp_path / "text"
    (root / "sub").mkdir(parents=True)
    for i in range(20):
        (root / "sub" / f"{i}.txt").write_text(f"é{i}\r\n" * (3 * i), "utf-8")
    (root / "image.bin").write_bytes(b"\0\xff")
    lines = [json.dumps({"text": f"\u00e9 line {i}\n" * (i % 9)}) for i in range(60)]
    lines[20] = json.dumps({"text": "x" * 1000})  # longer than three units
    (root / "a.jsonl").write_text("\n\n".join(lines), "utf-8")
    (root / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    texts = pyarrow.table({"text": [f"row {i} " * (i % 7) for i in range(99)]})
    parquet.write_table(texts, root / "c.parquet", row_group_size=10)
    return [str(root), str(root / "sub" / "3.txt"), str(root / "a.jsonl")]


def expected(sources: list[str], path: Path, **settings) -> tuple[bytes, bytes]:
    """By the definition: all documents in order, one item each, by one writer."""
    with BinidxWriter(path, np.uint16) as writer:
        for source in sources:
            for document in open_corpus(DataConfig(source, heldout=0.0, **settings)).documents():
                writer.add(opened("world").encode(document.text), [0])
    return written(path)


def written(path: Path) -> tuple[bytes, bytes]:
    return tuple(path.with_name(path.name + end).read_bytes() for end in (".bin", ".idx"))


def left(path: Path) -> set[str]:
    """The files beside OUT, by their endings."""
    return {x.name.removeprefix(path.name) for x in path.parent.glob(f"{path.name}*")}


@pytest.mark.parametrize("document", ["file", "line"])
def test_any_units_give_what_one_writer_does(sources, tmp_path, here, document):
    result = tokenize(sources, tmp_path / "out", document=document)
    assert len(here) > 20
    assert written(tmp_path / "out") == expected(sources, tmp_path / "due", document=document)
    assert left(tmp_path / "out") == {".bin", ".idx", ".json"}
    pair = open_binidx(tmp_path / "out")
    corpora = [open_corpus(DataConfig(s, document=document, heldout=0.0)) for s in sources]
    found = [one.text for corpus in corpora for one in corpus.documents()]
    size = sum(len(text.encode()) for text in found)
    records = 60 + 60 + 99 + 60  # the last 60 once more, named by their own path
    assert result.counts == Counts(len(found), size, len(pair.tokens), 1, records)
    assert result.new_bytes == size
    described = json.loads((tmp_path / "out.json").read_text())
    assert described == {
        "tokenizer": opened("world").identity(),
        "kind": "world",
        "documents": len(found),
        "bytes": size,
        "tokens": len(pair.tokens),
        "skipped": 1,
        "records": records,
        "left_out": 0,
        "field": "text",
        "document": document,
        "template": "g1",
        "sources": sources,
    }


@pytest.mark.parametrize("unit", [1, 7, 64, 1000])
def test_lines_are_in_one_unit_wherever_it_is_cut(tmp_path, here, monkeypatch, unit):
    monkeypatch.setattr(module, "UNIT", unit)
    path = tmp_path / "a.txt"
    path.write_bytes("one\n\ntwo\r\né\n \nthe last".encode())
    tokenize([str(path)], tmp_path / "out", tokenizer="bytes", document="line")
    pair = open_binidx(tmp_path / "out")
    texts = bytes(np.maximum(pair.tokens.astype(int) - 1, 0).astype(np.uint8)).split(b"\0")
    assert texts == [b"one", b"two", "é".encode(), b" ", b"the last", b""]


def test_long_documents_have_the_tokens_of_their_whole(tmp_path, here):
    text = "def f(x):\n    return x\n\n\nAnd so on.\n" * (2 * LONG_DOCUMENT // 36)
    (tmp_path / "a.txt").write_text(text)
    tokenize([str(tmp_path / "a.txt")], tmp_path / "out")
    assert open_binidx(tmp_path / "out").tokens.tolist() == [*opened("world").encode(text), 0]


def test_progress_is_in_bytes_and_ends_at_all_of_them(sources, tmp_path, here):
    seen = []
    tokenize(sources, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    on_disk = sum(open_corpus(DataConfig(source)).bytes_on_disk for source in sources)
    (total,) = {whole for _, whole in seen}
    assert 0.9 * on_disk < total <= on_disk + 2  # without Parquet's descriptions
    assert seen == sorted(seen) and seen[0][0] == 0 and total - seen[-1][0] < 20


def test_resumes_where_it_was_stopped(sources, tmp_path, here, monkeypatch, capsys):
    make = module._make_part

    def stop(unit, *rest):
        if unit.part.name == "00007":
            raise KeyboardInterrupt
        make(unit, *rest)

    monkeypatch.setattr(module, "_make_part", stop)
    with pytest.raises(KeyboardInterrupt, match=r"^stopped with 7 of \d+ parts done; run the same"):
        tokenize(sources, tmp_path / "out")
    assert left(tmp_path / "out") == {".parts"}
    monkeypatch.setattr(module, "_make_part", make)
    parts = tmp_path / "out.parts"
    (parts / "00003.bin").write_bytes(b"damaged since")
    here.clear()
    result = tokenize(sources, tmp_path / "out")
    assert [unit.part.name for unit in here][:2] == ["00003", "00007"]
    assert 0 < result.new_bytes < result.counts.bytes
    assert re.search(r"out\.parts: 6 of \d+ parts are done", capsys.readouterr().err)
    assert written(tmp_path / "out") == expected(sources, tmp_path / "due")
    assert left(tmp_path / "out") == {".bin", ".idx", ".json"}


@pytest.mark.parametrize("change", ["text", "tokenizer", "field"])
def test_parts_of_something_else_are_rebuilt(tmp_path, here, monkeypatch, capsys, change):
    monkeypatch.setattr(module, "UNIT", 20)
    path, settings = tmp_path / "a.jsonl", {}
    path.write_text("".join(json.dumps({"text": f"{i}", "b": "x"}) + "\n" for i in range(9)))
    merge = module.merge

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "out.bin"))

    monkeypatch.setattr(module, "merge", full)
    with pytest.raises(UserError, match="No space left on device; free some space, then run"):
        tokenize([str(path)], tmp_path / "out", tokenizer="bytes")
    assert left(tmp_path / "out") == {".parts"}
    monkeypatch.setattr(module, "merge", merge)
    if change == "text":
        path.write_text('{"text": "new", "b": "x"}\n')
    else:
        settings = {"tokenizer": {"tokenizer": "world"}, "field": {"field": "b"}}[change]
    tokenize([str(path)], tmp_path / "out", **{"tokenizer": "bytes"} | settings)
    assert "has parts of other text or settings: rebuilding" in capsys.readouterr().err
    tokenize([str(path)], tmp_path / "due", **{"tokenizer": "bytes"} | settings)
    assert written(tmp_path / "out") == written(tmp_path / "due")


def test_out_in_the_folder_that_is_read(tmp_path, here, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    tokenize([str(tmp_path)], tmp_path / "out", tokenizer="bytes")
    before = written(tmp_path / "out")
    tokenize([str(tmp_path)], tmp_path / "out", tokenizer="bytes", overwrite=True)
    assert written(tmp_path / "out") == before


def test_existing_files_are_not_replaced_unasked(tmp_path, here):
    (tmp_path / "a.txt").write_text("text")
    for name in ("out.idx", "out.bin"):
        (tmp_path / name).write_bytes(b"mine")
        with pytest.raises(UserError, match=f"{name}: already exists; name another, or add --o"):
            tokenize([str(tmp_path / "a.txt")], tmp_path / "out")
    assert (tmp_path / "out.bin").read_bytes() == b"mine" and not here


def test_files_that_are_not_text(tmp_path, here, monkeypatch):
    monkeypatch.setattr(module, "UNIT", 4)
    root = tmp_path / "text"
    root.mkdir()
    (root / "bad.txt").write_bytes(b"fine\n\xff\n")
    with pytest.raises(CorpusError, match=r"text: no text in it"):
        tokenize([str(root)], tmp_path / "out")
    (root / "good.txt").write_text("good")
    for document in ("file", "line"):
        result = tokenize([str(root)], tmp_path / "out", document=document, overwrite=True)
        assert (result.counts.documents, result.counts.skipped) == (1, 1)
        with pytest.raises(CorpusError, match=r"bad\.txt: not UTF-8 at byte 5; convert it"):
            tokenize([str(root / "bad.txt")], tmp_path / "two", document=document)
    assert left(tmp_path / "two") == set()


def test_only_one_process_has_the_parts(tmp_path, here):
    (tmp_path / "a.txt").write_text("text")
    with module._parts(tmp_path / "out.parts", [], "f"), pytest.raises(UserError, match="another"):
        tokenize([str(tmp_path / "a.txt")], tmp_path / "out")


def test_a_folder_of_that_name_with_other_files_is_left_alone(tmp_path, here):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "out.parts").mkdir()
    (tmp_path / "out.parts" / "mine").write_text("mine")
    with pytest.raises(UserError, match=r"out\.parts: holds other files; remove it, or name"):
        tokenize([str(tmp_path / "a.txt")], tmp_path / "out")
    assert (tmp_path / "out.parts" / "mine").read_text() == "mine"


def test_a_folder_that_cannot_be_written(tmp_path, here):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"a\.txt.*: Not a directory; make it writable, or name"):
        tokenize([str(tmp_path / "a.txt")], tmp_path / "a.txt" / "out")


# From here on with processes.


def test_workers_give_the_same_bytes(sources, tmp_path):
    tokenize(sources, tmp_path / "out", workers=2)
    assert written(tmp_path / "out") == expected(sources, tmp_path / "due")


def test_an_error_in_a_worker_names_file_and_line(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "UNIT", 100)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' * 40 + '{"text": "cut\n')
    with pytest.raises(CorpusError, match=r"a\.jsonl:41: not JSON"):
        tokenize([str(path)], tmp_path / "out", workers=1)
    assert left(tmp_path / "out") == {".parts"}


def test_a_killed_worker_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    start = module._start

    def doomed(*arguments):
        process, pipe = start(*arguments)
        process.kill()
        return process, pipe

    monkeypatch.setattr(module, "_start", doomed)
    with pytest.raises(UserError, match=r"a\.txt, or .* has died \(SIGKILL, as when memory"):
        tokenize([str(tmp_path / "a.txt")], tmp_path / "out")
    assert left(tmp_path / "out") == set()
