"""Chat: what is shown where, the commands, and files (`test_sample` has a real terminal)."""

import io
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from pseudo_terminal import Typist

from rwkv_jax import states
from rwkv_jax.cli import chat as command
from rwkv_jax.config import Config
from rwkv_jax.data.conversations import TEMPLATES
from rwkv_jax.errors import UserError
from rwkv_jax.sampling import PRESETS, Prefix, Sampling
from rwkv_jax.toml import to_toml
from tests.sampling.conftest import config, weights
from tests.sampling.test_chat import Pieces, Scripted, random_talk, said, telling


@pytest.fixture(scope="module")
def scripted():
    return Scripted(weights("7"), config("7"), Pieces())


@pytest.fixture
def talk(scripted, monkeypatch, capsys):
    """Types lines to a model that gives these replies; returns what stdout and stderr show."""

    def talking(lines, replies=(), settings=None, **given):
        Typist(monkeypatch, *lines)
        settings = {"seed": 0} if settings is None else settings
        command.chat(telling(scripted, *replies), settings=settings, **given)
        return capsys.readouterr()

    return talking


def transcript(path, generator):
    return states.load(path, generator.cfg).notes["transcript"]


def test_replies_go_to_stdout_and_the_rest_to_stderr(talk):
    replies = [" Hi.\n\nYou?\n\nUser: x", " Good.\0", " And so on"]
    out, err = talk(
        ["hello", "", "fine\\", "really", "go on"], replies, {"seed": 0, "max_tokens": 30}
    )
    assert out == "Hi.\n\nYou?\nGood.\nAnd so onxxxxxxxxxxxxxxxxxxxx\n"
    assert re.fullmatch(
        r"\[Type :help.*\]\n\[15 tokens.*\]\n\[7 tokens.*, end of document\]\n"
        r"\[30 tokens.*, cut off\]\n\n",
        err,
    )


def test_thoughts_never_go_to_stdout(talk):
    replies = [">\nWell, \n\nso</think>\nYes.\0", ">Hm</think>No.\0", ">Hm"]
    lines = ["a", ":thoughts hide", "b", ":set tokens 3", "c"]
    out, err = talk(lines, replies, {"seed": 0, "think": "a bit"})
    assert out == "Yes.\nNo.\n\n"
    assert re.search(r"\]\nWell, \n\nso\n\[\d+ tokens", err)
    assert re.search(r"\]\n\[thinking\]\n\[\d+ tokens.*\]\n\[thinking\]\n\[3 tokens", err)


def test_any_bytes_from_a_pipe(scripted, tmp_path, monkeypatch, capsys):
    """One turn per line; invalid UTF-8 is read as U+FFFD."""
    path = tmp_path / "it.safetensors"
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfcaf\xe9\n\nlast"), "utf-8")
    )
    command.chat(telling(scripted, " One\0", " Two\0"), settings={"seed": 0}, save=path)
    out, err = capsys.readouterr()
    assert out == "One\nTwo\n"
    assert err.count("[what is not UTF-8 in this line is read as \ufffd") == 1
    assert transcript(path, scripted) == (
        "User: caf\ufffd\n\nAssistant: One\n\nUser: last\n\nAssistant: Two\n\n"
    )


def test_commands(talk, scripted, tmp_path):
    """Each does what its line in the help says, and reports it."""
    out, err = talk(
        [
            *(":system Be  kind.", ":think a lot", "a", ":retry", "b", ":undo", ":seed 4"),
            *(":think", ":retry", ":set", f":save {tmp_path / 'it'}", ":reset", "c"),
            *(f":load {tmp_path / 'it'}", ":think off", ":seed 6", "d"),
            *(":system", ":help", ":quit", "never"),
        ],
        [">A</think>one\0", ">B</think>two\0", ">\0", "", ">C</think>four\0", ">D\0", "six\0"],
        save=tmp_path / "end.safetensors",
    )
    assert out == "one\ntwo\n\nfour\n\nsix\n"
    notes = [line for line in err.splitlines() if not re.match(r"\[\d+ token|.*Type :help", line)]
    assert notes[:2] == ["[a new conversation, with a system prompt]", "[think a lot]"]
    assert "[1 exchange so far]" in notes and "[think a lot]" in notes
    assert any(n.startswith("[temperature 1.0,") and n.endswith(" seed 5]") for n in notes)
    assert command.HELP in err
    assert notes[-1].endswith("end.safetensors is not written]")
    asked = "System: Be  kind.\n\nUser: a (think a lot)\n\nAssistant: <think>C</think>four\n\n"
    assert transcript(tmp_path / "it.safetensors", scripted) == asked


