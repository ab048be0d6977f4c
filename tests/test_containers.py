"""Containers of arrays: their text, and programs of them that `jax.export` writes."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from rwkv_jax import models
from rwkv_jax.config import ModelConfig
from rwkv_jax.models import init_state

ROOT = Path(__file__).parent.parent
slow = pytest.mark.slow
SIZES = {"layers": 2, "width": 32, "vocab_size": 23}


def of_version(version):
    head = {} if version == "4" else {"head_size": 16}
    return ModelConfig(version=version, **SIZES, **head)


@pytest.mark.parametrize("version", ["4", "7a"])
def test_the_text_has_shapes_not_numbers(version):
    cfg = of_version(version)
    params, state = models.abstract_params(cfg), init_state(cfg, 3)
    for layout in (lambda x: x, models.unstack):
        # Of shapes, of arrays, of tracers.
        given = jax.eval_shape(layout, params)
        jax.eval_shape(lambda x: print(f"{x!r}"), given)
        assert repr(given).startswith("Model(") and len(repr(given)) < 100
        assert len(repr(layout(state))) < 300
    assert "float32[2, 3, 32]" in repr(state) and f"version='{version}'" in repr(state)
    assert repr(params.ln0) == "Norm(weight=float32[32], bias=float32[32])"


EXPORT = """
import sys
import jax, jax.numpy as jnp
from jax import export
from rwkv_jax import ModelConfig, forward, init_params, init_state, models, states

version = sys.argv[1]
cfg = ModelConfig(version=version, layers=2, width=64, vocab_size=23)
b, t = export.symbolic_shape("b, t")

def for_any_length(implementation=None):
    def run(params, tokens, state, lengths):
        options = {"lengths": lengths, "implementation": implementation}
        return forward(params, tokens, state, cfg=cfg, **options)

    shapes = (
        models.abstract_params(cfg),
        jax.ShapeDtypeStruct((b, t), jnp.int32),
        jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((x.shape[0], b, *x.shape[2:]), x.dtype),
            jax.eval_shape(lambda: init_state(cfg, 1)),
        ),
        jax.ShapeDtypeStruct((b,), jnp.int32),
    )
    run = jax.jit(run)
    return run, export.export(run, platforms=["cpu", "cuda", "tpu"])(*shapes)

run, exported = for_any_length()
again = export.deserialize(exported.serialize())
params = init_params(cfg, jax.random.key(0))
for batch, time in ((1, 1), (2, 37)):
    tokens = jnp.arange(batch * time, dtype=jnp.int32).reshape(batch, time) % 23
    lengths = jnp.arange(time, time - batch, -1, dtype=jnp.int32)
    args = params, tokens, init_state(cfg, batch), lengths
    (logits, state), (expected, after) = again.call(*args), run(*args)
    valid = jnp.arange(time)[None] < lengths[:, None]
    assert jnp.abs(jnp.where(valid[:, :, None], logits - expected, 0)).max() < 1e-5
    assert all(x.relative < 1e-5 for x in states.compare(state, after))
for name in ("chunked", "associative"):
    try:
        for_any_length(name)
    except ValueError as error:
        assert f"{name!r} cuts time into chunks" in str(error) and "'scan', or None" in str(error)
    else:
        raise AssertionError(name)
"""


@pytest.mark.parametrize("version", ["4", *(pytest.param(x, marks=slow) for x in ("6", "7a"))])
def test_programs_for_any_batch_and_length_are_written_and_read(version):
    """Parameters and states are arguments, and one program is for every platform.

    A process of its own: where annotations are checked, a length has to be an int.
    """
    pytest.importorskip("flatbuffers")
    command = [sys.executable, "-c", EXPORT, version]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
