"""What an installed package says of itself."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import rwkv_jax
from rwkv_jax import __main__ as program

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_version_is_stated_once(capsys):
    assert "version" in PROJECT["dynamic"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == rwkv_jax.__version__
    with pytest.raises(SystemExit) as leave:
        program.main(["--version"])
    assert leave.value.code == 0
    assert capsys.readouterr().out.startswith(f"rwkv_jax {rwkv_jax.__version__} (jax ")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/venv/bin/rwkv-jax", "rwkv-jax"),
        ("/venv/lib/rwkv_jax/__main__.py", "python -m rwkv_jax"),
    ],
)
def test_help_and_errors_name_the_program_as_it_was_called(path, name, monkeypatch, capsys):
    start = EntryPoint("rwkv-jax", PROJECT["scripts"]["rwkv-jax"], "console_scripts").load()
    monkeypatch.setattr(program.malloc, "set_up", lambda: None)
    for arguments, expected in [
        (["--help"], f"usage: {name} COMMAND"),
        (["inspect", "--help"], f"usage: {name} inspect MODEL"),
        (["inspect"], f"{name.removeprefix('python -m ')} inspect: "),
    ]:
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        with pytest.raises(SystemExit):
            start()
        assert "".join(capsys.readouterr()).startswith(expected)


def test_the_benchmarks_are_listed():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    modules = (ROOT / "benchmarks").glob("[!_]*.py")
    programs = {p.stem for p in modules if "def main(" in p.read_text(encoding="utf-8")}
    assert set(re.findall(r"^python -m benchmarks\.(\w+) +\S", done.stdout, re.M)) == programs
