"""The fingerprint of weights: one for all files of a model, another for any other model."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from markers import versions
from official_weights import checkpoint

import rwkv_jax
from rwkv_jax.checkpoint import keymaps, weights
from rwkv_jax.checkpoint.fingerprint import fingerprint, fingerprint_of
from rwkv_jax.errors import UserError
from rwkv_jax.sampling.decode import decoding_layout

RANKS = (6, 5, 4, 7, 3)


@functools.cache
def tensors(version="7"):
    return checkpoint(version, layers=2, width=128, head=64, vocab=300, ranks=RANKS)


def of(path):
    """By the tensors, and by the parameters."""
    found = {fingerprint_of(weights.read(path).tensors), fingerprint(*rwkv_jax.load(path))}
    assert len(found) == 1
    return found.pop()


@versions("4", "7")
def test_every_file_of_a_model_has_its_fingerprint(version, tmp_path):
    given = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors(version).items()}
    params, cfg = keymaps.from_official(given)
    one = fingerprint(params, cfg)
    assert len(one) == 16 and int(one, 16)
    names = ["m.pth", "m.safetensors"] + ["folder"] * (version in "47")
    for dtype in ("bfloat16", "float32", "float16"):
        for name in names:
            path = tmp_path / dtype / name
            path.parent.mkdir(exist_ok=True)
            weights.write(path, given, dtype=dtype)
            assert of(path) == one, path
    rwkv_jax.save(tmp_path / "saved.pth", params, cfg)  # with version 7's unused tensors
    assert of(tmp_path / "saved.pth") == one
    assert fingerprint(rwkv_jax.unstack(params), cfg) == one
    assert fingerprint(decoding_layout(params, cfg), cfg) == one


def test_float32_weights_and_their_bfloat16_copy_are_the_same(tmp_path):
    rng = np.random.default_rng(0)
    given = {name: (x * rng.normal(size=x.shape)).astype("f4") for name, x in tensors().items()}
    weights.write(tmp_path / "m.pth", given)
    weights.write(tmp_path / "b.pth", given, dtype="bfloat16")
    assert of(tmp_path / "m.pth") == of(tmp_path / "b.pth")


def test_sharded_parameters(tmp_path):
    params, cfg = keymaps.from_official(tensors())
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(x):
        spec = [None] * (x.ndim - 1) + ["x" if x.shape[-1] % 4 == 0 else None]
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P(*spec)))

    assert fingerprint(jax.tree.map(place, params), cfg) == fingerprint(params, cfg)


def test_an_accelerator_picks_the_same_numbers(monkeypatch):
    params, cfg = keymaps.from_official(tensors())
    layers = rwkv_jax.unstack(params)
    one = fingerprint(params, cfg)
    monkeypatch.setattr("rwkv_jax.checkpoint.fingerprint.is_on_host", lambda _: False)
    assert fingerprint(params, cfg) == one == fingerprint(layers, cfg)


@pytest.mark.parametrize("name", ["emb.weight", "blocks.1.att.w0", "blocks.1.ln2.weight"])
def test_another_model_has_another(name):
    params, cfg = keymaps.from_official(tensors())
    changed = tensors() | {name: tensors()[name] * 1.01}
    assert fingerprint_of(changed) != fingerprint(params, cfg)
    one = 1e-5 * jnp.ones(())  # a step of training, of each number
    moved = jax.tree.map(lambda x: x + one, params)
    assert fingerprint(moved, cfg) != fingerprint(params, cfg)


def test_what_is_no_model_has_none():
    params, _ = keymaps.from_official(tensors())
    with pytest.raises(ValueError, match="give the cfg of these params"):
        fingerprint(params, keymaps.check(tensors("4")))
    with pytest.raises(UserError, match=r"head\.weight is missing"):
        fingerprint_of({name: x for name, x in tensors().items() if name != "head.weight"})
