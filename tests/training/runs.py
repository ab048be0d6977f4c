"""A corpus and a config so small that a whole run takes seconds."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import jax

from rwkv_jax.config import Config
from rwkv_jax.toml import load_config
from rwkv_jax.training.objective import Objective, objective
from rwkv_jax.training.step import make_train_step

ALIKE = {"data.exit_tokens": 14 * 2 * 32, "train.accumulate": 2}
"""Settings of runs that share a program, whatever their lengths: where the schedule ends is not the
run's end. One gradient a step is what the runs in `tests/golden` and most tests of a step have."""

LINES = (
    "def add(a, b):\n    return a + b\n\n",
    "for name in names:\n    print(name)\n",
    "class Point:\n    x = 0\n    y = 0\n",
    "if value is None:\n    raise ValueError(value)\n",
    "while True:\n    step += 1\n",
)


def settings(folder: Path, **overrides: object) -> list[str]:
    """Overrides for a tiny run in `folder`, which also holds the corpus and the cache."""
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for i in range(40):
        lines = (LINES[(i * j + j // 3) % len(LINES)] for j in range(12 + i % 5))
        (corpus / f"{i}.py").write_text("".join(lines))
    values = {
        "model.layers": 1,
        "model.width": 64,
        "data.source": corpus,
        "data.tokenizer": "bytes",
        "data.heldout": 0.2,
        "data.cache": folder / "cache",
        "train.output": folder / "run",
        "train.steps": 12,
        "train.batch": 2,
        "train.context": 32,
        "train.log_every": 3,
        "train.eval_every": 6,
        "train.eval_tokens": 300,
        "train.checkpoint_every": 5,
        "sample.tokens": 0,
        "mesh.fsdp": 1,  # of the eight devices of a test
    }
    return [f"{key}={value}" for key, value in {**values, **overrides}.items()]


def config(folder: Path, **overrides: object) -> Config:
    return load_config(None, settings(folder, **overrides))


def copy(run: Path, folder: Path) -> None:
    """Copies what `settings` wrote, and the run, into another folder, as if made there."""
    shutil.copytree(run, folder, dirs_exist_ok=True)
    stated = folder / "run" / "config.toml"
    stated.write_text(stated.read_text().replace(str(run), str(folder)))


def train_step(cfg: Config, objective: Objective = objective) -> Callable:
    """`make_train_step`, traced and compiled once for all runs of a test session whose steps are
    the same. On one device."""
    steps = 1 if cfg.data.exit_tokens else cfg.train.steps  # which end the schedule
    train = dataclasses.replace(cfg.train, output="run", steps=steps)
    key = repr((cfg.model, cfg.optimizer, train, cfg.data.exit_tokens, objective))
    step = _STEPS.setdefault(key, make_train_step(cfg, objective))
    # Restored arrays are committed to their device, new ones are not: that would be two programs.
    return lambda state, batch: step(jax.device_put(state, jax.devices()[0]), batch)


_STEPS: dict[str, jax.stages.Wrapped] = {}
