"""Checksums of arrays: every flipped bit shows, on any mesh; what they are by numpy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from rwkv_jax.checkpoint.checksums import changed, checksums

TYPES = ["float32", "int32", "uint8", "bool", "float16", ml_dtypes.bfloat16]


def array(dtype, shape=(3, 5, 2)):
    values = np.random.default_rng(0).integers(0, 2**31, shape)
    return (values % 2 == 0) if dtype == "bool" else (values % 251).astype(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(3, 5, 2), (7,), ()])
def test_the_definition(dtype, shape):
    x = array(dtype, shape)
    kind = {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
    bits = np.ascontiguousarray(x).view(kind).reshape(-1).astype(object)
    due = sum(int(b) * (2 * i + 1) for i, b in enumerate(bits)) % 2**32
    assert checksums([jnp.asarray(x)]) == [due]


def test_every_flipped_bit_shows():
    x = array("float32", (4, 3))
    (expected,) = checksums([jnp.asarray(x)])
    for place in range(x.nbytes):
        for bit in range(8):
            raw = bytearray(x.tobytes())
            raw[place] ^= 1 << bit
            other = np.frombuffer(raw, np.float32).reshape(x.shape)
            assert checksums([jnp.asarray(other)]) != [expected], (place, bit)
    swapped = x.copy()
    swapped[[0, 1]] = x[[1, 0]]
    assert checksums([jnp.asarray(swapped)]) != [expected]


@pytest.mark.parametrize("spec", [("x",), (None, "x"), ("x", "y"), (("x", "y"),), ()])
def test_the_same_on_any_mesh(spec):
    tree = {"a": array("float32", (8, 16)), "b": {"c": array("int32", (8, 8))}}
    expected = checksums(jax.tree.map(jnp.asarray, tree))
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        sharded = jax.tree.map(lambda x: jax.device_put(x, place), tree)
        assert checksums(sharded) == expected
        assert changed(sharded, expected) == ""
        assert changed(sharded, [expected[0], expected[1] + 1]) == "b.c"
        assert changed(sharded, expected[:1]) == "2 arrays, not 1"
    assert checksums({}) == []
