"""Whole runs: resumed exactly, stopped by signals and kills, refused where they do not belong."""

import json
import os
import re
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from official_weights import checkpoint
from rich.console import Console
from training.processes import start, wait_for
from training.runs import ALIKE, config, copy, settings, train_step

from rwkv_jax.checkpoint import weights
from rwkv_jax.checkpoint.keymaps import from_official
from rwkv_jax.checkpoint.weights import load_run
from rwkv_jax.data.loader import Loader
from rwkv_jax.errors import UserError
from rwkv_jax.sampling import TextChunk
from rwkv_jax.toml import load_stated
from rwkv_jax.training import loop, report, setup
from rwkv_jax.training.hosts import Interrupted
from rwkv_jax.training.loop import NonFiniteError, train
from rwkv_jax.training.metrics import read_metrics
from rwkv_jax.training.report import Report

TIMES = ("seconds", "tokens_per_s", "steps", "data", "saving", "evaluating")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A corpus and a finished run of it, to read only; what it printed, and its times."""
    folder, spent = tmp_path_factory.mktemp("finished"), []
    summary = Report.summary

    def noted(report):
        spent.append(dict(report.timer.total))
        return summary(report)

    with pytest.MonkeyPatch.context() as patch, (folder / "stdout").open("w") as file:
        patch.setattr(Report, "summary", noted)
        patch.setattr(loop, "make_train_step", train_step)
        given = config(folder, **ALIKE, **{"train.keep": 2})
        assert train(given, console=Console(file=file, width=100)) == folder / "run"
    return folder, (folder / "stdout").read_text(), spent[0]


@pytest.fixture
def one_program(monkeypatch):
    """Runs with the same step share its program, and draw no curves."""
    monkeypatch.setattr(loop, "make_train_step", train_step)
    monkeypatch.setattr(Report, "curve", lambda _: None)


@pytest.fixture
def console(tmp_path):
    with (tmp_path / "stdout").open("w") as file:
        yield Console(file=file, width=100)


def metrics(folder):
    """What is in metrics.jsonl, without what a clock decides."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{key: line[key] for key in line if key not in TIMES} for line in lines]


def interrupt_at(monkeypatch, step, kind=signal.SIGINT):
    """Sends this process a signal when the batch of a step is read."""
    original = Loader.read

    def read(self, wanted, *rows):
        if wanted == step:
            os.kill(os.getpid(), kind)
        return original(self, wanted, *rows)

    monkeypatch.setattr(Loader, "read", read)


@pytest.mark.parametrize("version", [pytest.param("4", marks=pytest.mark.slow), "7"])
def test_resumed_run_is_the_run_that_never_stopped(
    version, tmp_path, console, monkeypatch, one_program
):
    parts = ALIKE | {"model.version": version}
    handler = signal.getsignal(signal.SIGINT)
    whole = config(tmp_path, **parts, **{"train.output": tmp_path / "whole"})
    expected = metrics(train(whole, console=console))
    cut = config(tmp_path, **parts)
    # Between log lines and before an evaluation; then right at a checkpoint.
    for step, kind in ((4, signal.SIGINT), (10, signal.SIGTERM)):
        with monkeypatch.context() as patch:
            interrupt_at(patch, step, kind)
            with pytest.raises(Interrupted, match=r"Stopped after step \d+ of 12, saved in"):
                train(cut, console=console)
    folder = train(cut, console=console)
    assert metrics(folder) == expected
    assert [line["step"] for line in expected if "loss" in line] == [3, 6, 9, 12]
    assert [line["step"] for line in expected if "heldout_bpb" in line] == [6, 12]
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.slow
def test_an_evaluation_that_a_stop_came_before_is_made_up_for(tmp_path, console, monkeypatch):
    often = {"train.eval_every": 1, "train.eval_tokens": 50, "train.steps": 8}
    whole = config(tmp_path, **often, **{"train.output": tmp_path / "whole"})
    expected = metrics(train(whole, console=console))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(Interrupted):
            train(config(tmp_path, **often), console=console)
    assert metrics(train(config(tmp_path, **often), console=console)) == expected


@pytest.mark.slow
def test_a_finished_run_is_evaluated_again_and_may_be_made_longer(tmp_path, console):
    first = metrics(train(config(tmp_path), console=console))
    assert metrics(train(config(tmp_path), console=console)) == first
    longer = config(tmp_path, **{"train.steps": 15, "train.log_every": 5, "sample.tokens": 4})
    lines = metrics(train(longer, console=console))
    assert [line["step"] for line in lines if "loss" in line] == [3, 6, 9, 12, 15]
    assert [line["step"] for line in lines if "final" in line] == [15]
    shorter = config(tmp_path, **{"train.steps": 5})
    with pytest.raises(UserError, match=r"train.steps = 5: .* is at step 15 already"):
        train(shorter, console=console)


