"""`tokenize`: its summary and messages, and how it stops and resumes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rwkv_jax import __main__ as program
from rwkv_jax.data.binidx import open_binidx
from rwkv_jax.data.tokenizers import ByteTokenizer

ROOT = Path(program.__file__).parents[1]


def test_command(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("word " * 60_000)
    arguments = ["tokenize", f"{tmp_path}/a.txt", "-o", f"{tmp_path}/out", "--tokenizer", "bytes"]
    assert program.main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for row in (
        "documents *│ 1 ",
        "text *│ 0.30 MB",
        "tokens *│ 300,001",
        "bytes a token *│ 1.000",
    ):
        assert re.search(row, out)
    assert "data.exit_tokens = 300001\n" in out and "context 512: magic prime 569\n" in out
    assert "context 8192" not in out  # too few for it
    assert ByteTokenizer().decode_bytes(open_binidx(tmp_path / "out").tokens) == b"word " * 60_000
    assert program.main(arguments) == 2
    assert "out.bin: already exists" in capsys.readouterr().err
    assert program.main(["tokenize", f"{tmp_path}/no", "-o", f"{tmp_path}/b"]) == 2
    assert f"SOURCE = {tmp_path}/no: no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        program.main([*arguments, "--workers", "0"])
    assert "0: not a whole number of at least 1" in capsys.readouterr().err


def left(path: Path) -> set[str]:
    """The files beside OUT, by their endings."""
    return {x.name.removeprefix(path.name) for x in path.parent.glob(f"{path.name}*")}


SMALL_UNITS = """
import sys
from rwkv_jax import __main__
from rwkv_jax.data import tokenize
tokenize.UNIT = 1 << 20
sys.exit(__main__.main(sys.argv[1:]))
"""


def test_ctrl_c_stops_and_the_same_command_resumes(tmp_path):
    """Sent as by a terminal, to the command and its workers."""
    path = tmp_path / "a.jsonl"
    line = json.dumps({"text": "Words of many kinds, and numbers like 12345. " * 200}) + "\n"
    path.write_text(line * ((10 << 20) // len(line)))
    command = [sys.executable, "-c", SMALL_UNITS, "tokenize", str(path), "-o", f"{tmp_path}/out"]
    command += ["--workers", "1"]
    started = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 100
    while not (tmp_path / "out.parts" / "00000.json").exists():
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(started.pid, signal.SIGINT)
    _, err = started.communicate(timeout=60)
    assert started.returncode == 130, err
    stopped = r"\nstopped with \d of 10 parts done; run the same command again to resume\n"
    assert re.fullmatch(stopped, err)
    assert left(tmp_path / "out") == {".parts"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and re.search(r"\d of 10 parts are done", done.stderr)
    assert left(tmp_path / "out") == {".bin", ".idx", ".json"}
