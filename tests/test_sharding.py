"""Loss and gradients over meshes of explicit axes are those of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from kinds import versions
from tolerances import MODEL_RMS, relative_rms

from rwkv_jax import models, sharding
from rwkv_jax.config import ModelConfig
from rwkv_jax.params import is_spec
from rwkv_jax.training.loss import cross_entropy

MESHES = [
    {"fsdp": 8},
    {"data": 8},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "sequence": 4},
    {"data": 2, "fsdp": 2, "tensor": 2},
]


def shardings(specs, mesh):
    def one(spec):
        layers = (None,) if spec.layers else ()
        return NamedSharding(mesh, sharding.spec((*layers, *spec.axes), mesh))

    return jax.tree.map(one, specs, is_leaf=is_spec)


@versions("7")
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(x, marks=() if len(x) == 3 or "sequence" in x else pytest.mark.slow)
        for x in MESHES
    ],
    ids=str,
)
def test_loss_and_gradients(version, shape):
    head = 64 if version == "4" else 32
    cfg = ModelConfig(version=version, layers=2, width=128, head_size=head, vocab_size=66)
    params = models.init_params(cfg, jax.random.key(0))
    params = jax.tree.map(
        lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape), params
    )
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 66, (8, 65)), jnp.int32)
    batch = tokens[:, :-1], tokens[:, 1:], jnp.asarray(rng.random((8, 64)) < 0.05)

    def loss(params, inputs, targets, reset, axis):
        hidden, _ = models.backbone(
            params, inputs, cfg=cfg, reset=reset, remat="dots", mesh_axis=axis
        )
        return cross_entropy(hidden, params.head, targets, l2wrap=1e-4)[0]

    def run(axis):
        return jax.jit(jax.value_and_grad(functools.partial(loss, axis=axis)))

    expected = run(None)(params, *batch)
    types = (AxisType.Explicit,) * len(shape)
    mesh = jax.make_mesh(tuple(shape.values()), tuple(shape), types)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(models.specs(cfg), mesh))
        parts = [jax.device_put(x, sharding.named(mesh, "batch", "time")) for x in batch]
        found = run("sequence" if "sequence" in shape else None)(placed, *parts)
    assert found[0] == pytest.approx(float(expected[0]), rel=1e-6)
    leaves = zip(*map(jax.tree.leaves, (found[1], expected[1], placed)), strict=True)
    for gradient, whole, parameter in leaves:
        assert relative_rms(np.asarray(gradient), np.asarray(whole)) < MODEL_RMS
        assert gradient.sharding.is_equivalent_to(parameter.sharding, gradient.ndim)
