"""Makes the runs beside it: stopped half-way, as the package wrote them at version 0.1.0.

    python tests/golden/run/make.py     # with the package of commit c424680 on the path

An archive holds what a run leaves that is stopped between two lines of `metrics.jsonl`, with an
evaluation due. `expected.json` has the metrics of the same run without the stop, and the greedy
continuation of a prompt by the checkpoint. Other versions of the package read these files: they
are not to be made again.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import jax

from rwkv_jax import generate
from rwkv_jax.checkpoint.weights import load_run
from rwkv_jax.config import load_config
from rwkv_jax.data.loader import Loader
from rwkv_jax.training.hosts import Interrupted
from rwkv_jax.training.loop import train
from rwkv_jax.training.metrics import read_metrics

HERE = Path(__file__).parent
WORDS = "the quick brown fox jumps over the lazy dog and runs away".split()  # noqa: SIM905
SETTINGS = {
    "model.layers": 1,
    "model.width": 8,
    "data.source": "text.jsonl",
    "data.tokenizer": "bytes",
    "data.heldout": 0.2,
    "data.cache": "cache",
    "train.steps": 12,
    "train.batch": 2,
    "train.context": 32,
    "train.log_every": 4,
    "train.eval_every": 3,
    "train.eval_tokens": 100,
    "train.checkpoint_every": 100,
    "sample.tokens": 0,
    "mesh.fsdp": 1,
    "optimizer.peak_lr": 0.01,
}


def main() -> None:
    os.chdir(HERE)
    lines = (
        {"text": " ".join(WORDS[i * j % len(WORDS)] for j in range(1, 30))} for i in range(1, 30)
    )
    Path("text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    read, expected = Loader.read, {}

    def interrupted(self, step, *rows):
        if step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return read(self, step, *rows)

    for version in ("4", "7"):
        folder = Path(f"rwkv{version}")
        shutil.rmtree(folder, ignore_errors=True)
        settings = {**SETTINGS, "model.version": version, "train.output": folder}
        if version == "7":
            settings["model.head_size"] = 8
        cfg = load_config(None, [f"{key}={value}" for key, value in settings.items()])
        train(cfg)
        whole = read_metrics(folder / "metrics.jsonl")
        shutil.rmtree(folder)
        Loader.read = interrupted
        try:
            train(cfg)
        except Interrupted as stop:
            print(stop)
        Loader.read = read
        pieces = generate(*load_run(folder), ["the "], max_tokens=16, temperature=0.0)
        text = "".join(piece.text for piece in pieces)
        expected[folder.name] = {"text": text, "metrics": whole}
        for name in ("loss.png", ".lock"):
            (folder / name).unlink()
        shutil.make_archive(folder.name, "xztar", base_dir=folder)
        shutil.rmtree(folder)
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    shutil.rmtree("cache")


if __name__ == "__main__":
    print(jax.__version__)
    main()
