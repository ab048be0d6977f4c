"""Runs that start from a model: its tokenizer, branches, freezing, best checkpoints, early ends."""

import json
import math
import re

import jax
import numpy as np
import pytest
from rich.console import Console
from training.runs import config, copy, settings

from rwkv_jax.checkpoint.weights import load, load_run
from rwkv_jax.data.tokenizers import open_tokenizer
from rwkv_jax.errors import UserError
from rwkv_jax.evaluation import bits
from rwkv_jax.toml import load_stated
from rwkv_jax.training import loop
from rwkv_jax.training.loop import train
from rwkv_jax.training.metrics import read_metrics
from rwkv_jax.training.report import Report


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(Report, "curve", lambda _: None)


@pytest.fixture
def console(tmp_path):
    with (tmp_path / "stdout").open("w") as file:
        yield Console(file=file, width=200)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of its own BPE, with checkpoints 5, 10 and 12."""
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch, (folder / "stdout").open("w") as file:
        patch.setattr(Report, "curve", lambda _: None)
        options = {"data.tokenizer": "bpe", "data.bpe_vocab_size": 600, "train.keep": 9}
        train(config(folder, **options), console=Console(file=file))
    return folder


def typed(folder, console, *extra, without=(), **options):
    """As the command does it."""
    overrides = [x for x in settings(folder, **options) if x.split("=")[0] not in without]
    path = folder / "a.toml"
    path.write_text('[data]\ntokenizer = "bpe"\n')  # as configs/demo.toml has it
    cfg, stated = load_stated(path, [*overrides, *extra])
    return train(cfg, stated=stated, console=console)


SIZES = ("model.layers", "model.width", "data.tokenizer")


def test_the_tokenizer_is_the_model_s(base, tmp_path, console):
    """Of any checkpoint, whatever a config says; and a second start resumes without the model."""
    copy(base, tmp_path / "old")
    init = tmp_path / "old" / "run" / "checkpoints" / "5"
    options = {"train.init": init, "train.steps": 2, "optimizer.warmup_steps": 0}
    options |= {"optimizer.peak_lr": 1e-9, "optimizer.final_lr": 1e-9}
    folder = typed(tmp_path, console, without=SIZES, **options)
    params, cfg, tokenizer = load_run(folder)
    before, _, own = load_run(init)
    assert tokenizer.identity().split()[-1] == own.identity().split()[-1]
    assert cfg.vocab_size == own.vocab_size < 600  # there is not enough text for 600
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(before), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)
    shown = (tmp_path / "stdout").read_text()
    assert re.search(r"step 0  held-out bits per byte", shown)  # before the first step
    (tmp_path / "old").rename(tmp_path / "gone")
    options["train.steps"] = 3
    assert typed(tmp_path, console, without=SIZES, **options) == folder
    with pytest.raises(UserError, match=r"data.tokenizer = bytes \(command line\) is bytes, and"):
        typed(tmp_path, console, "data.tokenizer=bytes", without=SIZES, **options)


def test_a_branch_keeps_parameters_and_moments(base, tmp_path, console, monkeypatch):
    """The step after a checkpoint, taken by a branch with the rate that the run had."""
    copy(base, tmp_path)
    (tmp_path / "stdout").touch()
    init, kept = tmp_path / "run" / "checkpoints" / "5", {}
    original = loop.make_train_step

    def noted(cfg, objective):
        step = original(cfg, objective)

        def wrapped(state, batch):
            kept.setdefault(cfg.train.output, jax.tree.map(np.asarray, state.opt_state))
            return step(state, batch)

        return wrapped

    monkeypatch.setattr(loop, "make_train_step", noted)
    options = {"train.init": init, "train.steps": 1}
    for name, moments in ("with", "true"), ("without", "false"):
        options |= {"train.output": tmp_path / name, "train.init_moments": moments}
        typed(tmp_path, console, without=SIZES, **options)
    chain, fresh = (kept[str(tmp_path / name)] for name in ("with", "without"))
    adam, rate = chain[1], chain[4]
    assert adam.count == 5 and rate.count == 0 and fresh[1].count == 0
    assert np.abs(adam.mu.emb).max() > 0 and np.abs(fresh[1].mu.emb).max() == 0
    options |= {"train.output": tmp_path / "lion", "train.init_moments": "true"}
    with pytest.raises(UserError, match=r"of another optimizer .*optimizer.name = adamw, train"):
        typed(tmp_path, console, "optimizer.name=lion", without=SIZES, **options)
    options |= {"train.init": tmp_path / "x.pth", "train.output": tmp_path / "pth"}
    from rwkv_jax.checkpoint.weights import save

    save(tmp_path / "x.pth", *load(init))
    with pytest.raises(UserError, match=r"it would be a new one, .* name the one"):
        typed(tmp_path, console, without=SIZES, **options)
    tokenizer = str(tmp_path / "run" / "tokenizer")
    with pytest.raises(UserError, match=r"x.pth: has no optimizer's moments"):
        typed(tmp_path, console, f"data.tokenizer={tokenizer}", without=SIZES, **options)


def test_missing_checkpoints_are_named(base):
    path = base / "run" / "checkpoints" / "7"
    with pytest.raises(UserError, match=r"7: no such checkpoint; the run has \[5, 10, 12\]"):
        load(path)
    newest, named = load(base / "run")[0], load(base / "run" / "checkpoints" / "12")[0]
    assert all(map(np.array_equal, jax.tree.leaves(newest), jax.tree.leaves(named)))
    assert not np.array_equal(load(base / "run" / "checkpoints" / "5")[0].emb, newest.emb)
    assert open_tokenizer(str(base / "run" / "tokenizer")).vocab_size == newest.emb.shape[0]


@pytest.mark.parametrize("epochs, steps", [(1, 226), (0.25, 57), (1e-9, 1)])
def test_epochs_are_a_length(tmp_path, monkeypatch, epochs, steps):
    from rwkv_jax.data.sources import open_data
    from rwkv_jax.training.setup import chosen_length, resolve

    cfg = config(tmp_path, **{"train.epochs": epochs})
    data = open_data(cfg.data, progress=False)
    resolved, loader = resolve(cfg, data)
    assert resolved.train.steps == max(1, round(epochs * loader.epoch[0] / 2))
    assert resolved.train.steps == steps
    stated = {"train.steps": "command line", "train.epochs": "a.toml"}
    assert chosen_length(cfg, stated).train.epochs == 0
    assert chosen_length(cfg, {"train.steps": "a.toml"}).train.epochs == epochs
    stated["train.epochs"] = "command line"
    with pytest.raises(UserError, match=r"train\.steps and train\.epochs are both"):
        chosen_length(cfg, stated)


def scripted(values):
    """Evaluations that give these bits per byte, one after the other."""
    left = iter(values)
    return lambda *_, **__: bits.Evaluation(next(left) * math.log(2), 1, 1)


def test_the_best_checkpoint_is_kept_and_a_run_ends_early(tmp_path, console, monkeypatch):
    values = [3.0, 2.0, 2.5, 2.4, 2.3, 9.0]
    monkeypatch.setattr(bits, "evaluate", scripted(values))
    options = {"train.eval_every": 2, "train.checkpoint_every": 50, "train.keep": 1}
    options |= {"train.keep_best": "true", "train.patience": 3, "train.steps": 40}
    folder = train(config(tmp_path, **options), console=console)
    shown = (tmp_path / "stdout").read_text()
    assert "no evaluation was better than that of step 4 in the last 3: the run ends" in shown
    assert f"the best evaluation is that of step 4, kept as {folder / 'checkpoints' / '4'}" in shown
    left = sorted(int(x.name) for x in (folder / "checkpoints").iterdir() if x.name.isdigit())
    assert left == [4, 10]
    # The same command evaluates once more and ends; more patience resumes, and counts on.
    monkeypatch.setattr(bits, "evaluate", scripted([9.0]))
    train(config(tmp_path, **options), console=console)
    assert "raise it to resume" in (tmp_path / "stdout").read_text()
    monkeypatch.setattr(bits, "evaluate", scripted([2.2, 1.0, 1.5, 9.0]))
    options |= {"train.patience": 4, "train.steps": 14}
    train(config(tmp_path, **options), console=console)
    lines = [x for x in read_metrics(folder / "metrics.jsonl") if "heldout_bpb" in x]
    assert [(x["step"], round(x["heldout_bpb"], 3)) for x in lines if "final" not in x] == [
        (2, 3.0),
        (4, 2.0),
        (6, 2.5),
        (8, 2.4),
        (10, 2.3),
        (12, 2.2),
    ]


def test_best_and_patience_need_held_out_text(tmp_path, console):
    for name, value in ("train.keep_best", "true"), ("train.patience", 2):
        with pytest.raises(UserError, match="compare evaluations on held-out text, and there is"):
            train(config(tmp_path, **{"data.heldout": 0, name: value}), console=console)


def test_other_sets_are_measured_too(tmp_path, console):
    (tmp_path / "wiki.json").write_text(json.dumps([{"text": "some text " * 20}] * 3))
    choices = [{"prompt": "a", "choices": ["b", "c"], "answer": 0}] * 4
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(x) + "\n" for x in choices))
    (tmp_path / "l.jsonl").write_text('{"text": "one two"}\n')
    sets = {"eval.texts": f'{{wiki = "{tmp_path}/wiki.json"}}'}
    sets |= {"eval.choices": f'{{q = "{tmp_path}/q.jsonl"}}'}
    sets |= {"eval.lambada": f'{{l = "{tmp_path}/l.jsonl"}}'}
    folder = train(config(tmp_path, **sets, **{"train.steps": 6}), console=console)
    (line,) = (x for x in read_metrics(folder / "metrics.jsonl") if "final" in x)
    from rwkv_jax.evaluation.text import encode, measure

    params, cfg, tokenizer = load_run(folder)
    text = encode("x", ["some text " * 20] * 3, tokenizer, 300)
    due = measure(params, text, bits.Settings(cfg, 2, 32))
    assert line["eval_wiki_bpb"] == pytest.approx(due.bits_per_byte, rel=1e-4)
    assert line["eval_q_accuracy"] in (0.0, 1.0) and line["eval_l_accuracy"] in (0.0, 1.0)
    assert re.search(r"wiki \d\.\d{3}, q \d+\.0% right, l ", (tmp_path / "stdout").read_text())
    with pytest.raises(UserError, match=r"none\.jsonl"):
        train(config(tmp_path, **{"eval.choices": '{q = "none.jsonl"}'}), console=console)


def test_a_longer_schedule_says_what_rate_becomes_what(tmp_path, console):
    options = {"train.steps": 6, "optimizer.warmup_steps": 2}
    train(config(tmp_path, **options), console=console)
    before = (tmp_path / "stdout").read_text()
    assert "│ schedule" not in before
    train(config(tmp_path, **options | {"train.steps": 9}), console=console)
    shown = (tmp_path / "stdout").read_text()[len(before) :]
    pattern = r"ends at step 9 now, not at 6: the rate of step 7 is (\S+), not (\S+)"
    found = re.search(pattern, shown)
    assert found and float(found[1]) > 2 * float(found[2])
    options |= {"optimizer.warmup_steps": 10, "train.output": tmp_path / "other"}
    train(config(tmp_path, **options), console=console)
    shown = (tmp_path / "stdout").read_text()
    assert "the warm-up (10 steps) is longer than the run: the rate never reaches its peak" in shown


def test_named_texts_are_enough_to_compare(tmp_path, console):
    """Without held-out text: what a user with a file for validation has."""
    (tmp_path / "wiki.txt").write_text("some text " * 20)
    options = {"data.heldout": 0, "eval.texts": f'{{wiki = "{tmp_path}/wiki.txt"}}'}
    options |= {"train.keep_best": "true", "train.eval_every": 0, "train.evaluations": 3}
    folder = train(config(tmp_path, **options), console=console)
    lines = [x for x in read_metrics(folder / "metrics.jsonl") if "eval_wiki_bpb" in x]
    assert [x["step"] for x in lines] == [4, 8, 12, 12] and "heldout_bpb" not in lines[0]
    shown = (tmp_path / "stdout").read_text()
    assert len(re.findall(r"step \d+  wiki \d", shown)) == 3  # the last one once
    assert "the best evaluation is that of step 12" in shown


def test_conversations_for_evaluation_have_the_loss_of_replies(tmp_path, console):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hi."}]
    (tmp_path / "chat.json").write_text(json.dumps([{"messages": turns}] * 8))
    pairs = [{"question": "hi", "answer": "Hi."}] * 3
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    options = {"data.source": tmp_path / "chat.json", "data.train_on": "answers"}
    options |= {"data.heldout": 0, "train.steps": 2, "train.eval_every": 0}
    options |= {"eval.texts": f'{{same = "{tmp_path}/chat.json", p = "{tmp_path}/pairs.json"}}'}
    folder = train(config(tmp_path, **options), console=console)
    (line,) = [x for x in read_metrics(folder / "metrics.jsonl") if "final" in x]
    assert line["eval_same_trained_loss"] == pytest.approx(line["eval_p_trained_loss"], rel=1e-5)
    assert line["eval_same_bpb"] == pytest.approx(line["eval_p_bpb"], rel=1e-5)


def test_a_branch_does_not_start_from_damaged_moments(base, tmp_path, console):
    copy(base, tmp_path)
    init = tmp_path / "run" / "checkpoints" / "5"
    files = (x for x in (init / "rest").rglob("*") if x.is_file())
    path = max(files, key=lambda x: x.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 2
    path.write_bytes(data)
    options = {"train.init": init, "train.steps": 1, "train.init_moments": "true"}
    options |= {"train.output": tmp_path / "branch"}
    with pytest.raises(UserError, match=r"5: (damaged since it was saved|its moments are damaged)"):
        typed(tmp_path, console, without=SIZES, **options)


def test_a_mixture_takes_the_tokenizer_of_the_model(base, tmp_path, console):
    sources = f'{{"{base}/corpus" = 0.75, "{base}/corpus/1.py" = 0.25}}'
    options = {"train.init": base / "run", "data.mixture": sources, "train.steps": 1}
    left = (*SIZES, "data.source")
    folder = typed(tmp_path, console, without=left, **options | {"data.heldout": 0.2})
    assert load_run(folder)[1].vocab_size == load_run(base / "run")[1].vocab_size
    assert re.search(r"epochs: \S+corpus \d+\.\d\d, ", (tmp_path / "stdout").read_text())
