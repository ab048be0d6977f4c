"""Prompts of a command line: escapes, and files that are cut or have marks."""

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_jax.cli.prompts import read, typed, unescaped
from rwkv_jax.errors import UserError


@pytest.mark.parametrize(
    "written, meant",
    [
        (r"User: hi\n\nAssistant:", "User: hi\n\nAssistant:"),
        (r"\n\n", "\n\n"),
        (r"a\tb\r\n", "a\tb\r\n"),
        (r"a\\nb", r"a\nb"),
        ("print('\\n')\nx", "print('\\n')\nx"),  # code with line ends of its own
        (r"C:\dir \x41 \d \ ", r"C:\dir \x41 \d \ "),
        ("", ""),
    ],
)
def test_escapes(written, meant):
    assert unescaped(written) == meant
    assert typed(written, escape=True) == meant and typed(written, escape=False) == written


def test_bytes_that_are_no_text(tmp_path):
    assert typed("caf\udce9", escape=True) == "caf\ufffd"  # as the shell passes them


@given(
    text=st.text(
        st.characters(exclude_categories=("Cs",), exclude_characters="\r\ufeff"), max_size=4
    )
)
def test_files_cut_anywhere(tmp_path_factory, text):
    """Of a character that is cut, the rest is left out, with a remark."""
    path = tmp_path_factory.mktemp("cut") / "p"
    data = f"é{text}é".encode()
    for start in range(len(data) - 1):
        path.write_bytes(part := data[start:])
        assert_whole(path, part)
        path.write_bytes(part := data[: start + 2])
        assert_whole(path, part)


def assert_whole(path, part):
    whole = part.decode(errors="ignore")
    if whole.isascii() and whole.encode() != part:  # Latin-1, or cut: see below
        return
    found, remark = read("--prompt-file", str(path))
    assert found == whole
    assert ("is cut inside a character" in remark) == (whole.encode() != part)


@pytest.mark.parametrize(
    "data, text",
    [
        (b"\xef\xbb\xbfa\r\nb\r\n", "a\nb\n"),
        ("The cat 中".encode()[:-1], "The cat "),
        ("😀 cat".encode()[1:], " cat"),
        (b"a\rb", "a\rb"),
    ],
)
def test_marks_line_ends_and_cuts(tmp_path, data, text):
    (tmp_path / "p").write_bytes(data)
    assert read("--prompt-file", str(tmp_path / "p"))[0] == text


@pytest.mark.parametrize("data", [b"caf\xe9", b"\xe9t\xe9", b"a\xffb", b"\xff\xfea\0", b"\x80"])
def test_other_encodings_are_refused(tmp_path, monkeypatch, data):
    (tmp_path / "p").write_bytes(data)
    place = next(i for i, byte in enumerate(data) if byte > 127)
    with pytest.raises(UserError, match=f"--prompt-file .*p: byte {place} is not UTF-8; convert"):
        read("--prompt-file", str(tmp_path / "p"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    with pytest.raises(UserError, match=f"--prompt-file -: byte {place} is not UTF-8"):
        read("--prompt-file", "-")
