"""`sample`: output, stopping, error messages, and the dialogue about one text."""

import dataclasses
import functools
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from pseudo_terminal import Typist, on_a_terminal

from rwkv_jax import states
from rwkv_jax.checkpoint.store import Store
from rwkv_jax.checkpoint.weights import load_run, save
from rwkv_jax.cli import sample, terminal
from rwkv_jax.config import Config
from rwkv_jax.data.conversations import FLOWER
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.models import init_state
from rwkv_jax.sampling import Generator, Sampling, Session, TextChunk, generate_with
from rwkv_jax.sampling.decode import decoding_layout
from rwkv_jax.sampling.prompts import between
from rwkv_jax.toml import to_toml
from rwkv_jax.training.state import TrainState, to_trees
from tests.sampling.conftest import config, weights

ROOT = Path(__file__).parents[2]
FLAGS = ["--tokens", "20", "--seed", "3"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of train.py."""
    folder, cfg, tokenizer = tmp_path_factory.mktemp("run"), config("7"), ByteTokenizer()
    (folder / "config.toml").write_text(to_toml(Config(model=cfg)))
    tokenizer.save(folder / "tokenizer")
    store = Store(folder / "checkpoints", keep=1)
    state = TrainState(jnp.zeros((), jnp.int32), weights("7"), {"m": jnp.zeros(1)})
    meta = {"model": dataclasses.asdict(cfg), "tokenizer": tokenizer.identity()}
    store.save(1, to_trees(state), meta)
    store.close()
    return folder


def sample_py(*arguments):
    return sample.main([str(argument) for argument in arguments], "python sample.py")


@functools.cache
def generator():
    return Generator(weights("7"), config("7"), ByteTokenizer())


def written(prompt, seed):
    """The text that the command should write."""
    chunks = generate_with(generator(), [prompt], max_tokens=20, seed=seed)
    return "".join(chunk.text for chunk in chunks)


BEGINNING = "(loading .*\n)?(compiling\n)?"
"""What comes on stderr before the text, or before an error."""


def test_one_prompt(run, capsys):
    assert sample_py(run, "def", *FLAGS) == 0
    out, err = capsys.readouterr()
    assert out == f"def{written('def', 3)}\n"
    assert re.fullmatch(f"{BEGINNING}\\[20 tokens, [\\d.]+ tokens/s, seed 3\\]\n", err)


def test_several_prompts_and_a_file(run, capsys, tmp_path):
    text = "é\n"  # as it is read: without the mark and the carriage return
    (tmp_path / "prompt").write_bytes(b"\xef\xbb\xbf\xc3\xa9\r\n")
    (tmp_path / "other").write_text("def")
    files = ["--prompt-file", tmp_path / "prompt", "--prompt-file", tmp_path / "other"]
    assert sample_py(run, "a", *FLAGS, "", *files) == 0
    blocks = [
        f"==> 1/4 <==\na{written('a', 3)}\n",
        f"==> 2/4 <==\n{written('', 4)}\n",
        f"==> 3/4 <==\n{text}{written(text, 5)}\n",
        f"==> 4/4 <==\ndef{written('def', 6)}\n",
    ]
    assert capsys.readouterr().out == "\n".join(blocks)


def test_no_prompt_no_echo_and_a_random_seed(run, capsys):
    assert sample_py(run, "--tokens", "20") == 0
    out, err = capsys.readouterr()
    seed = int(re.search(r"seed (\d+)", err)[1])
    assert out == written("", seed) + "\n"
    assert sample_py(run, "def", "--no-echo", *FLAGS) == 0
    assert capsys.readouterr().out == written("def", 3) + "\n"


def test_stop(run, capsys):
    free = written("def", 3)
    assert sample_py(run, "def", *FLAGS, "--stop", "never", "--stop", free[7:9]) == 0
    assert capsys.readouterr().out == f"def{free[: free.index(free[7:9])]}\n"


def test_escapes_mean_what_people_mean(run, capsys):
    """In PROMPT, with a remark, and in --stop."""
    assert sample_py(run, r"a\nb", *FLAGS) == 0
    out, err = capsys.readouterr()
    assert out == f"a\nb{written('a' + chr(10) + 'b', 3)}\n" and r"[\n, \t and" in err
    assert sample_py(run, r"a\nb", "--no-escape", *FLAGS) == 0
    out, err = capsys.readouterr()
    assert out == rf"a\nb{written(r'a' + chr(92) + 'nb', 3)}" + "\n" and "in PROMPT" not in err
    free = written("def", 3)
    stop = free[4].encode("unicode_escape").decode()
    for flags in (["--stop", r"\n"], ["--stop", r"x\t\\"], ["--stop", stop]):
        assert sample_py(run, "def", *FLAGS, *flags) == 0
    assert capsys.readouterr().out.count("def") == 3


def test_prompts_of_token_ids(run, capsys):
    ids = ByteTokenizer().encode("def")
    assert sample_py(run, "--prompt-ids", "101, 102 103", *FLAGS) == 0
    assert capsys.readouterr().out == f"def{written('def', 3)}\n" and ids == [101, 102, 103]
    for wrong, message in (("a", "give ids"), ("257", "has the ids 0 to 256"), ("-1", "give ids")):
        assert sample_py(run, f"--prompt-ids={wrong}", *FLAGS) == 2
        assert message in capsys.readouterr().err


def test_a_text_between_two_is_written(run, capsys, tmp_path):
    (tmp_path / "after").write_bytes(b"\xef\xbb\xbf)\r\n")
    prompt = between(ByteTokenizer(), "def(", ")\n")
    chunks = generate_with(generator(), [prompt], max_tokens=20, seed=3, stop=[FLOWER])
    middle = "".join(chunk.text for chunk in chunks)
    for flags in (["--suffix", r")\n"], ["--suffix-file", tmp_path / "after"]):
        assert sample_py(run, "def(", *flags, *FLAGS) == 0
        assert capsys.readouterr().out == f"def({middle})\n\n"
    named = tmp_path / "RWKV-x070-World-0.1B"  # which has not learned it
    named.symlink_to(run)
    for model, remark in (run, ""), (named, "this model is World 0.1B, by its name, and only G1"):
        assert sample_py(model, "def(", "--suffix", r")\n", "--no-echo", *FLAGS) == 0
        out, err = capsys.readouterr()
        assert out == middle + "\n"
        assert remark in err and (remark or "--suffix" not in err)


def test_the_rate_is_of_what_followed_the_first_call():
    """Chunks of one call come together; a chunk of no tokens may come any time later."""
    meter = terminal.Meter()
    calls = [(0, 1, 5.0), (1, 1, 5.0), (0, 4, 7.0), (1, 4, 7.0), (0, 4, 8.0), (0, 0, 99.0)]
    chunks = (TextChunk(index, "", tokens, drawn=drawn) for index, tokens, drawn in calls)
    meter.play(chunks, lambda chunk: None)
    assert meter.summary() == "14 tokens, 4.0 tokens/s"
    meter = terminal.Meter()
    meter.play([TextChunk(i, "", 1, drawn=1.0) for i in range(3)], lambda chunk: None)
    assert meter.summary() == "3 tokens"


def test_logprobs_in_a_file(run, capsys, tmp_path):
    path = tmp_path / "p.jsonl"
    assert sample_py(run, "def", "x", *FLAGS, "--logprobs", path, "--top-logprobs", "2") == 0
    assert f"def{written('def', 3)}\n" in capsys.readouterr().out
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert {line["prompt"] for line in lines} == {0, 1}
    ids = [line["token"] for line in lines if not line["prompt"]]
    assert ByteTokenizer().decode_bytes(ids).decode(errors="replace").startswith(written("def", 3))
    for line in lines:
        assert list(line) == ["prompt", "token", "text", "logprob", "top"] and line["logprob"] < 0
        assert len(line["top"]) == 2 and line["top"][0][2] >= max(
            line["logprob"], line["top"][1][2]
        )


def test_presets_and_single_settings(run, capsys):
    assert sample_py(run, "def", "--preset", "tool", *FLAGS) == 0
    sampling = Sampling(0.0, presence_penalty=0.0, frequency_penalty=0.0)
    chunks = generate_with(generator(), ["def"], max_tokens=20, seed=3, sampling=sampling)
    greedy = f"def{''.join(chunk.text for chunk in chunks)}\n"
    assert capsys.readouterr().out == greedy
    assert sample_py(run, "def", "--min-p", "1", "--presence", "0", "--frequency", "0", *FLAGS) == 0
    assert capsys.readouterr().out == greedy  # only the likeliest is left


@pytest.mark.slow
def test_the_compute_type(run, capsys):
    params = decoding_layout(weights("7"), config("7"), "bfloat16")
    made = Generator(params, config("7"), ByteTokenizer())
    chunks = generate_with(made, ["def"], max_tokens=20, seed=3)
    assert sample_py(run, "def", "--dtype", "bfloat16", *FLAGS) == 0
    assert capsys.readouterr().out == f"def{''.join(chunk.text for chunk in chunks)}\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["RUN", "--min-p", "2"], "min_p 2.0: between 0 and 1"),
        (["RUN", "--preset", "x"], "preset x: one of text, chat, think, answer, tool"),
        (["RUN", "--suffix", "x", "-i"], "--interactive and --suffix: leave one out"),
        (["RUN", "--suffix", "x", "--suffix-file", "TMP/latin"], "give one of them"),
        (["RUN", "--suffix", "x", "--prompt-ids", "1"], "--prompt-ids and --suffix"),
        (["RUN", "--prompt-file", "-", "--suffix-file", "-"], "stdin can be read once"),
        (["RUN", "--prompt-file", "-", "--prompt-file", "-"], "stdin can be read once"),
        (["RUN", "--suffix-file", "TMP/none"], "--suffix-file .*none: No such file"),
        (["RUN", "--top-logprobs", "2"], "--top-logprobs belongs to --logprobs"),
        (["RUN", "--logprobs", "TMP/no/x"], "--logprobs .*no/x: cannot be a file"),
        (["none", "--logprobs", "/proc/x"], "/proc/x: .*; name another file for --logprobs"),
        (["RUN", "--logprobs", "TMP/x", "--top-logprobs", "999"], "logprobs 999: between 0 and"),
        (["RUN", "--logprobs", "TMP/x", "-i"], "--logprobs: not with --interactive"),
        (["RUN", "--seed", "4294967296"], "seed 4294967296: between"),
        (["RUN", "--stop", ""], "--stop is empty"),
        (["RUN", "--top-p", "1.5"], "top_p 1.5: between 0 and 1"),
        (["RUN", "--temperature", "-1"], "temperature -1.0: 0"),
        (["RUN", "--top-k", "-1"], "top_k -1: 0"),
        (["RUN", "--decay", "2"], "decay 2.0: between"),
        (["RUN", "--presence", "nan"], "presence_penalty nan: a finite number"),
        (["RUN", "--tokens", "-1"], "tokens -1: 0 or more"),
        (["RUN", "--seed", "-1"], "seed -1: between"),
        (["RUN", "--seed", "x"], "argument --seed: invalid int value: 'x'; see --help"),
        (["RUN", "--no-such"], "unrecognized arguments: --no-such; see --help"),
        ([], "the following arguments are required: MODEL; see --help"),
        (["RUN", "a", "b", "-i"], "--interactive is for one text: give one prompt, not 2"),
        (["RUN", "-i", "--prompt-file", "-"], "--interactive reads what you type"),
        (["RUN", "--prompt-file", "TMP/none"], "--prompt-file .*none: No such file"),
        (["RUN", "--prompt-file", "TMP/latin"], "--prompt-file .*latin: byte 2 is not UTF-8"),
        (["TMP/none"], "none: cannot be read .No such file or directory.; name"),
        (["TMP"], "neither a run nor a folder with weights"),
        (["TMP/fresh"], "has no checkpoint yet"),
        (["TMP/latin"], "latin: is neither a .pth nor a .safetensors file"),
        (["RUN", "--state", "TMP/none.pth"], "none.pth: cannot be read"),
        # These are found out before the model is loaded.
        (["TMP/none", "--state", "TMP/none.pth"], "none.pth: cannot be read"),
        (["TMP/none", "--state", "TMP"], "is a folder; name a file"),
        (["TMP/none", "--state", "~nobody-has-this-name/x"], "/x: cannot be read"),
        (["TMP/huge", "--state", "TMP/fresh/s.safetensors"], "state of version 6, but the"),
        (["TMP/none", "--chat", "--seed", "-1"], "seed -1: between"),
        (["TMP/none", "--chat", "--tokens", "-1"], "tokens -1: 0 or more"),
        (["TMP/none", "--chat", "--think", "hard"], "think hard: one of off"),
        (["TMP/none", "--chat", "--top-p", "2"], "top_p 2.0: between"),
        (["TMP/none", "--chat", "--save-state", "TMP/s.bin"], "must end in .safetensors"),
        (["RUN", "--state", "TMP/latin"], "latin: is neither a .pth nor"),
        (["RUN", "a", "b", "--save-state", "TMP/s"], "--save-state is for one text: give one"),
        (
            ["RUN", "--tokenizer", "world"],
            r"--tokenizer world has 65,536 tokens, but the model has \d+ embeddings",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, arguments, message, tmp_path, capsys):
    (tmp_path / "latin").write_bytes("caé".encode("latin-1"))
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "config.toml").write_text((run / "config.toml").read_text())
    ByteTokenizer().save(tmp_path / "fresh" / "tokenizer")
    (tmp_path / "huge").symlink_to(tmp_path / "fresh")  # it has no checkpoint that could be read
    states.save(tmp_path / "fresh" / "s.safetensors", init_state(config("6"), 1))
    filled = [a.replace("TMP", str(tmp_path)).replace("RUN", str(run)) for a in arguments]
    try:
        code = sample_py(*filled)
    except SystemExit as leave:  # argparse
        code = leave.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert re.fullmatch(f"{BEGINNING}sample.py: .*{message}.*\n", err)


def test_help_imports_no_jax():
    code = "import sys\nfrom rwkv_jax.cli import sample\n"
    code += "try: sample.main(['--help'], 'python sample.py')\n"
    code += "except SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'jax' not in sys.modules"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "--interactive" in done.stdout and "python sample.py runs/demo" in done.stdout


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weight_files_write_what_the_run_writes(run, tmp_path, capsys, suffix):
    """Version and all sizes come from the file alone."""
    params, cfg, _ = load_run(run)
    save(tmp_path / f"m{suffix}", params, cfg)
    assert sample_py(tmp_path / f"m{suffix}", "def", "--tokenizer", "bytes", *FLAGS) == 0
    assert capsys.readouterr().out == "def" + written("def", 3) + "\n"


def test_a_state_is_saved_and_resumed(run, tmp_path, capsys):
    """Greedily, a text in two halves equals the text in one; and any prompt may follow."""
    kept, greedy = tmp_path / "kept.safetensors", ["--temperature", "0", "--frequency", "0"]
    greedy += ["--presence", "0", "--no-echo"]
    assert sample_py(run, "def", "--tokens", "30", *greedy) == 0
    whole = capsys.readouterr().out
    assert sample_py(run, "def", "--tokens", "12", *greedy, "--save-state", kept) == 0
    half = capsys.readouterr()
    assert f"[state saved in {kept}]" in half.err
    before = kept.read_bytes()
    assert sample_py(run, "--state", kept, "--tokens", "18", *greedy) == 0
    assert half.out.rstrip("\n") + capsys.readouterr().out == whole
    assert sample_py(run, "x", "--state", kept, "--tokens", "5", *greedy) == 0
    assert sample_py(run, "x", "y", "--state", kept, "--tokens", "5", *greedy) == 0
    texts = capsys.readouterr().out
    assert texts.count("==>") == 2 and kept.read_bytes() == before


def test_a_state_of_other_weights_is_said_to_be(run, tmp_path, capsys, monkeypatch):
    """Once each: in a text, in a chat after one, and in a conversation."""
    cfg, text, talk = config("7"), tmp_path / "text.safetensors", tmp_path / "talk.safetensors"
    chat = ["--chat", "--template", "g1", "--tokens", "2"]
    assert sample_py(run, "x", "--tokens", "2", "--save-state", text) == 0
    Typist(monkeypatch, "one")
    assert sample_py(run, *chat, "--save-state", talk) == 0
    assert "other weights" not in capsys.readouterr().err
    for path in (text, talk):
        saved = states.load(path, cfg)
        assert saved.weights == generator().weights
        other = {"logits": saved.logits, "notes": saved.notes, "weights": "0" * 16}
        states.save(path, saved.state, **other)
    assert sample_py(run, "x", "--state", text, "--tokens", "2") == 0
    Typist(monkeypatch)
    assert sample_py(run, *chat, "--state", text) == 0
    assert sample_py(run, "--chat", "--state", talk) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "other weights" in line]
    assert [line.split(": ")[1] for line in lines] == [f"{text}", f"{text}", f"{talk}"]
    assert all("0" * 16 in line and generator().weights in line for line in lines)


def test_a_state_of_another_tokenizer_or_without_logits(run, tmp_path, capsys):
    _, cfg, tokenizer = load_run(run)
    path = tmp_path / "s.safetensors"
    states.save(path, init_state(cfg, 1), notes={"tokenizer": "bpe 12"})
    assert sample_py(run, "x", "--state", path) == 2
    assert "written with the tokenizer bpe 12, but this is bytes" in capsys.readouterr().err
    states.save(path, init_state(cfg, 1), notes={"tokenizer": tokenizer.identity()})
    for flags in ([], ["-i"]):
        code = sample_py(run, "--state", path, *flags, *FLAGS)
        assert flags or code == 2
    assert "has no logits of the next token: give a prompt" in capsys.readouterr().err
    assert sample_py(run, "x", "--state", path, *FLAGS) == 0
    states.save(path, init_state(cfg, 2))
    assert sample_py(run, "x", "--state", path) == 2
    assert "2 rows" in capsys.readouterr().err


def test_a_chat_is_saved_and_resumed(run, tmp_path, capsys, monkeypatch):
    """Two sessions joined by a file equal one."""
    flags = ["--chat", "--template", "g1", "--tokens", "9", "--seed", "5", "--temperature", "0.8"]
    Typist(monkeypatch, "one", "two")
    assert sample_py(run, *flags) == 0
    whole = capsys.readouterr().out
    kept = tmp_path / "talk.safetensors"
    Typist(monkeypatch, "one")
    assert sample_py(run, *flags, "--save-state", kept) == 0
    first = capsys.readouterr().out
    Typist(monkeypatch, "two")
    assert sample_py(run, "--chat", "--state", kept) == 0
    assert first + capsys.readouterr().out == whole
    assert states.load(kept, config("7")).notes.keys() == {"tokenizer", "transcript", "chat"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chat", "hello"], "--chat takes its text from the terminal"),
        (["--chat", "--stop", "x"], "--chat takes its text from the terminal"),
        (["--system", "x"], "are options of a chat: add --chat"),
        (["--chat", "--template", "llama"], "--template llama: one of g1, world, raven"),
        (["--chat", "--think", "hard"], "think hard: one of off, fast, on"),
        (["--chat", "--top-p", "2"], "top_p 2.0: between 0 and 1"),
        (["--chat", "--save-state", "x.pth"], "the name of a state file must end in"),
    ],
)
def test_bad_input_of_a_chat(run, arguments, message, capsys):
    assert sample_py(run, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err
    assert len(re.sub(f"^{BEGINNING}", "", err).splitlines()) == 1


def test_a_closed_pipe_is_no_error(run):
    command = [sys.executable, "sample.py", run, "def", "--tokens", "100000"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.read(40)
        process.stdout.close()
        assert re.fullmatch(BEGINNING, process.stderr.read().decode())
    assert process.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a Linux device")
def test_output_without_room_is_one_line(run, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert sample_py(run, "def", *FLAGS) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("sample.py: the output: No space left on device; ")


def test_texts_in_order(capsys):
    """The first text as it comes, the others in their turn."""
    shown = []

    def chunks():
        for chunk in [
            TextChunk(1, "b1 ", 1),
            TextChunk(0, "a1 ", 1),
            TextChunk(1, "b2", 1, "stop"),
            TextChunk(0, "a2", 1, "length"),
            TextChunk(2, "c1 ", 1),
            TextChunk(2, "c2", 1, "end"),
        ]:
            yield chunk
            shown.append(capsys.readouterr().out)

    terminal.print_texts(chunks(), ["A ", "B ", "C "])
    assert shown == [
        "==> 1/3 <==\nA ",
        "a1 ",
        "",
        "a2\n\n==> 2/3 <==\nB b1 b2\n\n==> 3/3 <==\nC ",
        "c1 ",
        "c2\n",
    ]


@pytest.fixture(scope="module")
def printable():
    class Printable(ByteTokenizer):
        def decode_bytes(self, ids):
            return bytes(33 + i % 90 for i in map(int, ids) if i != self.eod)

    return Generator(weights("7"), config("7"), Printable())


def talk(generator, tokens=8):
    return terminal.TextDialogue(Session(generator, 3), Sampling(), tokens)


def expected(generator, *turns, seed=3, sampling=None):
    """The output of a session that reads each text and then writes that many tokens."""
    session, out = Session(generator, seed), ""
    for fed, tokens in turns:
        session.feed(fed)
        chunks = session.stream(max_tokens=tokens, sampling=sampling)
        out += "".join(chunk.text for chunk in chunks) + "\n"
    return out


def test_dialogue_continues_one_text(printable, monkeypatch, capsys):
    Typist(monkeypatch, "one\\", "two", KeyboardInterrupt, "", ":set tokens 5", "three", ":q", "x")
    talk(printable).run()
    out, err = capsys.readouterr()
    assert out == expected(printable, ("one\ntwo", 8), ("", 8), ("three", 5))
    assert err.count("[8 tokens") == 2 and err.count("[5 tokens") == 1


def test_ctrl_c_is_never_lost(printable, monkeypatch, capsys):
    """It is raised after the next chunk, even if it arrives where Python drops exceptions: in a
    finaliser, as JAX's callbacks run."""

    class Finalised:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    decode = Generator.decode

    def finalising(*arguments):
        Finalised()
        return decode(*arguments)

    # The suite may run in the background, where shells have SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    Typist(monkeypatch, "one", ":q")
    with monkeypatch.context() as patched:
        patched.setattr(Generator, "decode", finalising)
        talk(printable, 1000).run()
        out, err = capsys.readouterr()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(KeyboardInterrupt):
            terminal.print_texts(generate_with(printable, ["one"], max_tokens=1000), ["one"])
    signal.signal(signal.SIGINT, before)
    stopped = re.search(r"\[([12]) tokens?, stopped\]", err)  # one chunk
    assert stopped and out == expected(printable, ("one", int(stopped[1])))


@pytest.mark.parametrize("arrives", ["as itself", "wrapped"])
def test_ctrl_c_inside_jax_stops_the_text_and_not_the_dialogue(
    printable, monkeypatch, capsys, arrives
):
    """An interrupt that hits JAX's comparison of two cache keys comes out as a ValueError."""
    decode, calls = Generator.decode, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) > 1:
            return decode(*arguments)
        if arrives == "wrapped":
            raise ValueError(
                "Cache keys should be comparable. Traceback ...\nKeyboardInterrupt: \n"
            )
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "decode", interrupted)
    Typist(monkeypatch, "one", "two", ":q")
    talk(printable).run()
    out, err = capsys.readouterr()
    assert "[0 tokens, stopped]" in err and "[8 tokens" in err
    assert out == "\n" + expected(printable, ("one", 0), ("two", 8)).lstrip("\n")


