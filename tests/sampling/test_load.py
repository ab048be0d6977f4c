"""Loading straight into the layout of decoding."""

import jax
import numpy as np
import pytest

from rwkv_jax.checkpoint.weights import load_with_tokenizer, save
from rwkv_jax.sampling.decode import decoding_layout
from rwkv_jax.sampling.load import load_to_decode
from tests.sampling.conftest import config, weights


@pytest.mark.parametrize(
    ("version", "stored", "dtype"),
    [
        ("4", "bfloat16", "float32"),
        ("6", "float32", "float32"),
        ("7", "bfloat16", "float32"),
        ("7a", "float32", "bfloat16"),
    ],
)
def test_it_is_what_laying_out_loaded_parameters_gives(version, stored, dtype, tmp_path):
    path = tmp_path / "model.pth"
    save(path, weights(version), config(version), dtype=stored)
    params, cfg, tokenizer = load_with_tokenizer(path, "bytes")
    expected = decoding_layout(params, cfg, dtype)
    found, found_cfg, found_tokenizer = load_to_decode(path, "bytes", dtype=dtype)
    assert found_cfg == cfg
    assert found_tokenizer.identity() == tokenizer.identity()
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def test_parameters_outlive_their_file(tmp_path):
    """They are copies: a file that is overwritten changes nothing."""
    path = tmp_path / "model.safetensors"
    save(path, weights("7"), config("7"))
    params, _, _ = load_to_decode(path, "bytes", dtype="float32")
    before = jax.tree.map(np.array, params)
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    jax.tree.map(np.testing.assert_array_equal, params, before)
