"""The command `eval`: its tables, curve, JSON and error messages."""

import dataclasses
import functools
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation.tiny_models import guesser

from rwkv_jax import __main__ as program
from rwkv_jax.checkpoint import weights
from rwkv_jax.checkpoint.store import CONFIG, Store
from rwkv_jax.config import Config, DataConfig
from rwkv_jax.data.binidx import BinidxWriter
from rwkv_jax.data.prepare import prepare
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.evaluation import bits, continuations, text
from rwkv_jax.toml import to_toml
from rwkv_jax.training.state import TrainState, to_trees

ROOT = Path(program.__file__).parents[1]
SHARES = {"x": 0.5, "y": 0.25}
REST = -math.log2(0.25 / 255)
"""Bits of any other byte, and of the end of a document."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a run of it, texts and tasks."""
    folder = tmp_path_factory.mktemp("eval")
    params, cfg = guesser(SHARES)
    weights.save(folder / "model.safetensors", params, cfg)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(8):
        (corpus / f"{number}.txt").write_text("xy" * (number + 1))
    (corpus / "picture").write_bytes(b"\xff\xfe")
    run, tokenizer = folder / "run", ByteTokenizer()
    run.mkdir()
    data = DataConfig(source=str(corpus), heldout=0.4, tokenizer="bytes")
    (run / "config.toml").write_text(to_toml(Config(model=cfg, data=data)))
    tokenizer.save(run / "tokenizer")
    store = Store(run / "checkpoints", keep=1)
    meta = {"model": dataclasses.asdict(cfg), "tokenizer": tokenizer.identity()}
    state = TrainState(jnp.zeros((), jnp.int32), params, {"m": jnp.zeros(1)})
    store.save(1, to_trees(state), meta)
    store.close()
    (folder / "long.txt").write_text("x" * 39)
    (folder / "lines.jsonl").write_text('{"text": "xyz", "body": "yy"}\n{"text": ""}\n')
    (folder / "ends.jsonl").write_text(
        '{"prompt": "", "completion": "xx"}\n{"prompt": "", "completion": "xy"}\n'
    )
    (folder / "quiz.jsonl").write_text(
        '{"question": "?", "choices": ["y", "xxx"], "answer": 1}\n'
        '{"question": "?", "choices": ["x", "y"], "answer": "x"}\n'
    )
    (folder / "bad.jsonl").write_text('{"question": "?", "choices": ["x", "y"]}\n')
    (folder / "latin").write_bytes("caf\xe9".encode("latin-1"))
    (folder / "empty").write_bytes(b"")
    return folder


@pytest.fixture(autouse=True)
def small_and_plain(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    short = functools.partialmethod(bits.Settings.__init__, window=16)
    monkeypatch.setattr(bits.Settings, "__init__", short)
    monkeypatch.setattr(continuations, "WIDTHS", (16,))


@pytest.fixture
def run_eval(folder, monkeypatch, capsys):
    """Runs the command in the folder; the exit code, and the lines of stdout and stderr."""

    def run(*arguments):
        monkeypatch.chdir(folder)
        code = program.main(["eval", *map(str, arguments)])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out.splitlines(), err=err.splitlines())

    return run


def cells(line):
    return re.split(r"  +", line.strip())


def test_a_text(run_eval):
    done = run_eval("model.safetensors", "long.txt")
    assert (done.code, done.err) == (0, [])
    title, _, header, row = done.out
    assert re.fullmatch(r"RWKV-4, [\d,]+ parameters, 1 layers of width 32, in float32", title)
    columns = ["text", "tokens", "bits/byte", "gzip -9", "xz -9", "ppl/token", "ppl/word"]
    assert cells(header) == columns
    name, tokens, bpb, gzip, _, ppl, word = cells(row)
    bits = 39 + REST
    assert (name, tokens, bpb) == ("long.txt", "40", f"{bits / 39:.3f}")
    assert 4 < float(gzip) < 8
    assert (ppl, word) == (f"{2 ** (bits / 40):.3f}", f"{2**bits:.2e}")
    # Numbers end where their headings do.
    assert [header.index(x) + len(x) for x in columns[1:]] == [
        row.index(x) + len(x) for x in cells(row)[1:]
    ]


