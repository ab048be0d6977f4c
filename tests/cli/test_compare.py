"""`compare`: several runs in one table and one picture."""

import json

import pytest

from rwkv_jax import __main__ as program
from rwkv_jax.config import Config
from rwkv_jax.toml import parse_config, to_toml


def run(folder, losses, heldout=(), **settings):
    folder.mkdir(parents=True)
    config = parse_config({"optimizer": settings} if settings else {})
    assert isinstance(config, Config)
    (folder / "config.toml").write_text(to_toml(config))
    lines = [
        {"step": 10 * i, "tokens": 1000 * i, "loss": x, "bpb": x / 2}
        for i, x in enumerate(losses, 1)
    ]
    lines += [
        {"step": 10 * i, "tokens": 1000 * i, "heldout_bpb": x, "heldout_tokens": 50}
        for i, x in enumerate(heldout, 1)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    return str(folder)


def compare(*arguments):
    return program.main(["compare", *map(str, arguments)])


def test_a_table_and_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    one = run(tmp_path / "runs" / "one", [3.0, 2.5], [1.5, 1.2, 1.4])
    other = run(tmp_path / "runs" / "other", [3.5], peak_lr=1e-3, warmup_steps=5)
    assert compare(one, other) == 0
    out = capsys.readouterr().out
    cells = [[x.strip() for x in line.split("│")] for line in out.splitlines() if "runs/o" in line]
    assert [x[-7:-1] for x in cells] == [
        ["30", "3,000", "1.250", "1.400", "1.200", "20"],
        ["10", "1,000", "1.750", "", "", ""],
    ]
    assert "optimizer.peak_lr: 0.0006, 0.001\n" in out
    assert "optimizer.warmup_steps: 10, 5\n" in out and "train.output" not in out
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert compare(one, "--plot", tmp_path / "x.png") == 0
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["none"], "none: not the folder of a run; name what train.output was"),
        (["empty"], "empty: has no metrics yet"),
        (["one", "--plot", "no/x.png"], "--plot no/x.png: cannot be a file"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "one", [3.0])
    run(tmp_path / "empty", [])
    assert compare(*arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "compare.png").exists()
