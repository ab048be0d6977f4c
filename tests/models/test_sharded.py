"""Whole models with rows of given lengths, and with time sharded over a mesh axis."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from markers import versions
from official_weights import checkpoint
from tolerances import MODEL_RMS, assert_close, relative_rms

import rwkv_jax as rwkv
from rwkv_jax import ModelConfig, models
from rwkv_jax.checkpoint.keymaps import from_official
from rwkv_jax.loss import cross_entropy
from rwkv_jax.testing import leak_test

ROWS, LENGTH = 2, 48


@functools.cache
def weights(version):
    """Two layers without a zero, two heads of 16."""
    ranks, tuned = (6, 5, 4, 7, 3), version in ("6", "7")
    return from_official(
        checkpoint(version, layers=2, width=32, head=16, ffn=96, ranks=ranks, tuned=tuned)
    )


def batch(version):
    rng = np.random.default_rng(len(version))
    tokens = jnp.asarray(rng.integers(0, 67, (ROWS, LENGTH)), jnp.int32)
    # A document starts at the border of two devices, and one beside it.
    return tokens, jnp.zeros((ROWS, LENGTH), bool).at[1, jnp.array([12, 13, 30])].set(True)


@pytest.mark.slow
def test_a_step_over_65536_tokens():
    """Version 7 on eight devices: loss and gradient are those of one, for a share of the memory."""
    mesh = jax.make_mesh((8,), ("sequence",))
    cfg = ModelConfig(version="7", layers=2, width=128, vocab_size=512)
    # Fresh projections are zero: nothing would flow through them.
    params = jax.tree.map(
        lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape),
        models.init_params(cfg, jax.random.key(0)),
    )
    text = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, 65537), np.int32)

    def run(params, mesh_axis):
        def loss(params):
            inputs, targets = jnp.asarray(text[:, :-1]), jnp.asarray(text[:, 1:])
            hidden, _ = models.backbone(params, inputs, cfg=cfg, mesh_axis=mesh_axis, remat="dots")
            return cross_entropy(hidden, params.head, targets)[0]

        program = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        loss, gradient = jax.device_get(program(params))
        return loss, ravel_pytree(gradient)[0], program.memory_analysis().temp_size_in_bytes

    loss, gradient, memory = run(params, None)
    with jax.set_mesh(mesh):
        everywhere = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        split_loss, split_gradient, split_memory = run(everywhere, "sequence")
    assert abs(split_loss / loss - 1) < 1e-6
    assert np.linalg.norm(split_gradient - gradient) < 1e-5 * np.linalg.norm(gradient)
    assert split_memory < memory / 4


def test_mesh_axis_of_a_model_is_explicit():
    params, cfg = weights("7")
    tokens, _ = batch("7")
    auto = jax.make_mesh(
        (4,), ("sequence",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4]
    )
    with jax.set_mesh(auto), pytest.raises(ValueError, match=r"'sequence' is automatic.*Explicit"):
        models.forward(params, tokens, cfg=cfg, mesh_axis="sequence")
    with jax.set_mesh(auto), pytest.raises(ValueError, match="no mesh axis 'time'"):
        models.forward(params, tokens, cfg=cfg, mesh_axis="time")


@versions("7")
def test_automatic_meshes_need_no_mesh_axis(version):
    """Without `mesh_axis`, XLA partitions a model over an automatic mesh by itself."""
    params, cfg = weights(version)
    tokens, reset = batch(version)
    run = jax.jit(functools.partial(models.forward, cfg=cfg))
    alone, _ = run(params, tokens, reset=reset)
    auto = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    with jax.set_mesh(auto):
        rows = jax.device_put((tokens, reset), NamedSharding(auto, PartitionSpec("data")))
        everywhere = jax.device_put(params, NamedSharding(auto, PartitionSpec()))
        found, _ = run(everywhere, rows[0], reset=rows[1])
    assert found.sharding.spec[0] == "data"
    assert_close(found, alone, "float32")


def leaves(tree):
    return jax.tree.leaves(tree)


@versions("7")
def test_time_across_devices(version):
    """Logits, state and every gradient are those of one device; the state that comes in, too."""
    params, cfg = weights(version)
    tokens, reset = batch(version)
    _, state = jax.jit(functools.partial(models.forward, cfg=cfg))(params, tokens[:, ::-1])
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, LENGTH, 1)), jnp.float32)

    def everything(mesh_axis):
        def loss(params, blocks):
            logits, after = models.forward(
                params,
                tokens,
                state.replace(blocks=blocks),
                cfg=cfg,
                reset=reset,
                mesh_axis=mesh_axis,
                remat="dots",
            )
            total = jnp.sum(weight * jax.nn.log_softmax(logits)[..., :1])
            if version != "4":  # its max_exp is a scale, not a quantity
                total += sum(jnp.sum(jnp.sin(x)) for x in leaves(after.blocks))
            return total, (logits, after.blocks)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    (_, values), grads = everything(None)(params, state.blocks)
    mesh = jax.make_mesh((4,), ("sequence",), devices=jax.devices()[:4])
    everywhere = jax.device_put((params, state.blocks), NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        (_, split), split_grads = everything("sequence")(*everywhere)
    for a, b in zip(leaves((split, split_grads)), leaves((values, grads)), strict=True):
        assert relative_rms(a, b) < MODEL_RMS


@versions("7")
def test_rows_of_given_lengths(version):
    """The state is that after each row's last valid token, and continues as it would alone."""
    params, cfg = weights(version)
    tokens, reset = batch(version)
    lengths = jnp.array([29, 48])
    run = jax.jit(functools.partial(models.forward, cfg=cfg))
    logits, state = run(params, tokens, None, reset=reset, lengths=lengths)
    more, _ = run(params, tokens[:, :5], state)
    for row, length in enumerate(lengths.tolist()):
        alone, mine = run(
            params, tokens[row : row + 1, :length], reset=reset[row : row + 1, :length]
        )
        assert_close(logits[row : row + 1, :length], alone, "float32")
        assert_close(
            more[row : row + 1], run(params, tokens[row : row + 1, :5], mine)[0], "float32"
        )


