"""Runs over every kind of data and order."""

import json

import numpy as np
import pytest
from rich.console import Console
from training.runs import config

from rwkv_jax.data.binidx import BinidxWriter
from rwkv_jax.data.loader import Loader
from rwkv_jax.errors import UserError
from rwkv_jax.training.loop import train
from rwkv_jax.training.metrics import read_metrics

TIMES = ("seconds", "tokens_per_s", "steps", "data", "saving", "evaluating")


@pytest.fixture
def console(tmp_path):
    with (tmp_path / "stdout").open("w") as file:
        yield Console(file=file, width=120)


def lines(folder):
    return [
        {key: line[key] for key in line if key not in TIMES}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def pair(tmp_path, tokens=20_000, vocab=250):
    rng = np.random.default_rng(0)
    with BinidxWriter(tmp_path / "pair", np.uint16) as writer:
        for _ in range(tokens // 100):
            writer.add(rng.integers(1, vocab, 99), [0])
    return tmp_path / "pair"


@pytest.mark.slow
def test_the_official_recipe(tmp_path, console, monkeypatch):
    """Its order, its length, and its log of mini-epochs, over a stop in the middle of one."""
    seen = []
    original = Loader.read

    def read(self, step, *rows):
        batch = original(self, step, *rows)
        seen.append((step, batch.inputs[:, 0], batch.reset.any()))
        return batch

    monkeypatch.setattr(Loader, "read", read)
    official = {
        "data.source": pair(tmp_path, 40_000),
        "data.heldout": 0.0,
        "data.sampler": "magic_prime",
        "data.reset": "false",
        "data.exit_tokens": 10**9,
        "train.steps": 0,
        "train.batch": 4032,
        "train.context": 2,
        "train.eval_every": 0,
        "train.checkpoint_every": 7,
        "train.log_every": 1,
        "train.output": tmp_path / "whole",
    }
    folder = train(config(tmp_path, **official), console=console)
    found = lines(folder)
    losses = [line["loss"] for line in found if "loss" in line]
    assert len(losses) == 19_997 // 4032 == 4  # the largest prime = 2 mod 3 below 20,000
    assert not any(reset for *_, reset in seen)
    ids = np.fromfile(f"{tmp_path / 'pair'}.bin", np.uint16)
    factor = int(19_997 * (5**0.5 - 1) / 2)
    expected = [ids[2 * (factor * i**3 % 19_997)] for i in range(1, 4033)]
    # The first read is of the row that is shown before the first step.
    assert [step for step, *_ in seen[:2]] == [0, 0]
    assert seen[0][1] == expected[:1] and (seen[1][1] == expected).all()

    longer = official | {"train.steps": 23, "train.output": tmp_path / "longer"}
    folder = train(config(tmp_path, **longer), console=console)
    found = lines(folder)
    losses = [line["loss"] for line in found if "loss" in line]
    epochs = [line for line in found if "mini_epoch" in line]
    assert [(x["step"], x["mini_epoch"]) for x in epochs] == [(10, 0), (20, 1)]
    assert epochs[0]["mini_epoch_loss"] == pytest.approx(np.mean(losses[:10]), rel=1e-6)
    assert epochs[1]["mini_epoch_loss"] == pytest.approx(np.mean(losses[10:20]), rel=1e-6)
    console.file.flush()
    assert "mini-epoch 0  loss" in (tmp_path / "stdout").read_text()

    cut = official | {"train.steps": 23, "train.output": tmp_path / "cut"}
    with monkeypatch.context() as patch:

        def stop(self, step, *rows):
            if step == 16:
                raise KeyboardInterrupt
            return original(self, step, *rows)

        patch.setattr(Loader, "read", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config(tmp_path, **cut), console=console)
    assert lines(train(config(tmp_path, **cut), console=console)) == found


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"data.packing": "documents"},
        {"data.sampler": "sequential", "train.carry_state": "true"},
        {"data.mixture": True},
    ],
    ids=["documents", "carried", "mixture"],
)
def test_a_stopped_run_resumes_exactly(tmp_path, console, monkeypatch, settings):
    if "data.mixture" in settings:
        chat = tmp_path / "chat.jsonl"
        talks = (
            [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}"}]
            for i in range(40)
        )
        chat.write_text("".join(json.dumps({"text": turns}) + "\n" for turns in talks))
        corpus = tmp_path / "corpus"
        settings = {"data.mixture": f'{{"{corpus}" = 1, "{chat}" = 0.5}}', "data.source": "stdlib"}
    whole = train(
        config(tmp_path, **settings, **{"train.output": tmp_path / "whole"}), console=console
    )
    expected = lines(whole)
    original = Loader.read

    def stop(self, step, *rows):
        if step == 8:
            raise UserError("stop here")
        return original(self, step, *rows)

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "read", stop)
        with pytest.raises(UserError, match="stop here"):
            train(config(tmp_path, **settings), console=console)
    assert lines(train(config(tmp_path, **settings), console=console)) == expected
    losses = [line["loss"] for line in expected if "loss" in line]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


def test_data_and_model_that_do_not_fit_are_rejected_before_anything_is_written(tmp_path, console):
    source = pair(tmp_path, vocab=250)
    for settings, message in (
        ({"model.vocab_size": 200}, "model.vocab_size = 200: the tokenizer"),
        ({"train.context": 30_000}, "20000 tokens, one window needs 30001"),
        (
            {"data.sampler": "magic_prime", "train.context": 4000},
            "too few tokens for the official",
        ),
    ):
        asked = {"data.source": source, "data.heldout": 0.0} | settings
        with pytest.raises(UserError, match=message):
            train(config(tmp_path, **asked), console=console)
        assert not (tmp_path / "run").exists()
