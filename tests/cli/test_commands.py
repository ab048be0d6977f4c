"""`python -m rwkv_jax`: inspect, convert and diff: what they print, write and return."""

import contextlib
import errno
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from official_weights import VERSIONS, checkpoint
from rich.console import Console

from rwkv_jax import __main__ as program
from rwkv_jax.checkpoint import weights
from rwkv_jax.checkpoint.pth import write_pth
from rwkv_jax.checkpoint.safetensors import read_safetensors
from rwkv_jax.cli import inspect as inspect_command
from rwkv_jax.cli.command import run

ROOT = Path(program.__file__).parents[1]
RANKS = (6, 5, 4, 7, 3)


def rwkv_jax(*arguments):
    return program.main([str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def model(tmp_path):
    """A version 7 model that Hugging Face's layout can hold."""
    tensors = checkpoint("7", width=128, head=64, ranks=RANKS)
    weights.write(tmp_path / "model.pth", tensors)
    return tmp_path / "model.pth", tensors


def test_help_lists_and_explains(capsys):
    with pytest.raises(SystemExit) as leave:
        rwkv_jax("--help")
    assert leave.value.code == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^    {name} ", text, re.M) for name in program.COMMANDS)
    for name in ("train", "sample", "inspect", "convert", "diff"):
        with pytest.raises(SystemExit) as leave:
            rwkv_jax(name, "--help")
        text = capsys.readouterr().out
        assert leave.value.code == 0 and f"python -m rwkv_jax {name} " in text


@pytest.mark.parametrize(
    "arguments", [[], ["brew"], ["inspect"], ["convert", "one"], ["diff", "a"]]
)
def test_mistyped_is_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as leave:
        rwkv_jax(*arguments)
    out, err = capsys.readouterr()
    assert (leave.value.code, out) == (2, "") and re.fullmatch(r"rwkv_jax.*; see --help\n", err)


def test_as_a_program():
    """`-m`, with the malloc settings: help comes without JAX."""
    command = [sys.executable, "-X", "importtime", "-m", "rwkv_jax", "inspect", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "python -m rwkv_jax inspect MODEL" in done.stdout
    assert "| jax\n" not in done.stderr


@pytest.mark.parametrize("version", VERSIONS)
def test_inspect_every_version(version, tmp_path, capsys):
    tensors = checkpoint(version, layers=2, vocab=257, ranks=RANKS)
    weights.write(tmp_path / "m.pth", tensors)
    assert rwkv_jax("inspect", tmp_path / "m.pth") == 0
    text = capsys.readouterr().out
    heads = "" if version == "4" else ", 2 heads of 16"
    assert f"RWKV-{version}, 2 layers of width 32{heads}" in text and "complete, and all" in text
    count = sum(x.size for x in tensors.values())
    assert re.search(rf"parameters *│ {count:,} ", text) and re.search("tokenizer *│ bytes", text)
    rows = [line.split() for line in text.splitlines()]
    groups = {"embedding", "head", "norms", "time", "channel"} | (
        {"DeepEmbed"} if version == "7a" else set()
    )
    found = [row for row in rows if row and row[0] in groups and "%" in row]
    assert {row[0] for row in found} == groups
    counts = [row[row.index("%") - 2].replace(",", "") for row in found]
    assert sum(map(int, counts)) == count
    assert sum(float(row[row.index("%") - 1]) for row in found) == pytest.approx(100, abs=0.3)


def test_inspect_cuts_no_number(model, capsys, monkeypatch):
    """Lines fit 80 columns; in fewer, or without a terminal, every number is complete."""
    path, _ = model
    numbers = {}
    for columns in (None, 80, 40):
        monkeypatch.setattr(inspect_command, "width", lambda columns=columns: columns)
        rwkv_jax("inspect", path, "--tensors")
        text = capsys.readouterr().out
        tables = text[text.index("parameters by group") :]
        numbers[columns] = re.findall(r"(?<= )-?\d[\d.,e+-]*(?= |\n)", tables)
        assert len(numbers[columns]) > 500
        assert columns is None or max(map(len, tables.splitlines())) <= columns
    assert numbers[None] == numbers[80] == numbers[40]


def test_no_permission_is_distinguished_from_no_space(capsys):
    def denied():
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "there")

    assert run("rwkv_jax x", denied) == 2
    assert "there: Permission denied; see that you may read it" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_one_line(monkeypatch, capsys):
    """Asked for by JAX_PLATFORMS; JAX raises either of two errors. Others are raised."""

    def missing():
        raise error

    for error in (RuntimeError("Unable to initialize backend 'cuda'"), AssertionError()):
        monkeypatch.setenv("JAX_PLATFORMS", "cuda")
        with pytest.raises(type(error)):
            run("rwkv_jax x", missing)  # the tests have devices
        with monkeypatch.context() as patched:
            patched.setattr(jax, "devices", missing)
            assert run("rwkv_jax x", missing) == 2
            patched.delenv("JAX_PLATFORMS")
            with pytest.raises(type(error)):
                run("rwkv_jax x", missing)
        message = capsys.readouterr().err
        assert message.startswith("rwkv_jax x: JAX_PLATFORMS=cuda: no such device")
        assert message.count("\n") == 1


def test_what_stdout_cannot_show_is_replaced(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run("rwkv_jax x", lambda: Console(width=80).print("b\u00e4r.txt")) == 0
    assert stdout.buffer.getvalue() == b"b?r.txt\n"


def test_inspect_decays(tmp_path, capsys):
    """Half-lives that can be worked out by hand: log 2 / exp(time_decay) tokens."""
    tensors = checkpoint("4", layers=1, width=4, vocab=257)
    tensors["blocks.0.att.time_decay"] = np.log(np.log(2) / np.array([1.0, 2.0, 4.0, 1000.0]))
    weights.write(tmp_path / "m.pth", tensors)
    rwkv_jax("inspect", tmp_path / "m.pth")
    row = re.search(
        r"^0 +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d,.]+) ", capsys.readouterr().out, re.M
    )
    assert row and row.groups() == ("0.5000", "0.7740", "0.9993", "3.0", "1,000.0")


def test_inspect_lists_all_that_is_wrong(model, capsys):
    path, tensors = model
    tensors = dict(tensors)
    bad = tensors["blocks.1.ffn.key.weight"].copy()
    bad[0, :3] = np.nan, np.inf, -np.inf
    tensors["blocks.1.ffn.key.weight"] = bad
    del tensors["blocks.2.ln1.bias"]
    tensors["blocks.0.att.r_k"] = tensors["blocks.0.att.r_k"][:1]
    tensors["stray"] = np.zeros(3, np.float32)
    weights.write(path, tensors)
    assert rwkv_jax("inspect", path, "--tensors") == 1
    text = capsys.readouterr().out
    assert "wrong: blocks.2.ln1.bias is missing" in text
    assert "wrong: stray is not a parameter of RWKV-7" in text
    assert "wrong: blocks.0.att.r_k has shape [1, 64], not [2, 64]" in text
    assert "wrong: blocks.1.ffn.key.weight has 3 NaN or infinite values" in text
    assert "complete" not in text and "nan" not in text.lower().replace("nan or", "").replace(
        "  nan", ""
    )


def test_inspect_checks_the_sums_of_a_pth(model, capsys):
    """One bit is another: the numbers are finite, and the file is read."""
    path, _ = model
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert rwkv_jax("inspect", path) == 1
    assert re.search(
        r"wrong: model\.pth: the checksum of '\w+/data/\d+' does", capsys.readouterr().out
    )


def test_names_are_shown_as_they_are(model, tmp_path, capsys):
    """The author of a file chooses them: text that rich would read as markup is printed as is."""
    path, tensors = model
    weights.write(tmp_path / "odd.pth", tensors | {"[/]x[red]": np.zeros(2, np.float32)})
    assert rwkv_jax("inspect", tmp_path / "odd.pth", "--tensors") == 1
    text = capsys.readouterr().out
    assert "wrong: [/]x[red] is not a parameter" in text and text.count("[/]x[red]") == 2
    assert rwkv_jax("diff", path, tmp_path / "odd.pth") == 1
    assert "[/]x[red]" in capsys.readouterr().out


def test_convert_around_and_back(model, tmp_path, capsys):
    """.pth, safetensors, a Hugging Face folder and back: the file is the same as at first."""
    path, tensors = model
    steps = ["a.safetensors", "world-0.1b-hf", "c.pth"]
    for source, target in zip([path.name, *steps], steps, strict=False):
        assert rwkv_jax("convert", tmp_path / source, tmp_path / target) == 0
    assert (tmp_path / "c.pth").read_bytes() == path.read_bytes()
    assert f"RWKV-7, {len(tensors)} tensors" in capsys.readouterr().out
    assert rwkv_jax("diff", path, tmp_path / "world-0.1b-hf") == 0
    all_of = f"{len(tensors)} of {len(tensors)}"
    assert f"{all_of} tensors hold the same numbers" in capsys.readouterr().out


def test_convert_removes_prefixes_and_replaces_no_folder(model, tmp_path, capsys):
    path, tensors = model
    prefixed = tmp_path / "deepspeed.pth"
    write_pth(prefixed, {f"_forward_module.{name}": x for name, x in tensors.items()})
    assert rwkv_jax("convert", prefixed, tmp_path / "plain.pth") == 0
    assert (tmp_path / "plain.pth").read_bytes() == path.read_bytes()
    (tmp_path / "folder").mkdir()
    capsys.readouterr()
    assert rwkv_jax("convert", path, tmp_path / "folder", "--overwrite") == 2
    assert "a folder is not replaced" in capsys.readouterr().err
    (tmp_path / "file").write_text("precious")
    assert rwkv_jax("convert", path, tmp_path / "file", "--overwrite") == 2
    assert "is a file; name a new folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "precious"


def test_convert_to_bfloat16(model, tmp_path):
    path, tensors = model
    assert rwkv_jax("convert", path, tmp_path / "low.safetensors", "--dtype", "bfloat16") == 0
    low = read_safetensors(tmp_path / "low.safetensors")
    assert {x.dtype.name for x in low.values()} == {"bfloat16"}
    for name, x in tensors.items():
        assert np.array_equal(low[name], x.astype(low[name].dtype)), name


def test_convert_leaves_nothing_half_written(model, tmp_path, capsys):
    path, tensors = model
    whole = path.read_bytes()
    (tmp_path / "there.pth").write_text("precious")
    bad = tmp_path / "bad.pth"
    weights.write(bad, {name: x for name, x in tensors.items() if "head" not in name})
    for arguments, message in {
        (path, path): "input and output are the same file",
        (path, tmp_path / "there.pth"): "already exists; name another file, or add --overwrite",
        (bad, tmp_path / "new.pth"): "bad.pth: head.weight is missing",
        (path, tmp_path / "no" / "folder.pth"): "No such file or directory",
        (path, tmp_path / "m.gguf"): ".gguf is not a format",
    }.items():
        before = sorted(tmp_path.rglob("*"))
        assert rwkv_jax("convert", *arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and message in err and err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "there.pth").read_text() == "precious" and path.read_bytes() == whole
    assert rwkv_jax("convert", path, tmp_path / "there.pth", "--overwrite") == 0
    assert (tmp_path / "there.pth").read_bytes() == whole


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_stdout_is_one_line(model):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "rwkv_jax", "inspect", model[0]],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    assert done.returncode == 2 and "No space left on device" in done.stderr
    assert done.stderr.count("\n") == 1


def test_diff_ranks_what_differs(model, tmp_path, capsys):
    path, tensors = model
    changed = dict(tensors)
    changed["head.weight"] = tensors["head.weight"] * np.float32(1.5)
    changed["emb.weight"] = tensors["emb.weight"] + np.float32(0.001)
    changed["ln_out.bias"] = tensors["ln_out.bias"][:3]
    changed["stray"] = np.zeros(2, np.float32)
    weights.write(tmp_path / "other.safetensors", changed)
    assert rwkv_jax("diff", path, tmp_path / "other.safetensors") == 1
    text = capsys.readouterr().out
    order = [text.index(name) for name in ("stray", "head.weight", "emb.weight")]
    assert order == sorted(order) and "only in B" in text and "3 in B" in text
    assert (
        re.search(r"head\.weight .* 0\.5 ", text)
        and f"{len(tensors) - 3} of {len(changed)} " in text
    )
    assert "ln_out.weight" not in text
    assert rwkv_jax("diff", path, tmp_path / "other.safetensors", "--all") == 1
    assert "ln_out.weight" in capsys.readouterr().out
    assert rwkv_jax("diff", path, tmp_path / "none.pth") == 2


def tokenizer_json(path, tokens):
    """Writes a tokenizer of so many tokens, with one for the end of a document."""
    vocabulary = {"<|endoftext|>": 0} | {f"t{i}": i for i in range(1, tokens)}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    bpe.add_special_tokens(["<|endoftext|>"])
    bpe.save(str(path))
    return path.read_bytes()


def listing(folder):
    return {path.name for path in folder.iterdir()}


def test_convert_copies_the_tokenizer_of_the_model_only(model, tmp_path, monkeypatch, capsys):
    """Of two files beside the weights the one that fits the model is copied."""
    path, tensors = model
    vocab = len(tensors["emb.weight"])
    tokenizer_json(tmp_path / "tokenizer.json", vocab + 1)
    out = tmp_path / "out"
    out.mkdir()
    strange = tokenizer_json(out / "20B_tokenizer.json", vocab + 2)
    assert rwkv_jax("convert", path, out / "alone.pth") == 0
    assert rwkv_jax("convert", path, out / "alone") == 0
    assert listing(out) == {"alone.pth", "alone", "20B_tokenizer.json"}
    assert not listing(out / "alone") & {"tokenizer.json", "tokenizer_config.json"}
    # Also of a model whose vocabulary is known by its size.
    monkeypatch.setitem(weights.KNOWN, vocab, "world")
    assert rwkv_jax("convert", path, out / "world.pth") == 0
    assert rwkv_jax("convert", path, out / "world") == 0
    assert (out / "world" / "rwkv_vocab_v20230424.txt").stat().st_size > 1e6
    assert "RWKV7Tokenizer" in (out / "world" / "tokenizer_config.json").read_text()
    assert "tokenizer.json" not in listing(out) | listing(out / "world")
    # One that fits: beside the file, and in the folder under the name that transformers expects.
    own = tokenizer_json(tmp_path / "20B_tokenizer.json", vocab)
    assert rwkv_jax("convert", path, tmp_path / "hf") == 0
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == own
    assert "PreTrainedTokenizerFast" in (tmp_path / "hf" / "tokenizer_config.json").read_text()
    assert rwkv_jax("convert", tmp_path / "hf", tmp_path / "back.pth") == 0  # as its own is there
    assert rwkv_jax("convert", path, out / "own.pth") == 2
    assert "/20B_tokenizer.json: another model's tokenizer" in capsys.readouterr().err
    assert (out / "20B_tokenizer.json").read_bytes() == strange and "own.pth" not in listing(out)
    (out / "20B_tokenizer.json").unlink()
    for name in ("own.pth", "again.pth"):
        assert rwkv_jax("convert", path, out / name) == 0
        assert (out / "20B_tokenizer.json").read_bytes() == own


def test_convert_copies_a_vocabulary_in_a_text_file(tmp_path, capsys):
    """Of a model whose vocabulary is its own; the World vocabulary needs no file."""
    path, vocab, name = tmp_path / "model.pth", 300, "rwkv_vocab_v20230424.txt"
    weights.write(path, checkpoint("7", width=128, head=64, ranks=RANKS, vocab=vocab))
    lines = [f"{b + 1} {bytes([b])!r} 1\n" for b in range(256)]
    lines += [f"{i} '<{i:03}>' 5\n" for i in range(257, vocab)]
    (tmp_path / name).write_text("".join(lines))
    assert rwkv_jax("inspect", path) == 0
    assert "tokenizer" in (out := capsys.readouterr().out) and "txt " in out
    for target in (tmp_path / "hf", tmp_path / "other" / "m.pth"):
        target.parent.mkdir(exist_ok=True)
        assert rwkv_jax("convert", path, target) == 0
        folder = target if target.is_dir() else target.parent
        assert (folder / name).read_text() == "".join(lines)
        assert f"{folder / name}: its tokenizer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "options", "line"),
    [
        ("4", [], "from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pret"),
        ("7", [], "from rwkv7_hf import RWKV7ForCausalLM; RWKV7ForCausalLM.from_pretrained("),
        ("7", ["--layout", "official-rwkv7"], "rwkv_jax.load("),
    ],
)
def test_convert_prints_what_opens_a_folder(version, options, line, tmp_path, capsys):
    """And that no tokenizer is known, or none that the libraries have."""
    for vocab, problem in (
        (67, "none is known for 67 tokens; put its"),
        (257, "the model's is bytes"),
    ):
        source, target = tmp_path / f"{vocab}.pth", tmp_path / f"{vocab}"
        tensors = checkpoint(version, width=128, head=64, ranks=RANKS, vocab=vocab)
        weights.write(source, tensors)
        assert rwkv_jax("convert", source, target, *options) == 0
        out, err = capsys.readouterr()
        assert f"open it: {line}" in out and f'("{target}")' in out
        assert re.fullmatch(f"{target}: without a tokenizer: {problem}.*\n", err)
        assert rwkv_jax("diff", source, target) == 0
        capsys.readouterr()
    for target, layout in ((tmp_path / "m.pth", "fla-rwkv7"), (tmp_path / "m", "fla-rwkv6")):
        with contextlib.suppress(SystemExit):  # argparse
            assert rwkv_jax("convert", source, target, "--layout", layout) == 2
        assert not target.exists() and layout in capsys.readouterr().err


def test_convert_does_without_a_tokenizer_that_cannot_be_read(model, tmp_path, capsys):
    path, _ = model
    (tmp_path / "tokenizer.json").write_text("{}")
    assert rwkv_jax("convert", path, tmp_path / "hf") == 0
    assert "hf: without a tokenizer: " in capsys.readouterr().err
    assert "tokenizer.json" not in listing(tmp_path / "hf")


def test_a_folder_is_written_with_its_tokenizer_or_not_at_all(model, tmp_path, monkeypatch, capsys):
    """On a full disk the message names the output, and no folder of its path is left behind."""
    path, tensors = model
    tokenizer_json(tmp_path / "tokenizer.json", len(tensors["emb.weight"]))
    before, real = listing(tmp_path), os.fsync

    def full(number):
        if "tokenizer.json" in os.readlink(f"/proc/self/fd/{number}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(number)

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        for target in ("new/folder/hf", "file/m.pth"):
            assert rwkv_jax("convert", path, tmp_path / target) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/new/folder/hf/tokenizer.json: No space left" in first
    assert f"{tmp_path}/file/" in second
    assert listing(tmp_path) == before
    assert rwkv_jax("convert", path, tmp_path / "new/folder/hf") == 0
    assert "tokenizer.json" in listing(tmp_path / "new/folder/hf")


def test_ctrl_c_while_something_is_imported(capsys):
    """An extension module raises an ImportError, whose cause says so."""

    def interrupted():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as press:
            raise ImportError("numpy failed to import") from press

    assert run("it", interrupted) == 130
    assert capsys.readouterr() == ("", "\n")


def test_an_interrupt_that_python_drops_ends_the_command(capsys):
    """In a finaliser an exception cannot be raised; JAX has a callback of the garbage collector."""

    class Final:
        def __del__(self):
            raise KeyboardInterrupt

    def action():
        final = Final()
        del final
        time.sleep(10)

    assert run("prog", action) == 130
