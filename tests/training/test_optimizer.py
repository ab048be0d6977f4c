"""AdamW against float64 by hand, its groups, and the schedule against official numbers."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rwkv_jax.config import OptimizerConfig
from rwkv_jax.params import ParamSpec, zeros
from rwkv_jax.training.optimizer import schedule, transformation

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "data_lr.json").read_text())
MINIPILE_STEPS = 1498226207 / (512 * 16)
"""The official MiniPile run stops after a number of tokens that is no whole number of batches."""


def test_schedule_is_the_official_one():
    lr = schedule(OptimizerConfig(), MINIPILE_STEPS, version="7")
    for step, expected in GOLDEN["lr_minipile"].items():
        assert float(lr(int(step))) == pytest.approx(expected, rel=2e-6)


def test_schedule_logged_by_the_published_run():
    lr = schedule(OptimizerConfig(), MINIPILE_STEPS, version="7")
    for epoch, _, logged in GOLDEN["published_minipile"]:
        # 2,520 steps an epoch, logged at the last one, rounded to 8 places.
        assert float(lr((epoch + 1) * 2520 - 1)) == pytest.approx(logged, abs=5.1e-9)


def test_version_4_warms_up_from_a_fifth():
    cfg = OptimizerConfig(peak_lr=1e-3, final_lr=1e-3, warmup_steps=10)
    lr = schedule(cfg, 100, version="4")
    assert [float(lr(s)) for s in (0, 5, 10, 99)] == pytest.approx([2e-4, 6e-4, 1e-3, 1e-3])


@pytest.mark.parametrize("warmup, steps, end", [(0, 10, 6e-5), (10, 10, 6e-4), (20, 10, 3.03e-4)])
def test_schedule_without_room_for_a_cosine(warmup, steps, end):
    lr = schedule(OptimizerConfig(warmup_steps=warmup), steps, version="7")
    rates = [float(lr(s)) for s in range(steps)]
    assert all(0 < rate <= 6.001e-4 for rate in rates)
    assert float(lr(steps)) == pytest.approx(end, rel=1e-5)


def run(cfg, specs, params, gradients, rates):
    optimizer = transformation(cfg, specs, lambda step: jnp.asarray(rates, jnp.float32)[step])
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for grads in gradients:
        params, state = step(params, state, grads)
    return params


def test_adamw_with_groups_equals_the_formula_in_float64():
    cfg = OptimizerConfig(beta1=0.9, beta2=0.95, eps=1e-3, weight_decay=0.1, clip=1.0)
    specs = {
        "decayed": ParamSpec((3,), zeros, decay=True),
        "fast": ParamSpec((3,), zeros, lr_scale=2.0),
        "both": ParamSpec((3,), zeros, lr_scale=3.0, decay=True),
    }
    rng, rates = np.random.default_rng(0), [0.1, 0.05, 0.02]
    params = {name: rng.normal(size=3) for name in specs}
    gradients = [{name: 0.7 * rng.normal(size=3) for name in specs} for _ in rates]
    actual = run(
        cfg, specs, *jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, gradients)), rates
    )
    mean, square = ({name: np.zeros(3) for name in specs} for _ in range(2))
    clipped = 0
    for t, (grads, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        clipped += norm > 1
        for name, spec in specs.items():
            g = grads[name] / max(norm, 1.0)
            mean[name] = 0.9 * mean[name] + 0.1 * g
            square[name] = 0.95 * square[name] + 0.05 * g**2
            step = mean[name] / (1 - 0.9**t) / (np.sqrt(square[name] / (1 - 0.95**t)) + 1e-3)
            params[name] -= rate * spec.lr_scale * (step + 0.1 * spec.decay * params[name])
    assert clipped
    for name in specs:
        np.testing.assert_allclose(actual[name], params[name], rtol=1e-5)


def test_official_epsilon_survives_zero_and_vanishing_gradients():
    cfg = OptimizerConfig(eps=1e-18, weight_decay=0.0, clip=1.0)
    sizes = np.concatenate([[0.0], 10.0 ** np.arange(-45, 1, 0.5)]).astype(np.float32)
    specs = {"p": ParamSpec(sizes.shape, zeros)}
    params = {"p": jnp.zeros(sizes.shape)}
    moved = run(cfg, specs, params, 3 * [{"p": jnp.asarray(sizes)}], 3 * [1.0])["p"]
    assert moved[0] == 0
    # A constant gradient moves its parameter by lr a step, or less where it is as small as eps.
    assert jnp.all(jnp.isfinite(moved))
    assert jnp.max(jnp.abs(moved)) <= 3.3
    np.testing.assert_allclose(moved[sizes > 1e4 * cfg.eps], -3.0, rtol=1e-3)
