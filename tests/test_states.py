"""States as values: rows, interpolation, differences, files, and PyPI rwkv's lists."""

import functools
import inspect
import os
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from markers import versions
from official_weights import checkpoint
from tolerances import GOLDEN_LOGITS, assert_close

from rwkv_jax import models, states
from rwkv_jax.checkpoint.keymaps import from_official
from rwkv_jax.checkpoint.pth import read_pth, write_pth
from rwkv_jax.checkpoint.safetensors import read_safetensors, write_safetensors
from rwkv_jax.errors import Remark, UserError
from rwkv_jax.wkv import Wkv4State

every_version = pytest.mark.parametrize("version", models.VERSIONS)


@functools.cache
def golden(version):
    arrays = dict(np.load(Path(__file__).parent / "golden" / f"rwkv{version}.npz"))
    params, cfg = from_official({k: x.astype(np.float32) for k, x in arrays.items() if "." in k})
    theirs = [arrays[f"state/{i}"] for i in range(cfg.layers * (5 if version == "4" else 3))]
    return params, cfg, jnp.asarray(arrays["tokens"])[None], arrays["numpy_fp64"], theirs


@functools.cache
def run(version):
    params, cfg, *_ = golden(version)
    forward = jax.jit(functools.partial(models.forward, cfg=cfg))
    return lambda tokens, state=None: forward(params, tokens, state)


def random_state(version, batch=1, seed=0):
    rng = np.random.default_rng(seed)
    fresh = jax.eval_shape(functools.partial(models.init_state, golden(version)[1], batch))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), fresh)


def farthest(first, second):
    return max(row.relative for row in states.compare(first, second))


@versions("4", "7")
def test_pypi_lists_in_and_out(version):
    """Our state equals theirs after the golden text, theirs resumes here, ours comes back."""
    _, cfg, tokens, logits, theirs = golden(version)
    _, state = run(version)(tokens)
    mine = states.to_pypi(state)
    assert [x.shape for x in mine] == [x.shape for x in theirs]
    assert farthest(states.from_pypi(theirs, cfg), state) < 1e-5
    assert farthest(states.from_pypi(mine, cfg), state) == 0
    if version != "4":  # its sums have another exponent there
        for x, y in zip(mine, theirs, strict=True):
            assert_close(x, y, "float32")
    half = states.from_pypi(states.to_pypi(run(version)(tokens[:, :20])[1]), cfg)
    rest, _ = run(version)(tokens[:, 20:], half)
    np.testing.assert_allclose(rest[0], logits[20:], rtol=0, atol=GOLDEN_LOGITS)
    with pytest.raises(ValueError, match="3 layers"):
        states.from_pypi(theirs[1:], cfg)


@versions("7")
def test_rows_are_taken_and_joined(version):
    """Rows taken apart and joined are the batch; a row alone continues as it does in the batch."""
    tokens = golden(version)[2]
    batch = jnp.concatenate([jnp.roll(tokens, shift, 1) for shift in (0, 3, 9)])
    _, state = run(version)(batch)
    assert states.batch_size(state) == 3
    apart = [states.take(state, [row]) for row in range(3)]
    assert farthest(states.join(apart), state) == 0
    turned = states.take(states.join(apart[::-1]), slice(None, None, -1))
    assert farthest(turned, state) == 0
    # Unstacked states too.
    assert farthest(states.take(models.unstack(state), np.array([1])), apart[1]) == 0
    together, _ = run(version)(batch[:, :7], state)
    alone, _ = run(version)(batch[1:2, :7], apart[1])
    np.testing.assert_allclose(alone[0], together[1], rtol=0, atol=GOLDEN_LOGITS)


def test_rows_out_of_range():
    """They raise; JAX would clamp the index."""
    state = models.init_state(golden("7")[1], 2)
    state = jax.tree.map(lambda x: x + jnp.arange(2.0).reshape(1, 2, *[1] * (x.ndim - 2)), state)
    for rows in (1, [-1], np.array([False, True]), jnp.array([1]), slice(1, None)):
        assert farthest(states.take(state, rows), states.take(state, [1])) == 0
        assert states.batch_size(states.take(state, rows)) == 1
        assert np.all(states.take(state, rows).blocks.att_x == 1)
    for rows in (2, [0, 5], [-3], np.array([True])):
        with pytest.raises(
            IndexError, match=r"index (2|5|-3) is out of bounds .* size 2|boolean index"
        ):
            states.take(state, rows)
    with pytest.raises(IndexError, match=r"index 7 is out of bounds .* size 2"):
        states.to_pypi(state, 7)
    for rows in ([], slice(2, None), np.array([False, False])):
        with pytest.raises(ValueError, match="no row is selected"):
            states.take(state, rows)
    with pytest.raises(ValueError, match="no states to join"):
        states.join([])
    with pytest.raises(ValueError, match="2 and 1 rows: give as many rows of each"):
        states.interpolate(state, states.take(state, 0), 0.5)


