"""`train.py`: its help, messages, exit codes, and how it stops."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from training.processes import LIMITED, start, wait_for
from training.runs import ALIKE, config, settings

from rwkv_jax.cli.train import main
from rwkv_jax.data.prepare import prepare
from rwkv_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]


def test_help_is_instant_and_shows_the_uses():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "train.py", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "data.source=~/notes" in done.stdout
    assert "import time:" in done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"argparse", "shutil"} <= imported
    assert not {"jax", "numpy"} & imported


@pytest.mark.parametrize(
    "extra, expected",
    [
        (["model.widht=3"], "model.widht is not a setting; did you mean width?"),
        (["train.context=100000"], "lower train.context or add text"),
        (["data.source=/nowhere"], "/nowhere"),
        (["model.vocab_size=100"], "model.vocab_size = 100: the tokenizer"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(extra, expected, tmp_path, capsys):
    assert main([os.devnull, *settings(tmp_path), *extra], "python train.py") == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("train.py: ")
    assert expected in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path):
    process = start(
        tmp_path, "train.steps=1000000", "train.log_every=1", "train.checkpoint_every=1000000"
    )
    log = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text(), process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command resumes from there" in err
    assert len(err.strip().splitlines()) == 1
    step = int(err.split("step ")[1].split(" ")[0].replace(",", ""))
    assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()


def test_a_disk_that_takes_no_checkpoint_is_one_line(tmp_path):
    """Files may not grow beyond 20 kB: the writes fail inside the library, as on a full disk."""
    prepare(config(tmp_path).data)
    done = subprocess.run(
        [sys.executable, *LIMITED, os.devnull, *settings(tmp_path, **ALIKE)],
        capture_output=True,
        text=True,
        # Programs are read from the cache, if they are there, and not written: that would fail.
        env={**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"},
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    folder = tmp_path / "run" / "checkpoints"
    assert line == (f"train.py: {folder}: File too large; choose another train.output")
    assert not [path.name for path in folder.iterdir() if path.name.isdigit()]


@pytest.mark.slow
def test_a_reader_that_leaves_does_not_end_the_run(tmp_path):
    process = start(tmp_path)
    assert process.stdout.readline()
    process.stdout.close()
    with process.stderr as stderr:
        message = stderr.read()
    assert process.wait(timeout=300) == 0, message
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["final"]
