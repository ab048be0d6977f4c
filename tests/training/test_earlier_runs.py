"""Runs that version 0.1.0 wrote (`tests/golden/run`) are opened, sampled from and resumed."""

import json
import shutil
from pathlib import Path

import jax
import pytest
from rich.console import Console

from rwkv_jax.checkpoint.weights import load_run
from rwkv_jax.sampling import Sampling, generate
from rwkv_jax.toml import load_config
from rwkv_jax.training.loop import train
from rwkv_jax.training.metrics import read_metrics
from rwkv_jax.training.report import Report

GOLDEN = Path(__file__).parents[1] / "golden" / "run"
TIMES = {"seconds", "tokens_per_s", "steps", "data", "saving", "evaluating", "mfu", "compressors"}


def close(lines):
    """Metrics without times, to the accuracy that other machines reproduce."""
    return [
        {key: pytest.approx(value, rel=1e-4) for key, value in line.items() if key not in TIMES}
        for line in lines
    ]


@pytest.mark.parametrize(
    "version, mesh",
    [("7", 1), *(pytest.param(*x, marks=pytest.mark.slow) for x in (("4", 1), ("4", 2), ("7", 2)))],
)
def test_a_run_of_an_earlier_version(version, mesh, tmp_path, monkeypatch):
    name = f"rwkv{version}"
    expected = json.loads((GOLDEN / "expected.json").read_text())[name]
    shutil.unpack_archive(GOLDEN / f"{name}.tar.xz", tmp_path)
    shutil.copy(GOLDEN / "text.jsonl", tmp_path)
    monkeypatch.setattr(Report, "curve", lambda _: None)
    monkeypatch.chdir(tmp_path)  # the run names its text by a relative path

    params, cfg, tokenizer = load_run(name)
    settings = {"max_tokens": 16, "sampling": Sampling(temperature=0.0)}
    chunks = generate(params, cfg, tokenizer, ["the "], **settings)
    assert "".join(chunk.text for chunk in chunks) == expected["text"]

    config = load_config(Path(name) / "config.toml", [f"mesh.fsdp={mesh}", "data.cache=cache"])
    with (tmp_path / "stdout").open("w") as file:
        train(config, console=Console(file=file, width=100))
    assert "resuming from step 6" in (tmp_path / "stdout").read_text()
    found = read_metrics(Path(name) / "metrics.jsonl")
    assert all(x.pop("objective", 1.0) > 0 for x in found)  # lines have it since
    assert [line.keys() - TIMES for line in found] == [
        line.keys() - TIMES for line in expected["metrics"]
    ]
    assert [{k: v for k, v in x.items() if k not in TIMES} for x in found] == close(
        expected["metrics"]
    )
    assert jax.tree.map(lambda x: x.shape, load_run(name)[0]) == jax.tree.map(
        lambda x: x.shape, params
    )
