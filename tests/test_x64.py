"""With 64-bit types enabled, as a user's own program may, everything here is as without."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training.runs import settings

from rwkv_jax import models
from rwkv_jax.config import ModelConfig
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.sampling import Sampling, generate
from rwkv_jax.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent
NUMBERS = ("step", "loss", "bpb", "lr", "grad_norm", "state_rms", "heldout_bpb", "heldout_loss")


def test_generated_text_is_the_same():
    """Drawn from nearly all bytes, so that the cutoff is searched for."""
    cfg = ModelConfig(version="7", layers=1, width=32, head_size=16, vocab_size=257)
    params = models.init_params(cfg, jax.random.key(0))
    noise = np.random.default_rng(0).normal(size=params.head.shape)
    params = params.replace(head=jnp.asarray(0.1 * noise, jnp.float32))

    def text():
        sampling = Sampling(top_p=0.97, top_k=200, presence_penalty=0.1, frequency_penalty=0.2)
        options = {"max_tokens": 40, "sampling": sampling, "seed": 3}
        chunks = generate(params, cfg, ByteTokenizer(), ["Once", ""], **options)
        return [(chunk.index, chunk.text) for chunk in chunks if chunk.text]

    expected = sorted(text())
    with jax.enable_x64(True):
        assert sorted(text()) == expected


@pytest.mark.slow
def test_commands_compute_the_same_bits(tmp_path):
    """Training, the sample at its end, sampling, chat, evaluation."""
    arguments = settings(tmp_path, **{"sample.tokens": 20, "train.accumulate": 2})
    found = []
    for enabled in "01":
        run = str(tmp_path / enabled)

        def command(*arguments, stdin="", enabled=enabled):
            environment = os.environ | {"JAX_ENABLE_X64": enabled}
            done = subprocess.run(
                [sys.executable, "-m", "rwkv_jax", *map(str, arguments)],
                cwd=ROOT,
                env=environment,
                input=stdin,
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        command("train", *arguments, f"train.output={run}")
        out = [
            command("sample", run, "def ", "--tokens", 20, "--seed", 3),
            command("sample", run, "--chat", "--tokens", 8, "--seed", 1, stdin="hi\n"),
            command("eval", run, tmp_path / "corpus" / "3.py", "--by-position").replace(run, ""),
        ]
        lines = read_metrics(Path(run) / "metrics.jsonl")
        found.append((out, [[x.get(name) for name in NUMBERS] for x in lines]))
    assert found[0] == found[1]