@versions("7")
def test_interpolation(version):
    """The two states at weights 0 and 1; linear in the sums in between."""
    first, second = random_state(version), random_state(version, seed=1)
    assert farthest(first, states.interpolate(first, second, 0.0)) < 1e-6
    assert farthest(second, states.interpolate(first, second, 1.0)) < 1e-6
    middle = states.interpolate(first, second, 0.25)

    def sums(state):
        wkv = state.blocks.wkv
        if isinstance(wkv, Wkv4State):
            scale = np.exp(np.asarray(wkv.max_exp, np.float64))
            return [np.asarray(wkv.num) * scale, np.asarray(wkv.den) * scale]
        return [np.asarray(wkv, np.float64)]

    for x, y, z in zip(sums(first), sums(second), sums(middle), strict=True):
        assert_close(z, 0.75 * x + 0.25 * y, "float32")
    assert farthest(first, second) > 0.1


def test_a_difference_is_where_it_was_made():
    state = random_state("7")
    wkv = state.blocks.wkv.at[1].multiply(1.5)
    changed = replace(state, blocks=replace(state.blocks, wkv=wkv))
    apart = {(row.layer, row.part): row.relative for row in states.compare(state, changed)}
    assert apart.pop((1, "wkv")) == pytest.approx(0.5, rel=1e-5)
    assert set(apart.values()) == {0.0} and len(apart) == 8


def test_states_of_different_models_are_refused():
    seven, six = random_state("7"), random_state("6")
    for function in (states.compare, lambda x, y: states.interpolate(x, y, 0.5)):
        with pytest.raises(ValueError, match="version 6 and one of version 7"):
            function(seven, six)
    with pytest.raises(ValueError, match="give states of one model"):
        states.join([seven, six])
    with pytest.raises(ValueError, match="1 and 2 rows"):
        states.compare(seven, states.join([seven, seven]))


@every_version
def test_saved_and_loaded(version, tmp_path):
    cfg, state = golden(version)[1], random_state(version, batch=2)
    logits = jnp.arange(2.0 * cfg.vocab_size).reshape(2, -1)
    path = tmp_path / "state.safetensors"
    states.save(path, models.unstack(state), logits=logits, notes={"who": "Ünï\n"})
    saved = states.load(path, cfg)
    assert farthest(saved.state, state) == 0
    assert saved.state.version == version
    assert np.array_equal(saved.logits, logits)
    assert saved.notes == {"who": "Ünï\n"}
    assert jax.tree.structure(saved.state) == jax.tree.structure(state)
    states.save(path, state)
    assert states.load(path, cfg).logits is None


def test_a_state_of_other_weights_is_said_to_be(tmp_path):
    """And one whose weights are not known is not."""
    _, cfg, *_ = golden("7")
    state, path = models.init_state(cfg, 1), tmp_path / "state.safetensors"
    states.save(path, state, weights="0123456789abcdef")
    assert states.load(path, cfg).weights == "0123456789abcdef"
    states.load(path, cfg, weights="0123456789abcdef")
    with pytest.warns(
        Remark, match=r"state\.safetensors: .* 0123456789abcdef, .* fedcba9876543210"
    ):
        states.load(path, cfg, weights="fedcba9876543210")
    states.save(path, state)
    assert states.load(path, cfg, weights="fedcba9876543210").weights == ""


def test_invalid_saves_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    _, cfg, *_ = golden("7")
    state, path = models.init_state(cfg, 2), tmp_path / "state.safetensors"
    vocab = cfg.vocab_size
    for logits in (jnp.zeros((1, vocab)), jnp.zeros((3, vocab))):
        with pytest.raises(ValueError, match=r"logits of shape .* the state has 2 rows"):
            states.save(path, state, logits=logits)
    with pytest.raises(ValueError, match=r"the note 'n' is 3: "):
        # Unwrapped, as the tests' type checks would raise first.
        inspect.unwrap(states.save)(path, state, notes={"n": 3})
    assert not path.exists()
    tensors = {
        f"state.{name}": np.zeros((cfg.layers, 2, *x.shape[2:]), np.float32)
        for name, x in states._named_arrays(state.blocks).items()
    }
    metadata = {"format": states.FORMAT, "version": "7"}
    write_safetensors(path, tensors | {"logits": np.zeros((1, vocab), np.float32)}, metadata)
    with pytest.raises(UserError, match=rf"\[1, {vocab}\], but the state has 2 rows"):
        states.load(path, cfg)
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(UserError, match="is a folder; name a file"):
        states.check_save_path(tmp_path / "d.safetensors")
    with pytest.raises(UserError, match="there is no folder"):
        states.check_save_path(tmp_path / "none" / "s.safetensors")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UserError, match=r"cannot be written \(no permission"):
        states.check_save_path(tmp_path / "s.safetensors")