@versions("7")
def test_documents_do_not_see_each_other(version):
    params, cfg = weights(version)
    tokens, reset = batch(version)
    run = jax.jit(functools.partial(models.forward, cfg=cfg))
    leak_test(lambda tokens, reset: run(params, tokens, None, reset=reset)[0], tokens, reset)


def mesh_of(*axes):
    types, devices = (AxisType.Explicit,) * len(axes), jax.devices()[: 2 ** len(axes)]
    return jax.make_mesh((2,) * len(axes), axes, types, devices=devices)


@pytest.mark.parametrize("version", ["4", pytest.param("7", marks=pytest.mark.slow)])
def test_a_model_is_made_under_one_mesh_and_another(version):
    """What does not depend on the key is kept, and belongs to no mesh."""
    cfg = ModelConfig(version=version, layers=2, width=64, vocab_size=71)  # seen by no other test
    key = jax.random.key(0)
    with jax.set_mesh(mesh_of("data")):
        first = jax.device_get(models.init_params(cfg, key))
    alone = models.init_params(cfg, key)
    with jax.set_mesh(mesh_of("data", "sequence")):
        other = models.init_params(cfg, key)
    jax.tree.map(np.testing.assert_array_equal, alone, first)
    jax.tree.map(np.testing.assert_array_equal, alone, other)


@pytest.mark.parametrize("unstacked", [False, True])
def test_tokens_and_a_state_are_sharded_alike(unstacked):
    """Either of them may be, as where a prompt is placed on the mesh and later tokens are not."""
    params, cfg = weights("7")
    tokens = batch("7")[0]
    params = models.unstack(params) if unstacked else params
    _, state = models.forward(params, tokens[:, :4], cfg=cfg)
    expected, after = models.forward(params, tokens[:, 4:8], state, cfg=cfg)
    mesh = mesh_of("data")
    with jax.set_mesh(mesh):
        params, tokens, state = jax.device_put(
            (params, tokens, state), NamedSharding(mesh, PartitionSpec())
        )
        rows = NamedSharding(mesh, PartitionSpec("data"))
        _, held = models.forward(params, jax.device_put(tokens[:, :4], rows), cfg=cfg)
        later = jax.device_put(tokens[:, 4:8], rows)
        for given, start in ((later, state), (tokens[:, 4:8], held), (later, held)):
            logits, end = models.forward(params, given, start, cfg=cfg)
            assert jax.typeof(logits).sharding.spec[0] == "data"
            assert relative_rms(logits, expected) < 1e-5
            assert all(
                relative_rms(a, b) < 1e-5
                for a, b in zip(*map(jax.tree.leaves, (end, after)), strict=True)
            )


@pytest.mark.parametrize(
    ("place", "axis", "message"),
    [
        ((None, "data"), None, r"time is sharded over 'data'; pass mesh_axis='data'"),
        (("data",), "data", r"'data' shards the rows of the tokens; name another"),
        ((None, None), "", r"no mesh axis ''"),
    ],
)
def test_what_shards_the_tokens_is_said(place, axis, message):
    params, cfg = weights("7")
    mesh = mesh_of("data")
    tokens = jax.device_put(batch("7")[0], NamedSharding(mesh, PartitionSpec(*place)))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        models.forward(params, tokens, cfg=cfg, mesh_axis=axis)
    with pytest.raises(ValueError, match=r"not in context: call jax.set_mesh\(mesh\)"):
        models.forward(params, tokens, cfg=cfg)


def test_a_model_from_a_file_runs_on_any_mesh(tmp_path):
    """Its arrays are committed to no device."""
    params, cfg = weights("4")
    rwkv.save(tmp_path / "m.safetensors", params, cfg)
    loaded, cfg = rwkv.load(tmp_path / "m.safetensors")
    tokens = batch("4")[0]
    expected, _ = models.forward(params, tokens, cfg=cfg)
    with jax.set_mesh(mesh_of("data", "sequence")) as _:
        rows = jax.device_put(np.asarray(tokens), jax.P("data"))
        logits, _ = models.forward(loaded, rows, cfg=cfg, mesh_axis="sequence")
    assert relative_rms(logits, expected) < 1e-5
