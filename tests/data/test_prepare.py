"""The token cache: its contents, when it is used again, and what no interruption leaves behind."""

import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import numpy as np
import pytest

from rwkv_jax.config import DataConfig
from rwkv_jax.data import pieces
from rwkv_jax.data import prepare as module
from rwkv_jax.data.binidx import BinidxWriter, open_binidx
from rwkv_jax.data.corpus import CorpusError, open_corpus
from rwkv_jax.data.prepare import CacheError, prepare
from rwkv_jax.data.tokenizers import JsonTokenizer, TokenizerError
from rwkv_jax.data.tokens import Tokens
from rwkv_jax.errors import UserError

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def source(tmp_path) -> Path:
    root = tmp_path / "text"
    root.mkdir()
    for i in range(40):
        text = f"def function_{i}(x):\n    return 'é' * {i}\n" * (i + 1)
        (root / f"{i}.py").write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def cfg(source, tmp_path):
    def make(**settings) -> DataConfig:
        base = {"source": str(source), "heldout": 0.2, "bpe_vocab_size": 512}
        return DataConfig(**base | {"cache": str(tmp_path / "cache")} | settings)

    return make


@pytest.fixture
def builds(monkeypatch) -> list[Path]:
    """The folders in which caches are built."""
    seen, build = [], module._build

    def spy(corpus, tokenizer, folder, show):
        seen.append(folder)
        build(corpus, tokenizer, folder, show)

    monkeypatch.setattr(module, "_build", spy)
    return seen


def documents_in(ids: np.ndarray, tokens: Tokens) -> list[bytes]:
    """The documents that a flat array holds."""
    ends = np.flatnonzero(ids == tokens.tokenizer.eod)
    assert len(ids) == 0 or ends[-1] == len(ids) - 1
    begins = [0, *(ends[:-1] + 1)]
    return [
        tokens.tokenizer.decode_bytes(ids[a:b]) for a, b in zip(begins, ends, strict=len(ends) > 0)
    ]


def entries(tmp_path: Path) -> set[str]:
    return {path.suffix or "entry" for path in (tmp_path / "cache").iterdir()}


def test_one_byte_changed_anywhere_changes_the_digest(tmp_path):
    text = bytearray(b"the same words again, " * 20000)
    seen = set()
    for place in (None, 123_457, 123_458):
        changed = bytearray(text)
        if place:
            changed[place] ^= 1
        folder = tmp_path / str(place)
        folder.mkdir()
        (folder / "a.txt").write_bytes(changed)
        setting = {"source": str(folder), "tokenizer": "bytes", "heldout": 0.0}
        seen.add(prepare(DataConfig(**setting, cache=str(tmp_path / "one"))).digest)
        seen.add(prepare(DataConfig(**setting, cache=str(tmp_path / "two"))).digest)
    assert len(seen) == 3


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe", "world"])
def test_arrays_hold_every_document_of_their_side(cfg, tokenizer):
    config = cfg(tokenizer=tokenizer)
    tokens = prepare(config, progress=False)
    found = list(open_corpus(config).documents())
    train = [d.text.encode() for d in found if not d.heldout]
    heldout = [d.text.encode() for d in found if d.heldout]
    assert train and heldout
    assert documents_in(tokens.train, tokens) == train
    assert documents_in(tokens.heldout, tokens) == heldout
    assert tokens.heldout_text() == b"".join(heldout)
    assert (tokens.train_bytes, tokens.heldout_bytes) == (
        sum(map(len, train)),
        sum(map(len, heldout)),
    )
    assert (tokens.train_documents, tokens.heldout_documents) == (len(train), len(heldout))
    assert tokens.train.dtype == tokens.heldout.dtype == np.uint16
    assert isinstance(tokens.train, np.memmap) and not tokens.train.flags.writeable


def test_both_sides_are_pairs_as_other_trainers_read_them(cfg):
    tokens = prepare(cfg(tokenizer="world"), progress=False)
    for side, count in (("train", tokens.train_documents), ("heldout", tokens.heldout_documents)):
        pair, ids = open_binidx(tokens.folder / side), getattr(tokens, side)
        assert (pair.tokens == ids).all() and len(pair.sizes) == count
        assert (pair.starts[1:] == np.flatnonzero(ids == tokens.tokenizer.eod) + 1).all()