def test_ctrl_c_in_the_sample_waits_for_a_chunk(finished, tmp_path, monkeypatch, console):
    """JAX may crash where an interrupt reaches it."""
    copy(finished[0], tmp_path)

    def generate(*_, **__):
        signal.raise_signal(signal.SIGINT)
        yield TextChunk(0, "a chunk", 1)
        raise AssertionError("not interrupted")

    monkeypatch.setattr(report.sampling, "generate", generate)
    # The suite may run in the background, where shells have SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(Interrupted, match="Stopped after the last step, which is saved"):
            train(
                config(tmp_path, **ALIKE, **{"train.keep": 2, "sample.tokens": 9}), console=console
            )
    finally:
        signal.signal(signal.SIGINT, before)
    assert b"a chunk" in (tmp_path / "stdout").read_bytes()


def test_final_table_curve_and_checkpoints(finished):
    folder, printed, spent = finished[0] / "run", *finished[1:]
    final = metrics(folder)[-1]
    assert f"{final['heldout_bpb']:.3f}" in printed
    for name, value in final["compressors"].items():
        assert name in printed
        assert f"{value:.3f}" in printed
    assert "step 12/12  loss" in printed
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["10", "12"]
    assert not list(folder.glob("*.partial"))
    # Learning shows: the corpus is the same five lines again and again.
    losses = [line["loss"] for line in metrics(folder) if "loss" in line]
    assert losses[-1] < losses[0]
    # The summary is of all that was done, the last evaluation too.
    assert spent.keys() == {"tokens", "steps", "data", "saving", "evaluating"}


def test_divergence_names_the_step_the_gradient_and_the_last_good_checkpoint(
    tmp_path, console, monkeypatch
):
    def given(*_, **__):
        raise NotImplementedError

    def poisoned(cfg, minimised):
        assert minimised is given  # by the caller of `train`; the program is the other tests'
        step = train_step(cfg)

        def poisoned_step(state, batch):
            if int(state.step) == 7:
                emb = state.params.emb.at[:].set(jnp.nan)
                state = state.replace(params=state.params.replace(emb=emb))
            return step(state, batch)

        return poisoned_step

    monkeypatch.setattr(loop, "make_train_step", poisoned)
    monkeypatch.setattr(Report, "curve", lambda _: None)
    with pytest.raises(NonFiniteError) as caught:
        train(config(tmp_path, **ALIKE), console=console, objective=given)
    message = str(caught.value)
    assert message.startswith("step 8: the loss is nan; the gradient is not finite in emb")
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoints' / '5'}" in message
    assert "\n" not in message
    assert max(line["step"] for line in metrics(tmp_path / "run")) <= 7