def test_several_texts_in_their_order_and_by_position(run_eval):
    done = run_eval("model.safetensors", "lines.jsonl", "corpus", "long.txt", "--by-position")
    assert done.err == ["corpus: 1 file left out, not readable UTF-8 text"]
    rows = [cells(line)[:2] for line in done.out[3:6]]
    assert rows == [["lines.jsonl", "4"], ["corpus", "80"], ["long.txt", "40"]]
    header, first, _, last = map(cells, done.out[-4:])
    assert header == ["long.txt: position", "documents", "tokens", "bits/byte", "ppl/token"]
    assert first == ["0-15", "1", "16", "1.000", "2.000"]
    bits = 7 + REST
    assert last == ["32-39", "1", "8", f"{bits / 7:.3f}", f"{2 ** (bits / 8):.3f}"]


def test_heldout_text_of_a_run(run_eval):
    done = run_eval("run", "--json", "run.json")
    source = str(Path("corpus").absolute())
    assert (done.code, done.err) == (0, [f"{source}: 1 file left out, not readable UTF-8 text"])
    [found] = json.loads(Path("run.json").read_text())["texts"]
    cfg = DataConfig(source=source, heldout=0.4, tokenizer="bytes", cache="cache")
    tokens = prepare(cfg, progress=False)
    assert found["name"] == "held-out text" and 0 < found["documents"] < 8
    assert (found["tokens"], found["bytes"]) == (len(tokens.heldout), tokens.heldout_bytes)
    # With tasks it is not read unless that is asked for.
    only = ["--choices", "quiz.jsonl", "--batch", 1]
    assert run_eval("run", *only).err == []
    assert run_eval("run", *only, "--by-position").err == done.err


def test_heldout_text_of_a_run_on_a_pair(run_eval, folder):
    with BinidxWriter(folder / "pair", np.uint16) as writer:
        for text in ("one", "two", "three", "é four", "five"):
            writer.add(ByteTokenizer().encode(text), [0])
    shutil.copytree(folder / "run", folder / "paired")
    config = folder / "paired" / CONFIG
    text = re.sub(r'(?m)^source = ".*"$', 'source = "pair"', config.read_text(encoding="utf-8"))
    config.write_text(text, encoding="utf-8")
    done = run_eval("paired", "--json", "run.json")
    assert (done.code, done.err) == (0, [])
    [found] = json.loads(Path("run.json").read_text())["texts"]
    assert found["documents"] == 2 and found["bytes"] == len("é four".encode()) + len("five")


def test_stdin_field_and_limit(run_eval, stdin):
    stdin(b"x" * 100)
    done = run_eval("model.safetensors", "-", "--limit", 20)
    assert cells(done.out[3])[:3] == ["-", "20", "1.000"]
    done = run_eval("model.safetensors", "lines.jsonl", "--field", "body", "--limit", 2)
    assert cells(done.out[3])[:3] == ["lines.jsonl", "2", "2.000"]


@pytest.fixture
def stdin(monkeypatch):
    return lambda data: monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))


def test_tasks(run_eval):
    files = ["--lambada", "ends.jsonl", "--choices", "quiz.jsonl", "--batch", 1]
    done = run_eval("model.safetensors", *files)
    assert (done.code, done.err) == (0, [])
    _, _, *lambada = done.out[:4]
    assert cells(lambada[0]) == ["ends of texts", "questions", "accuracy, %", "perplexity"]
    mean = 2 ** ((2 + 3) / 2)
    assert cells(lambada[1]) == ["ends.jsonl", "2", "50.00 ± 50.00", f"{mean:.3f}"]
    header, row = map(cells, done.out[-2:])
    assert header == ["choices", "questions", "accuracy, %", "by bytes, %", "guessing, %"]
    assert row == ["quiz.jsonl", "2", "50.00 ± 50.00", "100.00 ± 0.00", "50.00"]
    done = run_eval("model.safetensors", *files, "--limit", 1)
    assert cells(done.out[-1]) == ["quiz.jsonl", "1", "0.00", "100.00", "50.00"]


