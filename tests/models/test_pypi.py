"""Random official checkpoints of odd sizes against PyPI `rwkv`: logits and final states.

Runs where `pip install '.[oracle]'` has been done; the golden files hold the same for fixed sizes.
"""

import importlib
import os
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from official_weights import VERSIONS, checkpoint
from tolerances import GOLDEN_LOGITS

from rwkv_jax import models, states
from rwkv_jax.checkpoint.keymaps import from_official
from rwkv_jax.checkpoint.pth import read_pth
from rwkv_jax.checkpoint.weights import load, write

torch = pytest.importorskip("torch")
pytest.importorskip("rwkv")

SIZES = [
    {"layers": 1, "width": 32, "head": 16, "vocab": 100, "ranks": (5, 9, 3, 17, 32)},
    {"layers": 5, "width": 64, "head": 32, "vocab": 300, "ranks": (11, 4, 40, 6, 32)},
    {"layers": 2, "width": 128, "head": 64, "vocab": 65536, "ranks": (64, 30, 8, 50, 32)},
]
LENGTH = 24


def official(version, path, tokens, **flags):
    """The package's logits of every token, read one at a time, and its last state."""
    # It reads these when it is imported, and has another class for version 7.
    os.environ |= {"RWKV_V7_ON": "1" if version[0] == "7" else "0", "RWKV_JIT_ON": "0"}
    os.environ |= {"RWKV_DE_VERSION": "1" if version == "7a" else "0", "RWKV_CUDA_ON": "0"}
    for name in [name for name in sys.modules if name.split(".")[0] == "rwkv"]:
        del sys.modules[name]
    model = importlib.import_module("rwkv.model").RWKV(
        model=str(path.with_suffix("")), strategy="cpu fp32"
    )
    state, logits = None, []
    for token in tokens:
        row, state = model.forward([token], state)
        logits.append(row.float().numpy().copy())
    return np.stack(logits), [x.float().numpy() for x in state]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("version", [pytest.param("5.2", marks=pytest.mark.slow), "6"])
def test_a_tuned_state(version, tmp_path):
    """In a file of its own beside a model here, in the model's file there."""
    sizes, path = SIZES[1], tmp_path / "model.pth"
    model = checkpoint(version, seed=7, **sizes)
    h, n = sizes["width"] // sizes["head"], sizes["head"]
    learnt = np.random.default_rng(2).normal(size=(sizes["layers"], h, n, n)).astype(np.float32)
    states.save_tuned(tmp_path / "state.pth", jnp.asarray(learnt))
    write(path, model | read_pth(tmp_path / "state.pth"))
    tokens = np.random.default_rng(1).integers(sizes["vocab"], size=LENGTH)
    logits, _ = official(version, path, tokens.tolist())
    params, cfg = from_official(model)
    start = states.load(tmp_path / "state.pth", cfg).state
    mine, _ = models.forward(params, jnp.asarray(tokens, jnp.int32)[None], start, cfg=cfg)
    np.testing.assert_allclose(mine[0], logits, rtol=0, atol=GOLDEN_LOGITS)
    baked, baked_cfg = load(path)
    mine, _ = models.forward(baked, jnp.asarray(tokens, jnp.int32)[None], cfg=baked_cfg)
    np.testing.assert_allclose(mine[0], logits, rtol=0, atol=GOLDEN_LOGITS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sizes", SIZES, ids=["1 layer", "5 layers", "World"])
@pytest.mark.parametrize("version", VERSIONS)
def test_logits_and_states(version, sizes, tmp_path):
    """From a file that we wrote, which the package has to be able to read."""
    if version == "7a" and sizes["vocab"] > 1000:
        sizes = sizes | {"vocab": 2000}  # its tables would take half a GB
    path = tmp_path / "model.pth"
    write(path, checkpoint(version, seed=7, **sizes))
    tokens = np.random.default_rng(1).integers(sizes["vocab"], size=LENGTH)
    logits, state = official(version, path, tokens.tolist())
    params, cfg = load(path)
    mine, after = models.forward(params, jnp.asarray(tokens, jnp.int32)[None], cfg=cfg)
    np.testing.assert_allclose(mine[0], logits, rtol=0, atol=GOLDEN_LOGITS)
    for row in states.compare(states.from_pypi(state, cfg), after):
        assert row.relative < 1e-5, row
