"""Whole models with rows of given lengths, and with time over the devices of a mesh axis."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from kinds import versions
from official import checkpoint
from tolerances import MODEL_RMS, assert_close, relative_rms

from benchmarks.sequence import step
from rwkv_jax import models
from rwkv_jax.checkpoint.keymaps import from_official
from rwkv_jax.wkv import leak_test

ROWS, LENGTH = 2, 48


@functools.cache
def weights(version):
    """Two layers without a zero, two heads of 16."""
    ranks = (6, 5, 4, 7, 3)
    return from_official(
        checkpoint(version, layers=2, width=32, head=16, ffn=96, ranks=ranks, tuned=True)
    )


def batch(version):
    rng = np.random.default_rng(len(version))
    tokens = jnp.asarray(rng.integers(0, 67, (ROWS, LENGTH)), jnp.int32)
    # A document starts at the border of two devices, and one beside it.
    return tokens, jnp.zeros((ROWS, LENGTH), bool).at[1, jnp.array([12, 13, 30])].set(True)


@pytest.mark.slow
def test_a_step_over_65536_tokens():
    """Version 7 on eight devices: loss and gradient are those of one, for a share of the memory."""
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    found = step(65536, mesh)
    assert found["loss_apart"] < 1e-6
    assert found["gradient_apart"] < 1e-5
    assert found["allocated"] < found["alone_allocated"] / 4


def leaves(tree):
    return jax.tree.leaves(tree)


@versions("7")
def test_time_over_devices(version):
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
    """The state is that after each row's last real token, and goes on as it would alone."""
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