def test_json_and_picture(run_eval, folder):
    files = ["--json", "out.json", "--plot", "out.png", "--batch", 1]
    done = run_eval(
        "model.safetensors", "long.txt", "lines.jsonl", "--lambada", "ends.jsonl", *files
    )
    assert done.code == 0
    found = json.loads((folder / "out.json").read_text())
    assert {name: found[name] for name in ("model", "version", "tokenizer", "dtype")} == {
        "model": "model.safetensors",
        "version": "4",
        "tokenizer": "bytes",
        "dtype": "float32",
    }
    first = found["texts"][0]
    assert first["bits_per_byte"] == pytest.approx((39 + REST) / 39, rel=1e-6)
    assert [x["stop"] for x in first["buckets"]] == [16, 32, 40]
    assert sum(x["nats"] for x in first["buckets"]) == pytest.approx(first["nats"])
    assert first["compressors"].keys() == {"gzip -9", "xz -9"}
    assert found["lambada"][0]["accuracy"] == 0.5 and found["choices"] == []
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")
    (folder / "blank.txt").write_text(" " * 16)
    assert run_eval("model.safetensors", "blank.txt", "--json", "out.json").code == 0
    [blank] = json.loads((folder / "out.json").read_text(), parse_constant=pytest.fail)["texts"]
    assert blank["word_perplexity"] is None and blank["buckets"][1]["bits_per_byte"] is None


def test_dtype_and_batch_are_used(run_eval):
    exact, rounded, single = (
        run_eval("model.safetensors", "corpus", *options).out
        for options in ((), ("--dtype", "bfloat16"), ("--batch", 1))
    )
    assert rounded[0].endswith("in bfloat16") and single == exact
    assert cells(rounded[3]) != cells(exact[3])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["model.safetensors"], "nothing to measure the model on: name a TEXT, --lambada FILE or"),
        (
            ["model.safetensors", "--choices", "quiz.jsonl", "--by-position"],
            "--by-position needs a text",
        ),
        (["model.safetensors", "none"], "none: no such file or folder; give one that exists"),
        (["model.safetensors", "latin"], "latin: not UTF-8 at byte 3; convert it"),
        (["model.safetensors", "empty"], "empty: no text in it; give one that has some"),
        (["model.safetensors", "bad.jsonl"], r"bad.jsonl:1: no field 'text'; set --field to one"),
        (["model.safetensors", "-", "-"], r"stdin \(-\) can be read once"),
        (["model.safetensors", "-"], "stdin: byte 1 is not UTF-8; convert it first"),
        (["model.safetensors", "long.txt", "--limit", "0"], "--limit 0: 1 or more"),
        (["model.safetensors", "long.txt", "--batch", "-1"], "--batch -1: 1 or more"),
        (["model.safetensors", "long.txt", "--json", "no/out"], "--json no/out: cannot be a file"),
        (["model.safetensors", "long.txt", "--plot", "corpus"], "--plot corpus: cannot be a file"),
        (["run", "--field", "body"], "--field belongs to the JSON lines of a TEXT"),
        (["model.safetensors", "--choices", "bad.jsonl"], "bad.jsonl:1: no field 'answer'; rename"),
        (["model.safetensors", "--lambada", "empty"], "empty: no questions in it"),
        (["model.safetensors", "long.txt", "--tokenizer", "x"], "--tokenizer x: no such file"),
        (["none.pth", "long.txt"], "none.pth: "),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run_eval, stdin, arguments, message):
    stdin(b"x\xff")
    done = run_eval(*arguments)
    assert done.code == 2 and len(done.err) == 1
    assert re.match(rf"rwkv_jax eval: {message}", done.err[0])


def test_ctrl_c_is_silent(run_eval, monkeypatch):
    def pressed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(text, "measure", pressed)
    done = run_eval("model.safetensors", "long.txt")
    assert (done.code, done.err) == (130, [""])


def test_too_little_memory_is_one_line(run_eval, monkeypatch):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(text, "measure", full)
    done = run_eval("model.safetensors", "long.txt")
    assert done.code == 2 and re.search(r"not enough memory \(RES.*\); lower --batch", done.err[0])


def test_output_on_a_full_disk_is_one_line(run_eval, monkeypatch):
    with open("/dev/full", "w") as disk:
        monkeypatch.setattr(sys, "stdout", disk)
        done = run_eval("model.safetensors", "long.txt")
    assert done.code == 2 and len(done.err) == 1
    assert re.match("rwkv_jax eval: the output: No space left on device; ", done.err[0])


def test_a_reader_that_leaves(folder):
    """In a process of its own, which must exit without another error."""
    command = [sys.executable, "-m", "rwkv_jax", "eval", "model.safetensors", "long.txt"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options: dict = {"cwd": folder, "env": environment, "stderr": subprocess.PIPE, "timeout": 120}
    reader, writer = os.pipe()
    os.close(reader)
    left = subprocess.run([*command, "--json", "left.json"], stdout=writer, **options)
    os.close(writer)
    assert (left.returncode, left.stderr) == (0, b"")
    assert json.loads((folder / "left.json").read_text())["texts"]
