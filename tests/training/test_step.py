"""One training step: accumulation, non-finite values, and that it learns."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax import models
from rwkv_jax.config import Config, ModelConfig, OptimizerConfig, TrainConfig, load_config
from rwkv_jax.data.loader import Batch
from rwkv_jax.training.state import abstract_train_state, init_train_state
from rwkv_jax.training.step import make_train_step, what_is_not_finite

ROOT = Path(__file__).parents[2]
MODELS = {
    version: ModelConfig(version=version, layers=2, width=64, vocab_size=32)
    for version in ("4", "7")
}


def config(**train):
    return Config(
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=0),
        train=TrainConfig(**{"steps": 50, "batch": 4, "context": 16, **train}),
    )


@functools.cache
def compiled_step(version):
    """The step of the plain config, compiled once."""
    return make_train_step(config(), MODELS[version])


def batch(seed=0, b=4, t=16, vocab=32):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (b, t + 1)).astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], tokens[:, :-1] == 0)


@pytest.mark.parametrize("version", [pytest.param("4", marks=pytest.mark.slow), "7"])
def test_accumulated_gradient_is_the_whole_batchs(version):
    # One step without momentum: the parameters after it show the gradient.
    results = []
    for parts in (1, 4):
        cfg = dataclasses.replace(
            config(accumulate=parts, l2wrap=0.1, z_loss=0.1),
            # With a large eps the update is lr * gradient / eps: no normalisation hides a factor.
            optimizer=OptimizerConfig(eps=1e3, peak_lr=1e3, final_lr=1e3, warmup_steps=0, clip=0.0),
        )
        state = init_train_state(cfg, MODELS[version])
        before = jax.tree.map(np.asarray, state.params)
        state, metrics = make_train_step(cfg, MODELS[version])(state, batch())
        moved = jax.tree.map(lambda new, old: np.asarray(new) - old, state.params, before)
        results.append((moved, float(metrics.loss), float(metrics.grad_norm)))
    (whole, loss, norm), (parts, loss_parts, norm_parts) = results
    assert loss_parts == pytest.approx(loss, rel=1e-6)
    assert norm_parts == pytest.approx(norm, rel=1e-5)
    difference = jax.tree.map(lambda a, b: np.sum((a - b) ** 2), whole, parts)
    total = sum(np.sum(x**2) for x in jax.tree.leaves(whole))
    # The parameters' own rounding is part of the difference.
    assert (sum(jax.tree.leaves(difference)) / total) ** 0.5 < 1e-5


@pytest.mark.parametrize("version", [pytest.param("4", marks=pytest.mark.slow), "7"])
def test_learns_a_batch_by_heart(version):
    cfg = config()
    state = init_train_state(cfg, MODELS[version])
    step = compiled_step(version)
    losses = []
    for _ in range(50):
        state, metrics = step(state, batch())
        losses.append(float(metrics.loss))
    assert losses[0] == pytest.approx(np.log(32), rel=0.2)
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.step) == 50


def test_a_step_that_is_not_finite_changes_nothing_and_says_what():
    cfg = config()
    state = init_train_state(cfg, MODELS["7"])
    bad = state.params.blocks.att.w0.at[1].set(jnp.nan)
    att = state.params.blocks.att.replace(w0=bad)
    blocks = state.params.blocks.replace(att=att)
    state = state.replace(params=state.params.replace(blocks=blocks))
    before = jax.tree.map(np.asarray, state)
    after, metrics = compiled_step("7")(state, batch())
    assert not metrics.finite
    assert "the loss is nan" in what_is_not_finite(metrics, after.params)
    assert "the gradient is not finite in" in what_is_not_finite(metrics, after.params)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, after), before)


def test_names_the_parameter_whose_gradient_is_not_finite():
    state = init_train_state(config(), MODELS["4"])
    step = compiled_step("4")
    state, metrics = step(state, batch())
    names = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree_util.tree_leaves_with_path(state.params)
    ]
    index = names.index("blocks.ffn.key")
    bad = metrics.replace(bad_gradients=metrics.bad_gradients.at[index].set(True))
    assert what_is_not_finite(bad, state.params) == ("the gradient is not finite in blocks.ffn.key")


def test_abstract_state_is_the_states_shape():
    cfg = config()
    actual = jax.eval_shape(lambda: init_train_state(cfg, MODELS["7"]))
    assert jax.tree.structure(actual) == jax.tree.structure(abstract_train_state(cfg, MODELS["7"]))
    assert jax.tree.leaves(jax.tree.map(lambda a: (a.shape, a.dtype), actual)) == jax.tree.leaves(
        jax.tree.map(lambda a: (a.shape, a.dtype), abstract_train_state(cfg, MODELS["7"]))
    )


def test_initial_parameters_depend_on_the_seed_only():
    first, again, other = (
        init_train_state(config(seed=seed), MODELS["7"]).params.head for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, models.init_params(MODELS["7"], jax.random.key(1)).head)
    assert not np.array_equal(first, other)


@pytest.mark.slow
def test_the_official_0_1b_step_compiles_in_the_memory_its_config_states():
    cfg = load_config(ROOT / "configs" / "rwkv7-0.1b.toml")
    state = abstract_train_state(cfg, cfg.model)
    assert sum(x.size for x in jax.tree.leaves(state.params)) == 191_084_544
    shape = cfg.train.batch, cfg.train.context
    ints = jax.ShapeDtypeStruct(shape, jnp.int32)
    step = make_train_step(cfg, cfg.model)
    compiled = step.lower(state, Batch(ints, ints, jax.ShapeDtypeStruct(shape, jnp.bool_)))
    memory = compiled.compile().memory_analysis()
    assert memory.argument_size_in_bytes < 2.15 * 2**30
    assert memory.alias_size_in_bytes > 2.13 * 2**30, "the state is not updated in place"
    assert memory.temp_size_in_bytes < 3.5 * 2**30
