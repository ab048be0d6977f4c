"""Frozen parameters stay, without gradients or moments, and the others learn as before."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax import models
from rwkv_jax.config import Config, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from rwkv_jax.data.loader import Batch
from rwkv_jax.errors import UserError
from rwkv_jax.params import path_name
from rwkv_jax.training.mesh import make_mesh
from rwkv_jax.training.state import init_train_state
from rwkv_jax.training.step import make_train_step
from rwkv_jax.training.trainable import trained_by

MODEL = ModelConfig(version="7", layers=3, width=64, vocab_size=32)


def config(*freeze, **optimizer):
    return Config(
        model=MODEL,
        optimizer=OptimizerConfig(
            **{"peak_lr": 3e-3, "final_lr": 3e-3, "warmup_steps": 0, "clip": 0.0, **optimizer}
        ),
        train=TrainConfig(batch=4, context=16, freeze=list(freeze)),
        mesh=MeshConfig(data=1, fsdp=1),
    )


def batch(seed=0):
    tokens = np.random.default_rng(seed).integers(0, 32, (4, 17)).astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], tokens[:, :-1] == 0)


def named(tree):
    return {path_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def stepped(cfg, count=2):
    """Parameters before and after some steps, the state after them, and the last metrics."""
    state, step = init_train_state(cfg), make_train_step(cfg)
    before = named(state.params)
    for seed in range(count):
        state, metrics = step(state, batch(seed))
    return before, named(state.params), state, metrics


def test_whole_parameters_and_some_layers_stay():
    cfg = config("emb.weight", "head.weight", "blocks.[01].att.*", "blocks.*.ffn.key.weight")
    before, after, state, metrics = stepped(cfg)
    assert metrics.finite and len(metrics.bad_gradients) == len(before) - 3
    for name, x in after.items():
        moved = (x != before[name]).reshape(len(x), -1).any(1)
        if name in ("emb", "head", "blocks.ffn.key"):
            assert not moved.any(), name
        elif name.startswith("blocks.att."):
            assert not moved[:2].any(), name
            # The first step of a fresh model moves no parameter whose gradient is zero.
        else:
            assert moved.any(), name
    assert (after["blocks.att.key"][2] != before["blocks.att.key"][2]).any()
    moments = named(state.opt_state[1].mu)
    assert not {"emb", "head", "blocks.ffn.key"} & moments.keys()
    assert moments["blocks.att.key"].shape == (1, 64, 64)
    assert moments["blocks.ffn.value"].shape == after["blocks.ffn.value"].shape


def test_what_is_trained_moves_as_if_nothing_were_frozen():
    """In the first step, in which the gradients are the same."""
    _, free, *_ = stepped(config(), 1)
    _, after, *_ = stepped(config("emb.weight", "blocks.0.*"), 1)
    for name, x in after.items():
        if name.startswith("blocks."):
            np.testing.assert_allclose(x[1:], free[name][1:], rtol=0, atol=1e-6, err_msg=name)
        elif name != "emb" and not name.startswith("ln0"):
            np.testing.assert_allclose(x, free[name], rtol=0, atol=1e-6, err_msg=name)


def test_a_frozen_parameter_has_no_gradient():
    """Its product is not in the program: a frozen head needs one less, of [b t, V] by [V, c]."""
    counts = []
    for freeze in (), ("head.weight", "emb.weight"):
        cfg = config(*freeze)
        state = jax.eval_shape(partial(init_train_state, cfg))
        text = make_train_step(cfg).lower(state, batch()).compile().cost_analysis()["flops"]
        counts.append(text)
    assert counts[0] - counts[1] > 2 * 64 * 64 * 32 * 0.9


def test_nothing_frozen_is_nothing_done():
    part, params = trained_by(config()), models.init_params(MODEL, jax.random.key(0))
    assert all(
        x is y for x, y in zip(*map(jax.tree.leaves, (part.take(params), params)), strict=True)
    )
    put = part.put(params, params)
    assert all(x is y for x, y in zip(*map(jax.tree.leaves, (put, params)), strict=True))


def test_ranges_of_layers_are_numbers():
    model = ModelConfig(version="7", layers=13, width=64, vocab_size=32)
    cfg = dataclasses.replace(config("blocks.[2-11].ffn.key.weight"), model=model)
    part = trained_by(cfg)
    assert (0, 1, 12) in part.layers


@pytest.mark.parametrize(
    "freeze, message",
    [
        (["head"], r"no parameter matches 'head'; names are like emb\.weight"),
        (["emb.weight", "blocks.9.*"], "no parameter matches 'blocks.9"),
        (["*"], r"train.freeze = \['\*'\] leaves nothing to train"),
    ],
)
def test_patterns_that_fit_nothing_or_everything(freeze, message):
    with pytest.raises(UserError, match=message):
        trained_by(config(*freeze))


def nats(cfg, steps):
    state, step = init_train_state(cfg, mesh=make_mesh(cfg)), make_train_step(cfg)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, batch())
        losses.append(float(metrics.loss))
    return losses


@pytest.mark.parametrize(
    "name, rate", [("lion", 1e-3), pytest.param("muon", 3e-3, marks=pytest.mark.slow)]
)
def test_other_optimizers_learn(name, rate):
    """One batch by heart, and much faster than nothing; Muon's matrices have orthogonal updates."""
    losses = nats(config(name=name, peak_lr=rate, final_lr=rate, beta2=0.99), 30)
    assert losses[-1] < 0.6 * losses[0]


def test_lion_moves_by_the_sign():
    cfg = config(name="lion", weight_decay=0.0)
    before, after, *_ = stepped(cfg, 1)
    specs = {path_name(p): s for p, s in jax.tree_util.tree_leaves_with_path(models.specs(MODEL))}
    for name in "head", "ln_out.weight", "blocks.ffn.value":
        moved = np.abs(after[name] - before[name]) / specs[name].lr_scale
        assert np.isclose(moved[moved > 0], 3e-3, rtol=1e-3).all(), name


def test_muon_s_updates_are_orthogonal_with_the_size_of_adam_s():
    cfg = config(name="muon", weight_decay=0.0)
    before, after, *_ = stepped(cfg, 2)
    moved = (after["blocks.ffn.value"] - before["blocks.ffn.value"])[0] / 3e-3  # [256, 64]
    sizes = np.sort(np.linalg.svd(moved, compute_uv=False))
    assert sizes[-1] / sizes[32] < 2  # in the first steps the gradient has no full rank
    assert 0.05 < np.sqrt(np.mean(moved**2)) < 0.6
    assert dataclasses.asdict(cfg.optimizer)["name"] == "muon"
    assert jnp.isfinite(after["emb"]).all()