def test_refuses_a_folder_that_is_not_this_runs(finished, tmp_path, console):
    copy(finished[0], tmp_path)
    folder = tmp_path / "run"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"holds another run \(optimizer.beta2 is 0.99 there, 0.9"):
        train(config(tmp_path, **ALIKE, **{"optimizer.beta2": 0.9}), console=console)
    other = settings(tmp_path)[2].removeprefix("data.source=") + "/more.py"
    Path(other).write_text("x = 1\n" * 50)
    with pytest.raises(UserError, match=r"was trained on other text than data\.source"):
        train(config(tmp_path, **ALIKE, **{"data.tokenizer": "bytes"}), console=console)
    document = Path(other).with_name("7.py")
    Path(other).unlink()
    same = config(tmp_path, **ALIKE)  # which writes the corpus
    document.write_text(document.read_text().replace("a", "b", 1))  # of the same size
    with pytest.raises(UserError, match=r"was trained on other text than data\.source"):
        train(same, console=console)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"not empty and not a run \(thesis.tex\)"):
        train(config(tmp_path, **{"train.output": stranger}), console=console)
    assert [path.name for path in stranger.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("text", ["[tool]\nx = 1\n", "[model]\nwidth = 128\n"])
def test_a_config_alone_is_not_a_run_to_give_up(tmp_path, console, text):
    (tmp_path / "run").mkdir()
    mine = tmp_path / "run" / "config.toml"
    mine.write_text(text)
    with pytest.raises(UserError):
        train(config(tmp_path), console=console)
    assert mine.read_text() == text


@pytest.mark.slow
def test_a_run_that_never_came_to_a_checkpoint_gives_up_its_folder(tmp_path, console, monkeypatch):
    def too_large(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_train_step", too_large)
        with pytest.raises(UserError, match=r"^not enough memory \(.* 9 bytes.*lower train\.batch"):
            train(config(tmp_path, **{"model.width": 128}), console=console)
    assert "width = 128" in (tmp_path / "run" / "config.toml").read_text()
    train(config(tmp_path, **{"train.steps": 2}), console=console)
    assert "width = 64" in (tmp_path / "run" / "config.toml").read_text()


@pytest.mark.slow
def test_kill_9_leaves_a_run_that_resumes_exactly(tmp_path):
    many = ("train.steps=150", "train.checkpoint_every=15", "train.eval_every=70")
    whole = start(tmp_path, *many, f"train.output={tmp_path / 'whole'}")
    out, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err
    assert "xz -9" in out
    folder, log = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    process = start(tmp_path, *many)
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 15, process)
    process.kill()  # wherever it is
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 45 <= max(line["step"] for line in read_metrics(log)) < 150
    with log.open("a") as file:
        file.write('{"step": 149, "lo')  # the half line of a kill while writing
    last = start(tmp_path, *many)
    out, err = last.communicate(timeout=300)
    assert last.returncode == 0, err
    assert "resuming from step" in out
    assert metrics(folder) == metrics(tmp_path / "whole")


def test_metrics_are_json_that_any_reader_takes(finished):
    folder = finished[0] / "run"

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    for line in (folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_stopped_while_starting_it_starts_again(tmp_path, console, monkeypatch, one_program):
    """Whatever kills the process before the first step leaves a folder that is a run."""

    class Killed(Exception):
        pass

    def kill(*_):
        raise Killed

    cfg = config(tmp_path, **ALIKE, **{"train.steps": 2})
    for module, moment in (
        (setup, "Store"),
        (setup, "init_train_state"),
        (report, "MetricsLog"),
        (loop, "make_train_step"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, moment, kill)
            with pytest.raises(Killed):
                train(cfg, console=console)
    folder = train(cfg, console=console)
    assert metrics(folder)[-1]["final"]


def test_a_home_is_a_home(tmp_path, console, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(loop, "make_train_step", train_step)
    short = {"train.output": "~/there", "train.steps": 1, "train.log_every": 1}
    folder = train(config(tmp_path, **ALIKE, **short), console=console)
    assert folder == tmp_path / "there"
    assert (folder / "loss.png").exists()


@pytest.mark.parametrize(
    "item", ["params", *(pytest.param(item, marks=pytest.mark.slow) for item in ("rest", "meta"))]
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(
    item, finished, tmp_path, one_program
):
    copy(finished[0], tmp_path)
    folder, ends = tmp_path / "run", ALIKE | {"train.keep": 2}
    with (tmp_path / "out").open("w") as out:
        console = Console(file=out, width=200)
        other = {"train.steps": 14, "train.output": tmp_path / "whole"}
        whole = train(config(tmp_path, **ends | other), console=console)
        newest = folder / "checkpoints" / "12"
        for path in (newest / item).rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        train(config(tmp_path, **ends, **{"train.steps": 14}), console=console)
    printed = (tmp_path / "out").read_text()
    assert "damaged or of another shape" in printed
    assert f"kept as {folder / 'checkpoints' / 'damaged-12'}; resuming from step 10" in printed
    assert (folder / "checkpoints" / "damaged-12").is_dir()
    kept = [[x for x in metrics(f) if "final" not in x] for f in (folder, whole)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("item", ["params", pytest.param("rest", marks=pytest.mark.slow)])
def test_a_flipped_bit_is_damage(item, finished, tmp_path, console, one_program):
    """In the parameters also for a model that is loaded."""
    copy(finished[0], tmp_path)
    folder = tmp_path / "run"
    newest = folder / "checkpoints" / "12"
    path = max((newest / item).rglob("*"), key=lambda x: x.stat().st_size if x.is_file() else 0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 2
    path.write_bytes(data)
    if item == "params":
        with pytest.raises(UserError, match=r"12: damaged .*; restore it .* the checkpoint before"):
            load_run(folder)
    train(config(tmp_path, **ALIKE, **{"train.keep": 2}), console=console)
    printed = (tmp_path / "stdout").read_text()
    assert "damaged-12" in printed and "resuming from step 10" in printed
    assert load_run(folder)


def test_a_checkpoint_of_before_checksums_is_read(finished, tmp_path, console, one_program):
    copy(finished[0], tmp_path)
    folder = tmp_path / "run"
    meta = folder / "checkpoints" / "12" / "meta" / "metadata"
    kept = json.loads(meta.read_text())
    assert len(kept["checksums"]["params"]) == len(jax.tree.leaves(load_run(folder)[0]))
    del kept["checksums"], kept["best"]
    meta.write_text(json.dumps(kept))
    options = ALIKE | {"train.keep": 2, "train.steps": 13}
    train(config(tmp_path, **options), console=console)
    shown = re.sub(r"[\s│]", "", (tmp_path / "stdout").read_text())
    assert "resumingfromstep12" in shown


def test_a_damaged_metrics_file_keeps_its_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": "x"}\n\xff\xfe\n[3]\n{"step": 2}\n{"ste')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


@pytest.mark.slow
def test_training_starts_from_given_weights(tmp_path, console):
    """The model is the file's, and stays so at a tiny learning rate; and a second start
    in the same folder resumes."""
    rng = np.random.default_rng(0)
    given = {
        name: x + 0.01 * rng.normal(size=x.shape).astype(np.float32)
        for name, x in checkpoint("6", layers=2, width=32, vocab=257, ranks=(4, 3)).items()
    }
    weights.write(tmp_path / "given.pth", given)
    options = {"train.init": tmp_path / "given.pth", "train.steps": 2, "optimizer.peak_lr": 1e-9}
    options |= {"optimizer.final_lr": 1e-9, "train.eval_every": 0}
    path = tmp_path / "given.toml"
    path.write_text('[model]\nversion = "6"\nlayers = 3\nhead_size = 32\n')  # sizes make way
    typed = [x for x in settings(tmp_path, **options) if not x.startswith("model.")]
    folder = train_py(path, typed, console)
    shown = re.sub(r"[\s│]", "", (tmp_path / "stdout").read_text())
    assert "given.pth,whichsetsversionandsizes" in shown
    params, cfg, _ = load_run(folder)
    assert (cfg.version, cfg.layers, cfg.width, cfg.rank_w) == ("6", 2, 32, 3)
    expected, _ = from_official(given)
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-7)
    assert train_py(path, [*typed, "train.steps=3"], console) == folder
    with pytest.raises(UserError, match=r"model.layers = 3 \(command line\), and .*run has 2; set"):
        train_py(path, [*typed, "model.layers=3"], console)
    # The run's own config states everything.
    assert train_py(folder / "config.toml", ["train.steps=4"], console) == folder


def train_py(path, overrides, console):
    """As the command does it."""
    cfg, stated = load_stated(path, overrides)
    return train(cfg, stated=stated, console=console)


def test_given_weights_that_do_not_belong_are_refused(tmp_path, console):
    """Before anything is compiled or written."""
    given = checkpoint("6", layers=2, width=32, vocab=257, ranks=(4, 3))
    weights.write(tmp_path / "given.pth", given)
    weights.write(tmp_path / "part.pth", {x: given[x] for x in list(given)[:-1]})
    start = {"train.init": tmp_path / "given.pth", "model.layers": 2, "model.width": 32}
    start |= {"model.head_size": 16, "model.version": 6}
    path = tmp_path / "seven.toml"
    path.write_text('[model]\nversion = "7"\n')
    for key, value, message in (
        (
            "model.version",
            "5.2",
            r'model.version = "5\.2" \(command line\), and .*given.pth has "6"',
        ),
        ("model.version", "7", "set model.version=6, or start from other weights"),
        ("model.version", None, r'"7" \(.*seven.toml\), and .*given.pth has "6"; add model.vers'),
        ("model.layers", 12, r"model.layers = 12 \(command line\), and .*given.pth has 2; set"),
        ("model.width", 64, "model.width = 64 .*, and .*given.pth has 32"),
        (
            "data.tokenizer",
            "world",
            r"data.tokenizer = world \(command line\) is world .*given.pth is bytes; leave",
        ),
        ("data.tokenizer", "bpe", "bpe: it would be a new one, whose ids mean nothing to .*leave"),
        ("train.init", tmp_path / "part.pth", r"part.pth: head\.weight is missing"),
        ("train.init", tmp_path / "none.pth", "none.pth: cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            overrides = settings(tmp_path, **start | {key: value})
            train_py(path, [x for x in overrides if not x.endswith("=None")], console)
        assert not (tmp_path / "run").exists()
