"""A new version of the model is a row of `models.VERSIONS` and one of `config.VERSION_SETTINGS`."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax import models, states
from rwkv_jax.checkpoint import keymaps, weights
from rwkv_jax.cli import inspect
from rwkv_jax.config import VERSION_SETTINGS, Config, DataConfig, TrainConfig
from rwkv_jax.data.conversations import TEMPLATES
from rwkv_jax.data.loader import Batch
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.models import rwkv7
from rwkv_jax.sampling.chat import template_for
from rwkv_jax.toml import parse_config
from rwkv_jax.training.flops import model_flops
from rwkv_jax.training.optimizer import schedule
from rwkv_jax.training.state import init_train_state
from rwkv_jax.training.step import make_train_step

TOKENS = np.array([[1, 5, 2, 7]], np.int32)


def channel_mix(params, x, carry, last, *, shift):
    """Version 7's, at half strength."""
    out, last = rwkv7.channel_mix(params, x, carry, last, shift=shift)
    return 0.5 * out, last


@pytest.fixture
def cfg(monkeypatch):
    """A toy: version 7 with another channel mix, other facts, and one optional setting less."""
    seven = VERSION_SETTINGS["7"]
    optional = tuple(name for name in seven.optional if name != "rank_g")
    row = seven._replace(optional=optional, ffn_ratio=2)
    monkeypatch.setitem(VERSION_SETTINGS, "toy", row)
    version = models.VERSIONS["7"]._replace(
        channel_mix=channel_mix,
        recurrence_flops=100,
        decay=lambda raw: np.full_like(raw, 0.25),
        warmup_start=0.5,
        pypi_transposed=True,
        chat_template="raven",
    )
    monkeypatch.setitem(models.VERSIONS, "toy", version)
    sizes = {"layers": 2, "width": 64, "head_size": 16, "vocab_size": 258}
    return parse_config({"model": {"version": "toy", **sizes}}).model


@pytest.fixture
def params(cfg):
    """None of them zero, as some initial ones are."""
    rng = np.random.default_rng(0)
    params = models.init_params(cfg, jax.random.key(0))
    draw = lambda x: np.asarray(x) + np.float32(0.05) * rng.standard_normal(x.shape, "f4")  # noqa: E731
    return jax.device_put(jax.tree.map(draw, params))


def test_its_config(cfg):
    assert cfg.ffn == 2 * 64
    with pytest.raises(ValueError, match=r'model.rank_g: model.version = "toy" has no such'):
        dataclasses.replace(cfg, rank_g=8)
    with pytest.raises(ValueError, match=r'one of "4", .*"7a", "toy"'):
        dataclasses.replace(cfg, version="eight")


forward = jax.jit(
    lambda cfg, params, tokens, state=None: models.forward(params, tokens, state, cfg=cfg),
    static_argnums=0,
)


def test_its_forward_and_state(cfg, params):
    logits, state = forward(cfg, params, TOKENS)
    first, middle = forward(cfg, params, TOKENS[:, :2])
    second, end = forward(cfg, params, TOKENS[:, 2:], middle)
    np.testing.assert_allclose(np.concatenate([first, second], 1), logits, rtol=1e-5, atol=1e-5)
    assert state.version == "toy" and all(x.relative < 1e-5 for x in states.compare(state, end))
    seven = dataclasses.replace(cfg, version="7", ffn_width=cfg.ffn)
    assert np.abs(forward(seven, params, TOKENS)[0] - logits).max() > 1e-3
    with pytest.raises(ValueError, match="the state is of version toy, the model of 7"):
        models.check_state(state, seven, 1)


@pytest.mark.parametrize(
    ("name", "results", "message"),
    [
        ("time_mix", lambda out, carry, last, state: (out, carry, state, last), "att_x float32"),
        ("time_mix", lambda out, *rest: (out.astype("bfloat16"), *rest), "of time_mix is bfloat16"),
        ("channel_mix", lambda out, last: out, "of channel_mix is float32[4, 64]"),
    ],
)
def test_results_that_would_broadcast_are_refused(cfg, params, monkeypatch, name, results, message):
    """Two rows, of which a mix that returns `out` alone would give each output to one."""
    version = models.VERSIONS["7"]

    def changed(*args, **given):
        return results(*getattr(version, name)(*args, **given))

    monkeypatch.setitem(models.VERSIONS, "toy", version._replace(**{name: changed}))
    cfg = dataclasses.replace(cfg, vocab_size=259)  # no program of another test
    params = models.init_params(cfg, jax.random.key(0))
    with pytest.raises(ValueError, match=re.escape(message)):
        models.forward(params, jnp.tile(TOKENS, (2, 1)), cfg=cfg)


def test_its_states(cfg, params, tmp_path):
    _, state = forward(cfg, params, TOKENS)
    states.save(tmp_path / "s.safetensors", state)
    loaded = states.load(tmp_path / "s.safetensors", cfg).state
    assert loaded.version == "toy" and jax.tree.all(jax.tree.map(np.array_equal, loaded, state))
    arrays = states.to_pypi(state)
    np.testing.assert_array_equal(arrays[1], np.swapaxes(state.blocks.wkv[0, 0], -1, -2))
    back = states.from_pypi(arrays, cfg)
    assert jax.tree.all(jax.tree.map(np.array_equal, back, state))


def test_its_training_step(cfg):
    run = Config(
        model=cfg,
        data=DataConfig(tokenizer="bytes"),
        train=TrainConfig(batch=2, context=16, steps=2),
    )
    tokens = np.arange(34, dtype=np.int32).reshape(2, 17)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], tokens[:, :-1] < 0)
    state = init_train_state(run)
    step = make_train_step(run)
    state, before = step(state, batch)
    state, after = step(state, batch)
    assert int(state.step) == 2 and after.loss < before.loss
    seven = dataclasses.replace(cfg, version="7", ffn_width=cfg.ffn)
    assert model_flops(cfg) - model_flops(seven) == 3 * (100 - 8) * 16 * 64 * 2
    start = schedule(run.optimizer, 2, version="toy")(0)
    assert start == pytest.approx(0.5 * run.optimizer.peak_lr)


def test_its_weights_are_inspected(cfg, params, tmp_path, monkeypatch, capsys):
    weights.write(tmp_path / "m.pth", keymaps.to_official(params, cfg))
    monkeypatch.setattr(keymaps, "config_of", lambda tensors: cfg)  # as its key map would
    assert inspect.main([str(tmp_path / "m.pth")]) == 0
    out = capsys.readouterr().out
    assert "RWKV-toy, 2 layers of width 64, 4 heads of 16" in out
    assert "0.2500" in out and "0.5" in out, "its decay, and half-life of half a token"


def test_its_chat_template(cfg):
    assert template_for(cfg, ByteTokenizer()) == TEMPLATES["raven"]
