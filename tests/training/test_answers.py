"""Trained on conversations, a model answers, and ends its answers: what `train_on` is for."""

import json

import pytest
from rich.console import Console
from training.runs import config

from rwkv_jax.checkpoint.weights import load_run
from rwkv_jax.data.conversations import TEMPLATES
from rwkv_jax.sampling import Generator, Sampling
from rwkv_jax.sampling.chat import Conversation, ReplySettings
from rwkv_jax.training.loop import train
from rwkv_jax.training.metrics import read_metrics
from rwkv_jax.training.report import Report

NUMBERS = dict(zip(["one", "two", "three", "four"], "1234", strict=True))


def conversation(index):
    """Some exchanges, whose replies have an empty line where the template allows it."""
    names = [*NUMBERS][index % 4 :] + [*NUMBERS][: index % 4]
    turns = []
    for name in (2 * names)[: 2 + index // 4 % 6]:
        turns.append({"role": "user", "content": name})
        turns.append({"role": "assistant", "content": f"{name}:\n\n{NUMBERS[name]}."})
    return {"messages": turns}


@pytest.mark.parametrize(
    "name", ["g1", *(pytest.param(x, marks=pytest.mark.slow) for x in TEMPLATES if x != "g1")]
)
def test_a_reply_ends_where_it_should(name, tmp_path, monkeypatch):
    """64 conversations by heart; the chat stops by itself, at the first and at later turns."""
    monkeypatch.setattr(Report, "curve", lambda _: None)
    path, template = tmp_path / "chat.json", TEMPLATES[name]
    path.write_text(json.dumps([conversation(i) for i in range(64)]))
    options = {"data.source": path, "data.train_on": "answers", "data.template": name}
    options |= {"data.packing": "documents", "data.heldout": 0.3}
    options |= {"train.batch": 4, "train.context": 128}
    options |= {"train.steps": 250, "optimizer.peak_lr": 3e-3, "optimizer.final_lr": 1e-3}
    options |= {"train.eval_every": 0, "train.log_every": 250, "train.checkpoint_every": 250}
    with (tmp_path / "stdout").open("w") as file:
        folder = train(config(tmp_path, **options), console=Console(file=file, width=200))
    last = read_metrics(folder / "metrics.jsonl")[-1]
    assert last["heldout_trained_loss"] < 0.15 < last["heldout_loss"]
    assert "compressors" in last and not last["compressors"]
    settings = ReplySettings(sampling=Sampling(temperature=0.0), max_tokens=40)
    talk = Conversation(Generator(*load_run(folder)), template, settings=settings)
    for word in "two", "three", "four":
        chunks = list(talk.say(word))
        reply = "".join(chunk.text for chunk in chunks)
        lines = "\n\n" if template.paragraphs or template.mark else "\n"
        assert reply == f"{word}:{lines}{NUMBERS[word]}."
        assert chunks[-1].finish in ("stop", "end")
