"""Where compiled programs are cached; in a process of its own, as JAX reads the setting once."""

import subprocess
import sys
from pathlib import Path

import pytest

ASK = """
import os, sys
from pathlib import Path
from rwkv_jax.compiled import keep_compiled_programs
import jax
for cache in sys.argv[1:]:
    keep_compiled_programs(Path(cache))
    print(jax.config.jax_compilation_cache_dir or "")
"""


def test_below_the_cache_if_it_can_be_written(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    (tmp_path / "file").write_text("")
    assert ask(tmp_path / "file", tmp_path) == ["", f"{tmp_path}/compiled"]
    assert (tmp_path / "compiled").exists()


@pytest.mark.parametrize("said", ["", "/elsewhere"])
def test_where_jax_is_told_to(tmp_path, monkeypatch, said):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", said)
    assert ask(tmp_path) == [said]
    assert not (tmp_path / "compiled").exists()


def ask(*caches: Path) -> list[str]:
    """Where a process keeps programs after it has been given each cache, one after the other."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, *caches], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()
