"""Parts of files, and documents that do not fit in memory."""

import gzip
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_jax.config import DataConfig
from rwkv_jax.data import files as module
from rwkv_jax.data.corpus import CorpusError, open_corpus
from rwkv_jax.data.files import CHUNK, SourceFile, available_memory, lines_before, read_lines
from rwkv_jax.evaluation.tasks import read_endings


@given(st.text("a\r\n", max_size=20), st.lists(st.integers(0, 20), max_size=3), st.integers(1, 5))
def test_parts_of_a_file_have_its_lines(tmp_path_factory, text, cuts, chunk):
    path = tmp_path_factory.mktemp("lines") / "a"
    path.write_bytes(text.encode())
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        whole = list(read_lines(SourceFile(path, "a")))
        found = []
        for begin, end in itertools.pairwise(bounds):
            part = SourceFile(path, "a", begin, end)
            assert lines_before(part) == len(found)
            found += read_lines(part)
    assert found == whole


def test_faults_in_a_part_are_named_by_the_file_s_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' * 5 + "{\n")
    corpus = open_corpus(DataConfig(source=str(path)))
    part = type(corpus)(corpus.cfg, (SourceFile(path, "a", 20, 200, "lines"),))
    with pytest.raises(CorpusError, match=r"a\.jsonl:6: not JSON"):
        list(part.documents())


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "document", "message"),
    [
        (
            "a.txt",
            "file",
            'a document of more than 3.0 MB.* split it, or set data.document = "line"',
        ),
        ("a.txt", "line", "byte 6: a line of more than 3.0 MB.* split it$"),
        ("a.jsonl", "file", "byte 6: a line of more than 3.0 MB.* split it$"),
    ],
)
def test_documents_that_do_not_fit_in_memory(tmp_path, suffix, name, document, message):
    content = b'"abc"\n' + b"x" * (8 * CHUNK) + b"\n"
    if name == "a.jsonl":
        content = b"     \n" + content[6:]
    path = tmp_path / (name + suffix)
    path.write_bytes(gzip.compress(content) if suffix else content)
    corpus = open_corpus(DataConfig(source=str(path), document=document), longest=3_000_000)
    read = []
    with pytest.raises(CorpusError, match=rf"{name}{suffix}: {message}"):
        list(corpus.documents(read.append))
    assert suffix or sum(read) <= 4 * CHUNK


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemFree: 5 kB\nMemAvailable:    1000 kB\n"}


def test_memory_of_the_machine(tmp_path):
    assert available_memory(tmp_path) is None
    assert available_memory(tree(tmp_path, MEMINFO)) == 1_024_000
    assert (available_memory() or 1) > 0


def test_memory_of_control_groups(tmp_path):
    second = {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/b/memory.current": "5\n",
        "sys/fs/cgroup/a/memory.max": "900\n",
        "sys/fs/cgroup/a/memory.current": "600\n",
        "sys/fs/cgroup/a/memory.stat": "anon 400\ninactive_file 150\n",
    }
    assert available_memory(tree(tmp_path / "2", MEMINFO | second)) == 900 - 600 + 150
    first = {
        "proc/self/cgroup": "9:name=systemd:/\n7:memory:/a\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "700",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "800",
    }
    assert available_memory(tree(tmp_path / "1", MEMINFO | first)) == 0


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "lines/a.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    """Only at the start of a file, whatever its parts are."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    text = b'{"text": "one"}\r\n' if name == "a.jsonl" else b"one\r\n"
    data = MARK + text + MARK + b"two\n" * (name != "a.jsonl")
    data = MARK + text + text if name == "a.jsonl" else data
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    document = "line" if name.startswith("lines") else "file"
    cfg = DataConfig(source=str(path), document=document, heldout=0.0)
    texts = [x.text for x in open_corpus(cfg).documents()]
    whole = ["one\r\n\ufefftwo\n"]
    assert texts == {"lines/a.txt": ["one", "\ufefftwo"], "a.jsonl": ["one"] * 2}.get(name, whole)
    for begin in range(1, 9 * (name == "lines/a.txt")):
        cuts = (SourceFile(path, "a", *cut) for cut in ((0, begin), (begin, len(data))))
        assert b"|".join(line for part in cuts for line in read_lines(part)) == (
            b"one|" + MARK + b"two"
        )


def test_questions_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_bytes(MARK + b'{"text": "one two"}\n')
    assert len(read_endings(path)) == 1


@pytest.mark.parametrize("chunk", [1, 7, CHUNK])
def test_zeros_after_gzip_members_are_padding(tmp_path, monkeypatch, chunk):
    """As `gzip` and Python have it; anything else is damage."""
    monkeypatch.setattr(module, "CHUNK", chunk)
    path, one, two = tmp_path / "a.gz", gzip.compress(b"one\n"), gzip.compress(b"two\n")
    path.write_bytes(one + b"\0" * 600 + two + b"\0" * 3)
    assert list(read_lines(SourceFile(path, "a"))) == [b"one", b"two"]
    for damaged in (b"\0" + one, one + b"\0x", one[:-1], one + b"\0" + two[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(CorpusError, match=r"a\.gz: (not valid|compressed data is truncated)"):
            list(read_lines(SourceFile(path, "a")))
