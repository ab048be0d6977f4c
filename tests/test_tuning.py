"""Adapters beside parameters: no change at the start, the same as merged weights, few numbers."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rwkv_jax as rwkv
from rwkv_jax import models, tuning
from rwkv_jax.config import ModelConfig, TuneConfig
from rwkv_jax.loss import cross_entropy
from rwkv_jax.nn import LowRank

TUNE = TuneConfig(method="lora", rank=4, alpha=6.0)
TOKENS = jax.random.randint(jax.random.key(0), (2, 24), 0, 50)


def config(version, layers=2):
    return ModelConfig(version=version, layers=layers, width=64, vocab_size=50)


def dense(version, layers=2):
    """A model whose matrices are all of order one: fresh ones have zeros."""
    cfg = config(version, layers)
    leaves, tree = jax.tree.flatten(models.init_params(cfg, jax.random.key(1)))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return tree.unflatten(noisy), cfg


def drawn(cfg, tune=TUNE, params=None, seed=3):
    """An adapter whose every number does something."""
    adapter = tuning.init(cfg, jax.random.key(seed), tune, params)
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten(
        [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


def logits(params, cfg, tokens=TOKENS):
    return rwkv.forward(params, tokens, cfg=cfg)[0]


def distance(x, y):
    return float(jnp.sqrt(jnp.mean(jnp.square(x - y)) / jnp.mean(jnp.square(y))))


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7", "7a"])
def test_a_new_adapter_changes_no_bit_and_a_drawn_one_what_its_weights_do(version):
    params, cfg = dense(version)
    before = logits(params, cfg)
    fresh = tuning.on(params, tuning.init(cfg, jax.random.key(0), TUNE))
    assert (logits(fresh, cfg) == before).all()
    adapter = drawn(cfg)
    for weight in 1.0, -0.5:
        beside = logits(tuning.on(params, adapter, weight), cfg)
        merged = tuning.merge(params, adapter, weight)
        assert distance(beside, before) > 0.05
        assert distance(beside, logits(merged, cfg)) < 1e-5
    # By hand, for a matrix of layer 1: [in, out] as stored.
    change = adapter.low_rank["blocks.att.key"]
    wanted = params.blocks.att.key[1] - 0.5 * 1.5 * np.float64(change.down[1]) @ change.up[1]
    np.testing.assert_allclose(merged.blocks.att.key[1], wanted, rtol=1e-5, atol=1e-6)


def test_layers_as_a_tuple_and_adapters_on_one_another():
    params, cfg = dense("7")
    first, second = drawn(cfg), drawn(cfg, dataclasses.replace(TUNE, targets=["ffn.key"]), seed=5)
    both = tuning.on(tuning.on(params, first), second, 0.5)
    merged = tuning.merge(tuning.merge(params, second, 0.5), first)
    assert distance(logits(both, cfg), logits(merged, cfg)) < 1e-5
    unstacked = tuning.on(tuning.on(models.unstack(params), first), second, 0.5)
    assert distance(logits(unstacked, cfg), logits(merged, cfg)) < 1e-5
    merged_apart = tuning.merge(models.unstack(params), first)
    whole = tuning.merge(params, first)
    jax.tree.map(np.testing.assert_array_equal, models.stack(merged_apart), whole)


@pytest.mark.parametrize("version", ["4", "6", "7"])
def test_gradients_are_those_of_the_merged_weights(version):
    """By the chain rule: of W + s A B they are s dW B^T and s A^T dW."""
    params, cfg = dense(version)
    adapter = drawn(cfg)

    def loss(params):
        return jnp.mean(jnp.square(logits(params, cfg)))

    found = jax.grad(lambda a: loss(tuning.on(params, a)))(adapter)
    dense_gradient = jax.grad(loss)(tuning.merge(params, adapter))
    for path, change in adapter.low_rank.items():
        dw = np.float64(tuning.get(dense_gradient, path))
        down, up = np.float64(change.down), np.float64(change.up)
        wanted = LowRank(
            change.scale * dw @ up.swapaxes(1, 2), change.scale * down.swapaxes(1, 2) @ dw, 0.0
        )
        for mine, true in zip(*map(jax.tree.leaves, (found.low_rank[path], wanted)), strict=True):
            assert distance(mine, true) < 1e-4, path


def test_a_hundred_adapters_under_one_vmap():
    params, cfg = dense("7")
    tune = dataclasses.replace(TUNE, rank=1)
    adapters = jax.vmap(lambda seed: drawn(cfg, tune, seed=seed))(jnp.arange(100))

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None))
    def each(adapter, tokens):
        return logits(tuning.on(params, adapter), cfg, tokens)

    found = each(adapters, TOKENS[:1, :8])
    for i in 0, 57, 99:
        one = tuning.merge(params, jax.tree.map(lambda x, i=i: x[i], adapters))
        assert distance(found[i], logits(one, cfg, TOKENS[:1, :8])) < 1e-5


def test_whole_parameters_in_place_of_the_model_s():
    params, cfg = dense("7")
    tune = TuneConfig(method="lora", targets=[], also=["ln", "att.x_r"])
    with pytest.raises(ValueError, match=r"tune.also = .*give its params"):
        tuning.init(cfg, jax.random.key(0), tune)
    adapter = tuning.init(cfg, jax.random.key(0), tune, params)
    norms = {"ln0", "ln1", "ln2", "ln_x", "ln_out"}
    assert {p.split(".")[-2] for p in adapter.whole if p != "blocks.att.x_r"} == norms
    assert (logits(tuning.on(params, adapter), cfg) == logits(params, cfg)).all()
    adapter = drawn(cfg, tune, params)
    half = tuning.on(params, adapter, 0.5)
    middle = (params.ln_out.weight + adapter.whole["ln_out.weight"]) / 2
    np.testing.assert_allclose(half.ln_out.weight, middle, rtol=1e-6)


@pytest.mark.parametrize(
    "tune, message",
    [
        (
            dict(targets=["at"]),
            "tune.targets: nothing is called 'at'; there are att, ffn, and names",
        ),
        (dict(targets=["emb"]), "tune.targets: nothing is called 'emb'"),
        (dict(also=["att.kay"]), "tune.also: nothing is called 'att.kay'.*like att"),
        (dict(layers="2:"), "tune.layers = 2:: the model has layers 0 to 1"),
    ],
)
def test_names_that_are_not_in_the_model(tune, message):
    tune, cfg = TuneConfig(method="lora", **tune), config("7")
    with pytest.raises(ValueError, match=message):
        tuning.tuned_layers(cfg, tune)
        tuning.specs(cfg, tune)


def test_targets_by_mix_name_and_pattern():
    cfg = config("6")

    def paths(*targets):
        return [*tuning.specs(cfg, TuneConfig(method="lora", targets=[*targets])).low_rank]

    mix = ["receptance", "key", "value", "gate", "output"]
    assert paths("att") == [f"blocks.att.{x}" for x in mix]
    assert paths("*.key", "att.output") == ["blocks.att.key", "blocks.att.output", "blocks.ffn.key"]
    assert len(paths("att", "ffn")) == 8  # without low-rank pairs


@pytest.mark.parametrize("scaled, scale", [(False, 1.5), (True, 3.0)])
def test_the_scale(scaled, scale):
    table = tuning.specs(config("7"), dataclasses.replace(TUNE, rslora=scaled, lora_plus=16.0))
    change = table.low_rank["blocks.ffn.key"]
    assert change.scale == scale and (change.down.lr_scale, change.up.lr_scale) == (1.0, 16.0)
    assert not (change.down.decay or change.up.decay)


def test_a_frozen_head_has_no_gradient():
    """Nothing of its shape is made; with the head trained, its gradient is."""
    hidden, head = jnp.ones((2, 40, 8)), jnp.ones((8, 96))
    targets = jnp.zeros((2, 40), "int32")

    def made(argnums):
        gradient = jax.grad(lambda *x: cross_entropy(*x, targets)[0], argnums)
        return jax.jit(gradient).lower(hidden, head).compile().as_text().count("f32[8,96]")

    assert made((0, 1)) > made(0) == made(0)
    text = jax.jit(jax.grad(lambda x: cross_entropy(x, head, targets)[0])).lower(hidden).as_text()
    assert "tensor<8x96xf32>" in text
    alone = jax.grad(lambda x: cross_entropy(x, head, targets)[0])(hidden)
    both, _ = jax.grad(lambda *x: cross_entropy(*x, targets)[0], (0, 1))(hidden, head)
    assert (alone == both).all()


@pytest.mark.parametrize("chunk", [None, 7])
def test_log_probs_and_their_gradients(chunk):
    params, cfg = dense("7")
    targets = jnp.roll(TOKENS, -1, 1)
    weights = jax.random.normal(jax.random.key(9), TOKENS.shape)

    def ours(params):
        return rwkv.log_probs(params, TOKENS, targets, cfg=cfg, chunk_tokens=chunk)

    def plain(params):
        every = jax.nn.log_softmax(logits(params, cfg))
        return jnp.take_along_axis(every, targets[..., None], 2)[..., 0]

    np.testing.assert_allclose(ours(params), plain(params), rtol=1e-5, atol=1e-5)
    found, wanted = (
        jax.grad(lambda p, f=f: jnp.sum(weights * f(p)))(params) for f in (ours, plain)
    )
    for mine, true in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert distance(mine, true) < 1e-4 or float(jnp.max(jnp.abs(true))) < 1e-6
    # Of an adapter alone: the head has no gradient.
    adapter = drawn(cfg)
    found, wanted = (
        jax.grad(lambda a, f=f: jnp.sum(weights * f(tuning.on(params, a))))(adapter)
        for f in (ours, plain)
    )
    for mine, true in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert distance(mine, true) < 1e-4


def test_log_probs_of_targets_that_do_not_fit():
    params, cfg = dense("7")
    with pytest.raises(ValueError, match=r"there is no id 50, ids are 0 to 49"):
        rwkv.log_probs(params, TOKENS, jnp.full_like(TOKENS, 50), cfg=cfg)
