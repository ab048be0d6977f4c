"""`merge`, `inspect` of an adapter, and `--adapter` of `sample` and `eval`: what they print, write
and return."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from official_weights import checkpoint

import rwkv_jax
from rwkv_jax import __main__ as program
from rwkv_jax import adapters
from rwkv_jax.checkpoint import weights
from rwkv_jax.checkpoint.keymaps import config_of
from rwkv_jax.checkpoint.merging import merged
from rwkv_jax.checkpoint.pth import write_pth
from rwkv_jax.cli.adapters import split
from rwkv_jax.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "peft"
SIZES = {"layers": 2, "width": 128, "head": 64, "vocab": 257, "ffn": 160, "seed": 11}


def run(*arguments):
    return program.main([str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def model(tmp_path):
    """A model of version 7 that the golden adapters fit, and its tensors."""
    tensors = checkpoint("7", **SIZES)
    weights.write(tmp_path / "m.pth", tensors)
    return tmp_path / "m.pth", tensors


@pytest.mark.parametrize("name", ["out.pth", "out.safetensors", "out-hf"])
def test_every_format_holds_the_sum(name, model, tmp_path, capsys):
    path, tensors = model
    given = {"lora": 1.0, "dora": 0.5}
    names = [GOLDEN / "lora", f"{GOLDEN / 'dora'}:0.5"]
    assert run("merge", path, *names, tmp_path / name) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / name}: RWKV-7, 69 tensors\n" in out
    assert f"{GOLDEN / 'dora'}: dora of rank 2, times 0.5\n" in out
    cfg = config_of(tensors)
    pairs = [(adapters.load(GOLDEN / x, cfg)[0], weight) for x, weight in given.items()]
    expected = merged(tensors, cfg, pairs)
    found = weights.read(tmp_path / name).tensors
    assert set(found) == set(tensors)
    for tensor, x in found.items():
        np.testing.assert_array_equal(np.asarray(x), np.asarray(expected[tensor]))
    row = re.search(r"^ *att\.key +2 +([\d.]+) +([\d.]+) +([\d.]+) +(.*) %$", out, re.M)
    assert float(row[2]) <= float(row[1]) <= float(row[3]) and float(row[4]) < 1e-3


def test_the_share_that_a_type_loses(model, tmp_path, capsys):
    """Printed as it is computed from the files."""
    path, tensors = model
    assert run("merge", path, GOLDEN / "miss", tmp_path / "b.pth", "--dtype", "bfloat16") == 0
    share = re.search(r"takes (\S+) % of the change", capsys.readouterr().out)[1]
    cfg = config_of(tensors)
    exact = merged(tensors, cfg, [(adapters.load(GOLDEN / "miss", cfg)[0], 1.0)])
    stored = weights.read(tmp_path / "b.pth").tensors
    changed = [name for name, x in exact.items() if x is not tensors[name]]
    assert len(changed) == 4
    lost = sum(np.sum((np.float64(stored[x]) - np.float64(exact[x])) ** 2) for x in changed)
    change = sum(np.sum((np.float64(exact[x]) - tensors[x]) ** 2) for x in changed)
    assert float(share) == pytest.approx(100 * (lost / change) ** 0.5, rel=0.06)


def test_a_weight_follows_the_last_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:b", "runs:0.5"):
        Path(name).mkdir()
    assert split("lora/") == ("lora/", 1.0)
    assert split("lora/:0.8") == ("lora/", 0.8)
    assert split("lora:-1") == ("lora", -1.0)
    assert split("a:b") == ("a:b", 1.0)
    assert split("a:b:2e-1") == ("a:b", 0.2)
    assert split("runs:0.5") == ("runs:0.5", 1.0)  # a folder of that name
    assert split("runs:0.5:0.3") == ("runs:0.5", 0.3)
    assert split(r"C:\lora") == (r"C:\lora", 1.0)
    with pytest.raises(UserError, match="weight nan is not a finite number"):
        split("lora:nan")


def old_file(path):
    home, ones = "blocks.0.att.key", np.ones((2, 128), np.float32)
    write_pth(path, {f"{home}.lora_A": ones, f"{home}.lora_B": ones.T})


def test_alpha_is_asked_for_and_used_where_it_is_needed(model, tmp_path, capsys):
    path, _ = model
    old_file(tmp_path / "old.pth")
    assert run("merge", path, tmp_path / "old.pth", tmp_path / "out.pth") == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"rwkv_jax merge: .*old\.pth: does not say its alpha; .*\n", err)
    assert not (tmp_path / "out.pth").exists()
    given = [path, GOLDEN / "lora", tmp_path / "old.pth:0.5", tmp_path / "out.pth", "--alpha", 4]
    assert run("merge", *given) == 0
    assert run("merge", path, GOLDEN / "lora", tmp_path / "lora.pth") == 0
    both, one = (weights.read(tmp_path / x).tensors for x in ("out.pth", "lora.pth"))
    name = "blocks.0.att.key.weight"
    np.testing.assert_allclose(both[name], np.asarray(one[name]) + 2.0, rtol=0, atol=1e-6)
    capsys.readouterr()
    assert run("merge", path, GOLDEN / "lora", tmp_path / "o.pth", "--alpha", 4) == 2
    assert "no adapter here needs it" in capsys.readouterr().err


def test_another_base_and_no_change_are_said(model, tmp_path, capsys):
    path, _ = model
    params, cfg = rwkv_jax.load(path)
    fresh = adapters.init(cfg, jax.random.key(0), rank=1, targets=["att.key"])
    own = rwkv_jax.fingerprint(params, cfg)
    for name, base in {"own": own, "other": "0123456789abcdef"}.items():
        adapters.save(tmp_path / name, fresh, cfg, base=base, base_name="base.pth")
        assert run("merge", path, tmp_path / name, tmp_path / f"{name}.pth") == 0
        err = capsys.readouterr().err
        assert "the adapters change nothing" in err
        other = (
            f"was trained on other weights, 0123456789abcdef (base.pth), than the model's, {own}"
        )
        assert (other in err) == (name == "other")


def test_bad_targets_leave_nothing(model, tmp_path, capsys):
    path, _ = model
    lora = GOLDEN / "lora"
    for arguments, message in [
        ((path, lora, path), "input and output are the same file"),
        ((path, tmp_path / "none", tmp_path / "o.pth"), "none: no such file or folder"),
        ((path, lora, tmp_path / "o.gguf"), ".gguf is not a format"),
        ((path, path, tmp_path / "o.pth", "--alpha", "1"), "--alpha 1: no adapter here needs it"),
        ((lora, lora, tmp_path / "o.pth"), "an adapter, or a model with one that is not merged"),
    ]:
        assert run("merge", *arguments) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    assert sorted(x.name for x in tmp_path.iterdir()) == ["m.pth"]


def test_inspect(model, tmp_path, capsys):
    path, _ = model
    assert run("inspect", GOLDEN / "rslora") == 0
    out = capsys.readouterr().out
    rows = {"method": "rslora", "rank": "3", "alpha": "4", "layers": "1", "base": r"\(tiny\)"}
    for name, value in rows.items():
        assert re.search(rf"{name} +│ {value} +│", out), name
    assert run("inspect", GOLDEN / "miss", "--base", path) == 0
    out = capsys.readouterr().out
    cfg = config_of(weights.read(path).tensors)
    adapter, _ = adapters.load(GOLDEN / "miss", cfg)
    w = np.asarray(rwkv_jax.load(path)[0].blocks.ffn.key)
    x = adapter.low_rank["blocks.ffn.key"]
    change = np.linalg.norm(np.asarray(x.down) @ np.asarray(x.up)) / np.linalg.norm(w)
    printed = re.search(r"ffn\.key +2 +(\S+)", out)[1]
    assert float(printed) == pytest.approx(change, rel=6e-3)
    old_file(tmp_path / "old.pth")
    assert run("inspect", tmp_path / "old.pth") == 0
    assert "not in the file; --alpha says it" in capsys.readouterr().out
    assert run("inspect", tmp_path / "old.pth", "--base", path) == 2
    assert "does not say its alpha" in capsys.readouterr().err
    assert run("inspect", path, "--base", path) == 2
    assert "is no adapter; leave out --base" in capsys.readouterr().err


def test_sampled_and_measured_as_merged(model, tmp_path, capsys):
    """`--adapter` gives the text and the bits of the merged model."""
    path, _ = model
    pair = [f"{GOLDEN / 'lora'}:0.5", GOLDEN / "dora"]
    assert run("merge", path, *pair, tmp_path / "merged.pth") == 0
    (tmp_path / "t.txt").write_text("some text, and some more")
    flags = [x for adapter in pair for x in ("--adapter", adapter)]
    texts, bits = [], []
    for model, options in ((path, flags), (tmp_path / "merged.pth", [])):
        capsys.readouterr()
        assert run("sample", model, "ab", "--tokens", 12, "--seed", 1, *options) == 0
        texts.append(capsys.readouterr().out)
        measured = tmp_path / "bits.json"
        assert run("eval", model, tmp_path / "t.txt", "--json", measured, *options) == 0
        bits.append(json.loads(measured.read_text())["texts"])
    assert texts[0] == texts[1] and len(texts[0]) > 2
    assert bits[0] == bits[1]
    assert run("sample", path, "ab", "--alpha", 3) == 2
    assert "add --adapter" in capsys.readouterr().err