def test_commands_with_a_slash(talk):
    """Each command's, and the names that other programs have; an unknown one is one line, a path is
    a message."""
    lines = ["/help", "/think on", "/thoughts hide", "/THINK off", "/set", "/?", "hi", "/regen"]
    lines += ["/undo", "/foo bar", "/usr/bin fails", " /help", "/clear", "/bye", "never"]
    out, err = talk(lines, [" One\0", " Two\0", " Three\0", " Four\0"])
    assert out == "One\nTwo\nThree\nFour\n" and err.count(command.HELP) == 2
    assert "[think on]" in err and "[think off]" in err and "[a new conversation]" in err
    assert "[/foo bar: no such command; :help lists them, and a space before it makes it" in err


def test_presets(talk):
    """By the template and the way to think, unless the sampling was changed."""
    flower = TEMPLATES["flower"]
    lines = [":set", ":think on", ":set", ":set top_k 5", ":think off", ":set", ":preset tool"]
    _, err = talk([*lines, ":preset no", ":load"], template=flower, settings={"seed": 0})
    assert "[Type :help for the commands. Template flower, sampling answer.]" in err
    shown = [line for line in err.splitlines() if line.startswith("[temperature")]
    assert [line.split(", presence")[0] for line in shown] == [
        "[temperature 1.0, top_p 0.28, top_k 32",
        "[temperature 0.96, top_p 0.76, top_k 32",
        "[temperature 0.96, top_p 0.76, top_k 5",
        "[temperature 0.0, top_p 0.85, top_k 0",
    ]
    assert "[think on, sampling as in the preset think]" in err and "[think off]" in err
    assert "[preset no: one of text, chat, think, answer, tool]" in err
    settings = {"think": "on", "seed": 0, "flags": {"top_k": 9}}
    _, err = talk([":set"], template=flower, settings=settings, why="as asked")
    assert "Template flower (as asked), sampling custom.]" in err
    assert "[temperature 0.96, top_p 0.76, top_k 9," in err


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"data": {"train_on": "answers", "template": "flower"}}, "flower"),
        ({"data": {"field": "messages", "template": "world"}}, "world"),
        ({"data": {"field": "question,answer", "template": "raven"}}, "raven"),
        ({"train": {"init": "rwkv7-g1h-0.1b-20260710-ctx10240.pth"}}, "flower"),
        (
            {
                "train": {"init": "rwkv7-g1h-0.1b-20260710-ctx10240.pth"},
                "data": {"mixture": {"a": 1.0, "b": 1.0}, "template": "world"},
            },
            "world",
        ),
        ({}, "g1"),
    ],
)
def test_the_template_that_a_run_was_trained_with(tmp_path, settings, name):
    tables = {key: type(getattr(Config(), key))(**value) for key, value in settings.items()}
    (tmp_path / "config.toml").write_text(to_toml(Config(**tables)))
    found, why = command.likely_template(tmp_path, config("7"), Pieces())
    assert found == name and why


def test_the_template_that_a_name_says(tmp_path):
    for name, template in (
        ("rwkv7-g1h-0.1b-20260710-ctx10240.pth", "flower"),
        ("RWKV-x070-World-0.1B-v2.8-20241210-ctx4096.pth", "world"),
        ("mine.pth", "g1"),
    ):
        assert command.likely_template(tmp_path / name, config("7"), Pieces())[0] == template
    assert command.likely_template(tmp_path / "mine.pth", config("4"), Pieces())[0] == "world"


def test_the_defaults_are_the_official_ones(talk):
    _, err = talk([":set"], settings={"seed": 7})
    assert "[temperature 1.0, top_p 0.3, top_k 0, presence 0.5, frequency 0.5, decay 0.996," in err
    assert "tokens 2000, think off, seed 7]" in err
    seeds = {re.search(r"seed (\d+)", talk([":set"], settings={}).err)[1] for _ in range(3)}
    assert len(seeds) == 3


@pytest.mark.parametrize(
    "line, message",
    [
        (":nothing", ":nothing: no such command; :help lists them, and a space"),
        (":think hard", "think hard: one of off, fast, on"),
        (":seed x", "x: must be an integer"),
        (":seed -1", "seed -1: between"),
        (":set top_p 2", "top_p 2.0: between"),
        (":set top_p", "no such command"),
        (":undo", "no exchange to go back to"),
        (":retry", "no exchange to go back to"),
        (":save TMP/it.safetensors", "nothing was said yet"),
        (":save TMP/no/it.safetensors", "there is no folder"),
        (":load TMP/no.safetensors", "no.safetensors"),
        (":save", "no such command"),
        (":thoughts maybe", "no such command"),
    ],
)
def test_the_dialogue_continues_after_a_mistake(talk, tmp_path, line, message):
    out, err = talk([line.replace("TMP", str(tmp_path)), " :-) ", ":-)"], [" a\0", " b\0"])
    mistake = err.splitlines()[1]
    assert message in mistake and mistake.startswith("[") and mistake.endswith("]")
    assert out == "a\nb\n"