@pytest.mark.parametrize("train_on", ["all", "answers"])
def test_an_entry_of_an_earlier_version_is_used(cfg, builds, tmp_path, train_on):
    """Key, files and manifest in the earlier format, which had no index."""
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hi."}]
    text = tmp_path / "chat.jsonl"
    text.write_text("".join(json.dumps({"text": [*turns, *turns[:i]]}) + "\n" for i in (1, 2)))
    config = cfg(source=str(text), tokenizer="bytes", heldout=0.0, train_on=train_on)
    new = prepare(config, progress=False)
    key = json.dumps([2, open_corpus(config).fingerprint, "bytes"]).encode()
    folder = tmp_path / "cache" / hashlib.blake2b(key, digest_size=12).hexdigest()
    assert new.folder == folder
    files = {"train.bin": np.array(new.train, "<u2").tobytes(), "heldout.bin": b""}
    if new.mask is not None:
        files["train.mask"] = np.array(new.mask).tobytes()
    digest = hashlib.blake2b(b"".join(files.values()), digest_size=12).hexdigest()
    files |= {"heldout.txt": b"", "tokenizer/meta.json": b'{"kind": "bytes"}\n'}
    counts = {
        f"{side}_{what}": 0 for side in ("train", "heldout") for what in ("documents", "bytes")
    }
    counts |= {"train_documents": 2, "train_bytes": new.train_bytes, "skipped_files": 0}
    manifest = {"format": 2, "source": str(text), "dtype": "<u2", "digest": digest}
    manifest |= {"sizes": {name: len(data) for name, data in files.items()}, "counts": counts}
    for path in (*folder.glob("*.idx"), folder / "manifest.json"):
        path.unlink()
    for name, data in {**files, "manifest.json": json.dumps(manifest).encode()}.items():
        (folder / name).write_bytes(data)
    old = prepare(config, progress=False)
    assert len(builds) == 1
    assert old.digest == new.digest == digest
    for name in ("train", "heldout", "mask"):
        assert np.array_equal(getattr(old, name), getattr(new, name))
    assert old.describe() == new.describe()


