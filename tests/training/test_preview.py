"""The first row as it is trained: its text, and what of it is read only."""

import io
import itertools
import json

import numpy as np
import pytest
from rich.console import Console

from rwkv_jax.config import Config, DataConfig, TrainConfig
from rwkv_jax.data.sources import open_data
from rwkv_jax.data.tokenizers import open_tokenizer
from rwkv_jax.training.preview import END, LINES, parts, show_row
from rwkv_jax.training.setup import Setup, resolve

RECORD = {"question": "Whose?", "answer": "Mine é."}


def shown(tmp_path, records, context, **settings):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records))
    data = DataConfig(
        source=str(path), heldout=0.0, tokenizer="bytes", cache=str(tmp_path / "c"), **settings
    )
    cfg = Config(data=data, train=TrainConfig(context=context, batch=1))
    opened = open_data(cfg.data, progress=False)
    cfg, loader = resolve(cfg, opened)
    console = Console(file=io.StringIO(), width=400)
    show_row(Setup(cfg, opened, loader, None, tmp_path), console)
    return console.file.getvalue()


def test_what_is_read_only_is_marked(tmp_path):
    text = shown(tmp_path, [RECORD] * 9, 36, train_on="answers", packing="documents")
    assert text == (
        "\nThe first row, as it is trained (⟦this⟧ is read only; 29% of the tokens are trained):\n"
        "⟦User: Whose?\n\nAssistant:⟧ Mine é.[end]\n"
    )


def test_all_of_a_text_is_trained(tmp_path):
    text = shown(tmp_path, [{"text": "line\n" * 40 + "the end"}] * 9, 160)
    assert text.startswith("\nThe first row, as it is trained:\n")
    assert "⟦" not in text and text.endswith("line ...\n") and text.count("\n") <= LINES + 3


def test_a_long_row_is_cut(tmp_path):
    text = shown(tmp_path, [{"text": "x" * 3000}] * 3, 1200)
    assert text.endswith("x ...\n") and 600 <= text.count("x") < 700


@pytest.mark.parametrize("name", ["bytes", "world"])
def test_parts_are_the_text(name):
    """Also where a character is in two parts, and where documents end."""
    tokenizer = open_tokenizer(name)
    ids = np.array([*tokenizer.encode("héllo ✿ there"), tokenizer.eod, *tokenizer.encode("é")])
    for seed in range(5):
        trained = np.random.default_rng(seed).random(len(ids)) < 0.5
        found = list(parts(tokenizer, ids, trained))
        assert "".join(text for text, _ in found) == f"héllo ✿ there{END}é"
        flags = [flag for _, flag in found]
        assert all(a != b for a, b in itertools.pairwise(flags))