def test_ctrl_c_stops_the_reply_and_not_the_dialogue(talk, scripted, monkeypatch, tmp_path):
    """It is held back until the next chunk: the conversation has all that was shown."""
    decode, shown = Scripted.decode, []

    def interrupting(self, decoding, *rest):
        if decoding.drawn[0] > 3 and not shown:
            shown.append(True)
            raise ValueError("a library's own error: KeyboardInterrupt")
        return decode(self, decoding, *rest)

    monkeypatch.setattr(Scripted, "decode", interrupting)
    out, err = talk(["a", "b"], [" One two three", " Yes\0"], save=tmp_path / "x.safetensors")
    first, second = out.splitlines()
    assert re.search(r"\[\d+ tokens.*, stopped\]", err)
    assert first and "One two three".startswith(first) and second == "Yes"
    assert transcript(tmp_path / "x.safetensors", scripted) == (
        f"User: a\n\nAssistant: {first}\n\nUser: b\n\nAssistant: Yes\n\n"
    )


def test_saved_and_loaded(scripted, tmp_path):
    """Bit-exactly, with half characters and settings."""
    talk = random_talk(telling(scripted, *"......", [196, 196, 1]), system="Be kind.", think="on")
    talk.configure(seed=6)
    said(talk.say("a\u00e9"))
    command.save(tmp_path / "it.safetensors", talk)
    loaded = command.load(tmp_path / "it.safetensors", scripted)
    assert loaded.notes() == talk.notes()
    for one, other in ((loaded.logits, talk.logits), (loaded.state, talk.state)):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_resumed(talk, scripted, tmp_path):
    """Settings that are not given are those of the file."""
    path = tmp_path / "it.safetensors"
    given = {"seed": 1, "think": "on", "max_tokens": 5, "sampling": Sampling(top_k=9)}
    talk(["a"], ["", ">A</think>"], given, system="Be kind.", save=path)
    out, err = talk([":set", "b"], ["", "", ">B</think>"], {}, resume=path, save=path)
    assert out == "\n" and "top_k 9," in err and "tokens 5, think on, seed 2]" in err
    assert transcript(path, scripted) == (
        "System: Be kind.\n\nUser: a\n\nAssistant: <think>A</t\n</think>\n\n"
        "User: b\n\nAssistant: <think>B</t\n</think>\n\n"
    )
    given = {"seed": 7, "think": "off", "max_tokens": 6, "sampling": PRESETS["chat"]}
    # As a script may say each time.
    same = {"template": TEMPLATES["g1"], "system": " Be kind. "}
    err = talk([":set"], settings=given, resume=path, **same).err
    assert "top_k 0," in err and "tokens 6, think off, seed 7]" in err
    for other in {"template": TEMPLATES["world"]}, {"system": ""}:
        with pytest.raises(
            UserError, match=r"it\.safetensors has the template g1 and the system prompt 'Be k"
        ):
            talk(["a"], ["\0"], resume=path, **other)


def test_from_a_prefix_also_after_reset_and_load(talk, scripted, tmp_path):
    prefix = Prefix(scripted.prefill([[5, 6]], [0]).state, scripted.cfg)
    path = tmp_path / "it.safetensors"
    talk(["a"], ["\0"], prefix=prefix, save=path)
    saved = states.load(path, scripted.cfg)
    turn = scripted.tokenizer.encode("User: a\n\nAssistant:\n\n")
    read = scripted.prefill([[5, 6, *turn]], [0])
    np.testing.assert_allclose(saved.logits, read.logits, atol=1e-5)
    talk([":reset", f":load {path}", ":reset", "a"], ["", "\0"], prefix=prefix, save=path)
    np.testing.assert_allclose(states.load(path, scripted.cfg).logits, saved.logits, atol=1e-6)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"save": Path("it")}, "it: the name of a state file must end in"),
        ({"save": Path("no/it.safetensors")}, "there is no folder no"),
        ({"settings": {"seed": -1}}, "seed -1"),
        ({"settings": {"max_tokens": -1}}, "tokens -1"),
        ({"settings": {"think": "hard"}}, "think hard"),
        ({"settings": {"think": "on"}, "template": TEMPLATES["world"]}, "think on"),
        ({"resume": Path("none.safetensors")}, "none.safetensors"),
    ],
)
def test_bad_input_is_refused_before_anything_is_read(talk, given, message):
    with pytest.raises(UserError, match=message):
        talk(["a"], ["\0"], **given)


def test_a_file_without_a_conversation(scripted, tmp_path):
    talk = random_talk(telling(scripted, *"......"))
    said(talk.say("a"))
    path = tmp_path / "state.safetensors"
    states.save(path, talk.state, notes={"tokenizer": "bytes"})
    with pytest.raises(UserError, match=f"^{path}: the file of this state has no conversation"):
        command.load(path, scripted)