def test_larger_vocabularies_take_four_bytes(cfg, tmp_path):
    vocabulary = {f"w{i}": i for i in range(70_000)} | {"<eos>": 70_000}
    described = {"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], **described}), "utf-8")
    tokens = prepare(cfg(tokenizer=str(path)), progress=False)
    assert tokens.train.dtype == np.int32  # as in any pair
    assert tokens.train[-1] == tokens.tokenizer.eod == 70_000


def test_bpe_learns_from_training_documents_only(cfg, source):
    held = [d.name for d in open_corpus(cfg()).documents() if d.heldout]
    before = prepare(cfg(), progress=False).tokenizer.identity()
    (source / held[0]).write_text("zyxwvu " * 5000, encoding="utf-8")
    tokens = prepare(cfg(), progress=False)
    assert tokens.tokenizer.identity() == before
    assert b"zyxwvu " * 5000 in documents_in(tokens.heldout, tokens)


def test_bpe_learns_from_a_share_of_a_large_corpus(cfg, monkeypatch):
    config, read = cfg(), []
    corpus = open_corpus(config)
    monkeypatch.setattr(module, "BPE_TRAINING_BYTES", corpus.bytes_on_disk // 4)
    train = module.train_bpe
    monkeypatch.setattr(module, "train_bpe", lambda texts, size: train(read_all(texts), size))

    def read_all(texts):
        for text in texts:
            read.append(text)
            yield text

    prepare(config, progress=False)
    assert 0 < len(read) < 20


def test_second_time_is_read_from_the_cache(cfg, builds, capfd):
    first, second = prepare(cfg(), progress=False), prepare(cfg(), progress=False)
    assert len(builds) == 1
    assert (first.train == second.train).all() and (first.heldout == second.heldout).all()
    assert first.describe() == second.describe()
    assert capfd.readouterr() == ("", "")


def test_settings_and_text_that_change_the_tokens_rebuild_them(cfg, builds, source):
    for settings in ({}, {"tokenizer": "bytes"}, {"bpe_vocab_size": 513}, {"heldout": 0.3}):
        prepare(cfg(**settings), progress=False)
    (source / "new.py").write_text("new", encoding="utf-8")
    prepare(cfg(), progress=False)
    assert len(builds) == 5
    (source / "new.py").unlink()
    prepare(cfg(), progress=False)
    assert len(builds) == 5


@pytest.mark.parametrize(
    "name",
    [
        "train.bin",
        "train.idx",
        "heldout.bin",
        "heldout.txt",
        "manifest.json",
        "tokenizer/tokenizer.json",
    ],
)
@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_damaged_cache_is_rebuilt_with_a_notice(cfg, builds, capfd, name, damage):
    whole = prepare(cfg(), progress=False)
    expected = whole.train.copy()
    path = whole.folder / name
    if damage == "truncate":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    again = prepare(cfg(), progress=False)
    assert len(builds) == 2
    assert (again.train == expected).all()
    notice = capfd.readouterr().err
    assert notice.count("\n") == 1
    assert "is damaged (" in notice and notice.endswith("): rebuilding\n")


def test_a_kill_while_building_leaves_nothing_behind(cfg, tmp_path, builds):
    """A real kill -9 in the middle, found by the next process, which builds and cleans up."""
    config = cfg()
    script = f"""
        import time
        from rwkv_jax.config import DataConfig
        from rwkv_jax.data import prepare
        add = prepare.BinidxWriter.add
        def slow(*arguments):
            add(*arguments)
            print("written", flush=True)
            time.sleep(60)
        prepare.BinidxWriter.add = slow
        prepare.prepare(DataConfig(**{vars(config)!r}))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        assert entries(tmp_path) == {".partial", ".lock"}
        process.send_signal(signal.SIGKILL)
    tokens = prepare(config, progress=False)
    assert len(builds) == 1
    assert entries(tmp_path) == {"entry", ".lock"}
    assert len(documents_in(tokens.train, tokens)) == tokens.train_documents


def test_two_processes_build_once(cfg, tmp_path, builds):
    """The second waits for the first, which does not continue before the second says so."""
    script = f"""
        from rwkv_jax.config import DataConfig
        from rwkv_jax.data import prepare
        build = prepare._build
        def slow(*arguments):
            print("building", flush=True)
            input()
            build(*arguments)
        prepare._build = slow
        print(prepare.prepare(DataConfig(**{vars(cfg())!r})).folder)
    """
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as first:
        assert first.stdout.readline() == "building\n"
        with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as second:
            assert second.stderr.readline().startswith("another process is preparing")
            assert first.communicate("\n", timeout=60) == second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0)
    assert entries(tmp_path) == {"entry", ".lock"}
    prepare(cfg(), progress=False)
    assert not builds


def test_interrupted_build_cleans_up(cfg, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.BinidxWriter, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(cfg(), progress=False)
    assert entries(tmp_path) == {".lock"}


@pytest.mark.parametrize("reason", ["File too large", "No space left on device"])
def test_a_disk_that_refuses(cfg, tmp_path, monkeypatch, reason):
    """In the middle of a write: by a limit on the size of files, or as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    remedy = "make it writable"
    try:
        if reason == "File too large":
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        else:
            add, remedy = BinidxWriter.add, "free some space"

            def full(writer, ids):
                if writer.tokens > 10_000:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                add(writer, ids)

            monkeypatch.setattr(BinidxWriter, "add", full)
        with pytest.raises(CacheError) as caught:
            prepare(cfg(tokenizer="bytes"), progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == (
        f"token cache {tmp_path}/cache: {reason}; {remedy}, or set data.cache to another folder"
    )
    assert entries(tmp_path) == {".lock"}


def test_cache_that_cannot_be_made(cfg, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CacheError, match=r"/file/cache: Not a directory; make it writable, or set data.cache"
    ):
        prepare(cfg(cache=str(tmp_path / "file" / "cache")), progress=False)


def test_default_cache_follows_xdg(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert prepare(cfg(cache=""), progress=False).folder.parent == tmp_path / "xdg" / "rwkv_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = prepare(cfg(cache="", tokenizer="bytes"), progress=False).folder
    assert folder.parent == tmp_path / "home" / ".cache" / "rwkv_jax"


def fault(config: DataConfig, kind: type[UserError]) -> str:
    with pytest.raises(kind) as caught:
        prepare(config, progress=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_empty_corpus(cfg, source, tmp_path):
    for path in source.iterdir():
        path.write_text("")
    remedy = "give a file, folder or glob that has some"
    assert fault(cfg(), CorpusError) == f"data.source = {source}: no text in it; {remedy}"
    assert entries(tmp_path) == {".lock"}


def test_no_held_out_document(cfg, source):
    assert fault(cfg(heldout=0.0001), CorpusError) == (
        "data.heldout = 0.0001 holds out none of the 40 documents:"
        " raise it, add documents, or set data.heldout=0 to train without held-out text"
    )
    tokens = prepare(cfg(heldout=0.0), progress=False)
    assert len(tokens.heldout) == tokens.heldout_bytes == 0
    assert tokens.heldout_text() == b""
    assert "bytes a token on training text" in tokens.describe()["tokenizer"]


def test_no_training_document(cfg):
    assert fault(cfg(heldout=0.9999), CorpusError) == (
        "data.heldout = 0.9999 holds out every one of the 40 documents: lower it or add documents"
    )


def test_bad_lines_leave_no_cache(cfg, source, tmp_path):
    path = source / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    assert fault(cfg(), CorpusError).startswith(f"{path}:2: not JSON")
    assert entries(tmp_path) == {".lock"}


def test_bad_tokenizer(cfg):
    assert "no such file" in fault(cfg(tokenizer="words"), TokenizerError)


def test_long_documents_are_cut_where_no_token_crosses(cfg, monkeypatch):
    tokens = prepare(cfg(), progress=False)
    assert isinstance(tokens.tokenizer, JsonTokenizer)
    text = "".join(
        (ROOT / "rwkv_jax" / "data" / f"{name}.py").read_text(encoding="utf-8")
        for name in ("bpe", "corpus", "tokenize")
    )
    monkeypatch.setattr(pieces, "LONG_DOCUMENT", 100)
    found = pieces.pieces_of(text)
    assert len(found) > 20 and "".join(found) == text
    encoded = [i for piece in tokens.tokenizer.encode_batch(found) for i in piece]
    assert encoded == tokens.tokenizer.encode(text)
    assert pieces.pieces_of("x" * 1000) == ["x" * 1000]
    assert pieces.pieces_of("") == [""]


def test_description(cfg, source):
    (source / "image.bin").write_bytes(b"\0")
    tokens = prepare(cfg(tokenizer="bytes"), progress=False)
    described = tokens.describe()
    assert described["held out"] == (
        f"{tokens.heldout_documents} documents, {tokens.heldout_bytes / 1e3:.1f} kB,"
        f" {len(tokens.heldout):,} tokens"
    )
    rate = tokens.heldout_bytes / len(tokens.heldout)
    assert described["tokenizer"] == f"bytes, 257 ids, {rate:.2f} bytes a token on held-out text"
    assert described["left out"] == "1 files: not readable UTF-8 text"


def test_some_of_the_standard_library(cfg):
    source = f"{sysconfig.get_path('stdlib')}/asyncio/*.py"
    tokens = prepare(cfg(source=source, heldout=0.3, bpe_vocab_size=1024), progress=False)
    text = b"".join(documents_in(tokens.heldout, tokens))
    assert text == tokens.heldout_text()
    assert len(tokens.heldout) < len(text) / 2


def test_progress_is_shown_on_a_terminal_only(cfg, capfd, monkeypatch):
    prepare(cfg(), progress=True)
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    prepare(cfg(tokenizer="bytes"), progress=False)
    assert capfd.readouterr().err == ""
    prepare(cfg(bpe_vocab_size=600), progress=True)
    assert "tokenising" in capfd.readouterr().err
