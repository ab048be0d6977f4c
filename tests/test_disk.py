"""Files are replaced as a whole or not at all, and what a disk refuses is one line."""

import errno
import os

import pytest

from rwkv_jax.disk import reading, replacing, replacing_all, write_text, writing
from rwkv_jax.errors import UserError


def test_a_file_is_replaced_when_it_is_complete(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"before")
    (tmp_path / "a.partial").write_bytes(b"left by a kill, and longer than what comes")
    with replacing(path) as file:
        file.write(b"after")
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"
    write_text(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_an_exception_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"after")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_of_several_files_the_last_one_counts(tmp_path, monkeypatch):
    """A kill between the renames leaves no last file."""
    data, index = tmp_path / "a.bin", tmp_path / "a.idx"
    for path in (data, index):
        path.write_bytes(b"before")
    renamed = []

    def killed(self, target):
        if renamed:
            raise KeyboardInterrupt
        renamed.append(os.rename(self, target))

    monkeypatch.setattr("pathlib.Path.replace", killed)
    with pytest.raises(KeyboardInterrupt), replacing_all(data, index) as files:
        for file in files:
            file.write(b"after")
    assert data.read_bytes() == b"after" and not index.exists()
    monkeypatch.undo()
    with replacing_all(data, index) as files:
        for file in files:
            file.write(b"later")
            file.seek(0)
            assert file.read() == b"later"
    assert data.read_bytes() == index.read_bytes() == b"later"


def test_two_writers_of_one_file_never_mix(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"before")
    with pytest.raises(OSError, match="another process"), replacing(path) as file:
        file.write(b"first")
        (tmp_path / "a.partial").unlink()
        (tmp_path / "a.partial").write_bytes(b"half of the sec")
    assert path.read_bytes() == b"before"


@pytest.mark.parametrize("name", ["folder", "pipe"])
def test_only_a_regular_file_is_replaced(tmp_path, name):
    path = tmp_path / name
    path.mkdir() if name == "folder" else os.mkfifo(path)
    with (
        pytest.raises(UserError, match=rf"{path}: not a regular file; name a file"),
        writing(path, "name a file"),
        replacing(path),
    ):
        pass
    assert list(tmp_path.iterdir()) == [path]


def test_refusals_name_the_file_the_reason_and_the_remedy(tmp_path):
    class Error(UserError):
        pass

    missing = tmp_path / "none" / "a"
    with pytest.raises(Error) as refused, writing("runs", "make it", error=Error):
        write_text(missing, "")
    assert str(refused.value) == f"{missing}: No such file or directory; make it"
    for number in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(UserError) as refused, writing("runs", "", full="free some space"):
            raise OSError(number, os.strerror(number))
        assert str(refused.value) == f"runs: {os.strerror(number)}; free some space"
    with pytest.raises(Error) as refused, reading("runs", "make it", Error):
        missing.read_bytes()
    reason = "cannot be read (No such file or directory)"
    assert str(refused.value) == f"{missing}: {reason}; make it"
    with pytest.raises(TimeoutError), writing("runs", ""):
        raise TimeoutError("concerns no file")