def test_other_errors_are_raised(printable, monkeypatch):
    def broken(*_):
        raise ValueError("a defect")

    monkeypatch.setattr(Generator, "decode", broken)
    Typist(monkeypatch, "one")
    with pytest.raises(ValueError, match="a defect"):
        talk(printable).run()


def test_commands_with_a_slash(printable, monkeypatch, capsys):
    """Other lines with a slash are text, such as code."""
    Typist(monkeypatch, "/set tokens 5", "// code", "/foo", "/usr/bin", "/help", "/exit", "x")
    talk(printable).run()
    out, err = capsys.readouterr()
    assert out == expected(printable, ("// code", 5), ("/foo", 5), ("/usr/bin", 5))
    assert terminal.HELP in err


def test_dialogue_opening_and_end_of_input(printable, monkeypatch, capsys):
    Typist(monkeypatch, "last\\")
    talk(printable).run("def")
    assert capsys.readouterr().out == expected(printable, ("def", 8), ("last", 8))


def test_dialogue_commands(printable, monkeypatch, capsys):
    Typist(monkeypatch, ":seed 9", "a", ":reset", ":set temperature 0", "a", ":set", ":help")
    talk(printable).run()
    out, err = capsys.readouterr()
    greedy = Sampling(temperature=0.0)
    assert out == expected(printable, ("a", 8), seed=9) + expected(
        printable, ("a", 8), sampling=greedy
    )
    assert "[temperature 0.0, top_p 0.85, top_k 0," in err and "tokens 8]" in err
    assert terminal.HELP in err