@pytest.mark.parametrize("version", ["5.0", "5.2", "6", "7", "7a"])
def test_tuned_states(version, tmp_path):
    """The matrices [h, v, k] of every layer, under the trainer's names; from them a model computes
    what the state-tuned model does."""
    tensors = checkpoint(version, layers=2, ranks=(6, 5, 4, 7, 3), tuned=True)
    params, cfg = from_official(tensors)
    rng = np.random.default_rng(0)
    tuned = {
        f"blocks.{layer}.att.time_state": rng.normal(size=(2, 16, 16)).astype(np.float32)
        for layer in range(2)
    }
    write_pth(tmp_path / "tuned.pth", tuned)
    state = states.load(tmp_path / "tuned.pth", cfg).state
    turned = {name: x.swapaxes(1, 2) for name, x in tuned.items()}
    write_safetensors(tmp_path / "tuned.st", turned)
    assert farthest(states.load(tmp_path / "tuned.st", cfg).state, state) == 0
    for layer in range(2):
        assert np.array_equal(state.blocks.wkv[layer, 0], tuned[f"blocks.{layer}.att.time_state"])
    assert not np.any(state.blocks.att_x) and not np.any(state.blocks.ffn_x)
    for name in ("tuned.pth", "tuned.safetensors"):
        states.save_tuned(tmp_path / name, state.blocks.wkv[:, 0])
        assert farthest(states.load(tmp_path / name, cfg).state, state) == 0
    if version == "6":
        whole, whole_cfg = from_official(tensors | tuned)
        tokens = jnp.arange(9, dtype=jnp.int32)[None]
        expected, _ = models.forward(whole, tokens, cfg=whole_cfg)
        logits, _ = models.forward(params, tokens, state, cfg=cfg)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=GOLDEN_LOGITS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("read", [read_pth, read_safetensors])
def test_tuned_states_are_written_bit_exactly(read, dtype, tmp_path):
    """Layer by layer, under the trainer's names, in their own type."""
    wkv = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 4, 4)), dtype)
    path = tmp_path / ("s.pth" if read is read_pth else "s.safetensors")
    states.save_tuned(path, wkv)
    found = read(path)
    assert list(found) == [f"blocks.{layer}.att.time_state" for layer in range(3)]
    for written, given in zip(found.values(), np.asarray(wkv), strict=True):
        assert written.dtype == given.dtype and written.tobytes() == given.tobytes()


def test_tuned_states_that_cannot_be_written(tmp_path):
    wkv = jnp.zeros((3, 2, 4, 4))
    with pytest.raises(UserError, match=r"must end in \.pth or \.safetensors"):
        states.save_tuned(tmp_path / "s.st", wkv)
    with pytest.raises(UserError, match="there is no folder"):
        states.save_tuned(tmp_path / "none" / "s.pth", wkv)
    with pytest.raises(ValueError, match=r"of shape \[3, 2, 4, 3\]: give \[layers, h, v, k\]"):
        states.save_tuned(tmp_path / "s.pth", wkv[..., 1:])
    with pytest.raises(ValueError, match="of float16: convert it to float32 or bfloat16"):
        states.save_tuned(tmp_path / "s.pth", wkv.astype(jnp.float16))
    assert not list(tmp_path.iterdir())


def test_files_of_other_models_are_refused(tmp_path):
    cfg, state = golden("7")[1], random_state("7")
    path = tmp_path / "state.safetensors"
    states.save(path, state)
    for other, message in {
        "6": "a state of version 7, but the model is version 6",
        "7a": "a state of version 7, but the model is version 7a",
    }.items():
        with pytest.raises(UserError, match=message):
            states.load(path, golden(other)[1])
    with pytest.raises(UserError, match="does not fit"):
        states.load(path, replace(cfg, layers=2))
    write_safetensors(path, {"emb.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(UserError, match="not a state file"):
        states.load(path, cfg)
    half = {"blocks.0.att.time_state": np.zeros((2, 64, 64), np.float32)}
    write_safetensors(tmp_path / "half.safetensors", half)
    with pytest.raises(UserError, match=r"blocks\.1\.att\.time_state is missing"):
        states.load(tmp_path / "half.safetensors", cfg)
    write_pth(tmp_path / "half.pth", half)
    with pytest.raises(UserError, match=r"blocks\.1\.att\.time_state is missing"):
        states.load(tmp_path / "half.pth", cfg)
    small = {f"blocks.{i}.att.time_state": np.zeros((2, 8, 8), np.float32) for i in range(3)}
    write_pth(tmp_path / "small.pth", small)
    with pytest.raises(UserError, match=r"is \[2, 8, 8\], but heads of this model"):
        states.load(tmp_path / "small.pth", cfg)
