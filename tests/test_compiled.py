"""Where compiled programs are kept, asked of a process of its own: it is set once and for all."""

import subprocess
import sys
from pathlib import Path

import pytest

ASK = """
import os, sys
from pathlib import Path
from rwkv_jax.compiled import keep_compiled_programs
keep_compiled_programs(Path(sys.argv[1]))
import jax
print(jax.config.jax_compilation_cache_dir or "")
"""


@pytest.mark.parametrize(
    ("said", "kept"), [(None, "{cache}/compiled"), ("", ""), ("/elsewhere", "/elsewhere")]
)
def test_below_the_cache_unless_jax_is_told(tmp_path, monkeypatch, said, kept):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    if said is not None:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", said)
    assert ask(tmp_path) == kept.format(cache=tmp_path)
    assert (tmp_path / "compiled").exists() == (said is None)


def test_nowhere_if_it_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    (tmp_path / "file").write_text("")
    assert ask(tmp_path / "file") == ""


def ask(cache: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", ASK, cache], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