@pytest.mark.parametrize(
    "line, message",
    [
        (":no such", "no such command"),
        (":seed x", "x: must be an integer"),
        (":seed -1", "seed -1: between"),
        (":set top_p 2", "top_p 2.0: between"),
        (":set top_k 1.5", "1.5: must be an integer"),
        (":set tokens -1", "tokens -1: 0 or more"),
        (":set colour 1", "colour: no such setting; one of temperature,"),
    ],
)
def test_the_dialogue_continues_after_a_mistake(printable, monkeypatch, capsys, line, message):
    Typist(monkeypatch, line, "a")
    talk(printable).run()
    out, err = capsys.readouterr()
    assert message in err
    assert out == expected(printable, ("a", 8))


DIALOGUES = """
from rwkv_jax import malloc
malloc.set_up()
import sys
from rwkv_jax.cli import sample
for flags in (["--interactive", "--tokens", "1000000"], ["--chat", "--tokens", "1000000"]):
    assert sample.main([sys.argv[1], *flags, "--seed", "3"], "python sample.py") == 0
"""


def test_dialogues_on_a_terminal(run):
    """Typed at a pseudo-terminal, as `sample.py` does it: prompts, text and a reply that Ctrl-C
    stops, another reply, a dimmed thought, and Ctrl-D."""
    with on_a_terminal("-c", DIALOGUES, run) as screen:
        screen.until(r"> $")
        screen.type(b"def\n")
        screen.until(r"def\r\n.{200}")
        screen.type(b"\x03")
        screen.until(r"\[\d+ tokens.*, stopped\]\r\n> $")
        screen.type(b":set tokens 3\n\n")
        screen.until(r"\[3 tokens.*\]\r\n> $")
        screen.type(b"\x04")
        screen.until(r"User: $")
        screen.type(b"hello\n")
        screen.until(r"hello\r\nAssistant: .{200}")
        screen.type(b"\x03")
        screen.until(r"\[\d+ tokens.*, stopped\]\r\nUser: $")
        screen.type(b":set tokens 3\n:retry\n")
        screen.until(r"User: :retry\r\nAssistant: .*\r\n\[3 tokens.*, cut off\]\r\nUser: $")
        screen.type(b":think fast\n:retry\n")
        screen.until(r"Assistant: \x1b\[2m</think.*\x1b\[22m\r\n.*\[3 tokens.*\]\r\nUser: $")
        screen.type(b"\x04")
        assert screen.exit_code() == 0
