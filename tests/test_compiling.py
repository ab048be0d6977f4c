"""Where the suite's compiled programs are kept between runs."""

import os

import compiling
import pytest


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_kept_by_flags_and_versions(home, monkeypatch):
    kept = compiling._lasting_folder()
    assert kept and kept.is_dir() and kept.parent == home / "rwkv_jax" / "tests"
    assert compiling._lasting_folder() == kept
    monkeypatch.setenv("XLA_FLAGS", "--xla_other=1")
    assert compiling._lasting_folder() != kept


def test_not_kept_where_the_cache_cannot_be_written(home):
    home.write_text("")
    assert compiling._lasting_folder() is None


def test_not_kept_on_a_full_disk(home, monkeypatch):
    monkeypatch.setattr(compiling, "ROOM", 1 << 62)
    assert compiling._lasting_folder() is None


def test_not_kept_without_a_home(home, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(compiling.Path, "home", _no_home)
    assert compiling._lasting_folder() is None


def _no_home():
    raise RuntimeError("Could not determine home directory.")


def test_what_was_used_longest_ago_goes_first(tmp_path):
    for age, name in enumerate(["new", "middle", "old"]):
        path = tmp_path / name / "program-cache"
        path.parent.mkdir()
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e9 - age))
    compiling.trim(tmp_path, 250)
    assert {path.parent.name for path in tmp_path.rglob("*-cache")} == {"new", "middle"}
    compiling.trim(tmp_path, 0)
    assert not [*tmp_path.rglob("*-cache")]
