"""What `sample` says before its text begins."""

import io
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from rwkv_jax.checkpoint import keymaps, weights
from rwkv_jax.checkpoint.files import Deferred
from rwkv_jax.cli import sample, status
from rwkv_jax.cli.status import Status
from rwkv_jax.config import ModelConfig

ROOT = Path(__file__).parents[2]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_a_line_for_what_begins_and_every_few_seconds(capsys, monkeypatch):
    line = Status()
    line.show("loading model.pth")
    line.reading(64, 1000)
    monkeypatch.setattr(status, "EVERY", 0.0)
    line.reading(640, 1000)
    line.reading(1000, 1000)
    line.clear()
    assert capsys.readouterr().err == "loading model.pth\nread 640 of 1,000 tokens (64%)\n"


def test_a_terminal_has_one_line_which_goes(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "20")
    line = Status()
    line.show("loading a-model-of-a-long-name.pth")
    assert sys.stderr.getvalue() == "\r\x1b[Kloading a-model-of-"
    line.reading(64, 1000)
    line.reading(1000, 1000)
    assert sys.stderr.getvalue().endswith("\r\x1b[Kread 64 of 1,000 to\r\x1b[K")
    line.clear()  # nothing is left to erase
    assert sys.stderr.getvalue().count("\x1b[K") == 3


def test_the_first_item_is_made_while_the_line_is_shown(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    shown = []

    def items():
        for i in range(3):
            shown.append(sys.stderr.getvalue())
            yield i

    found = Status().until_first(items())
    assert shown == ["\r\x1b[Kcompiling"]
    assert sys.stderr.getvalue() == "\r\x1b[Kcompiling\r\x1b[K"
    assert list(found) == [0, 1, 2]
    assert list(Status().until_first(iter(()))) == []


def test_the_first_line_is_about_the_model(capsys):
    assert sample.main(["nowhere.pth", "a prompt"]) == 2
    assert capsys.readouterr().err.startswith("loading nowhere.pth\n")


@pytest.mark.parametrize(
    "after", [0.1, *(pytest.param(x, marks=pytest.mark.slow) for x in np.arange(0.02, 2, 0.06))]
)
def test_ctrl_c_while_a_command_starts(after):
    """Whatever is imported then: no traceback, once there is a line of ours that runs."""
    command = [sys.executable, "-X", "importtime", "-m", "rwkv_jax", "eval", "nowhere.pth"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "rwkv_jax.malloc" in line:
            break
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode in (130, 2) and "Traceback" not in err, err


def noise(shape):
    def make():
        bits = np.random.default_rng(0).integers(0, 2**14, size=shape, dtype=np.uint16)
        return bits.view(ml_dtypes.bfloat16)

    return Deferred(shape, ml_dtypes.bfloat16, make)


@pytest.mark.slow
def test_ctrl_c_in_a_long_read(tmp_path):
    """At a real size: the threads of a small model are never caught at work."""
    cfg = ModelConfig(version="7", layers=12, width=768, vocab_size=65536)
    model, text = tmp_path / "model.pth", tmp_path / "long.txt"
    weights.write(model, {name: noise(x) for name, x in keymaps.expected(cfg).items()})
    text.write_text("The cat sat on the mat. " * 17000)
    command = [sys.executable, "sample.py", str(model), "--prompt-file", str(text)]
    for _ in range(3):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for line in process.stderr:
            if line.startswith("read "):
                break
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[1]
        assert process.returncode == 130, rest
        assert "Traceback" not in rest
