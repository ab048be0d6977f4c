"""What an import pulls in: the operators need JAX and jaxtyping, data needs neither."""

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import rwkv_jax
import rwkv_jax.data

ROOT = Path(__file__).parent.parent

JAX = {"jax", "jaxlib", "ml_dtypes", "numpy", "opt_einsum", "scipy"}
JAXTYPING = {"jaxtyping", "wadler_lindig"}

PROBE = """
import json, sys
before = set(sys.modules)
for name in sys.argv[1:]:
    __import__(name)
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps(sorted(new - sys.stdlib_module_names)))
"""


def pulled_in(*modules: str) -> set[str]:
    """Top-level packages, the standard library's aside, that a fresh interpreter then holds."""
    command = [sys.executable, "-c", PROBE, *modules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout)) - {"rwkv_jax"}


def test_the_probe_sees_third_parties():
    assert {"flax", "jax", "numpy"} <= pulled_in("flax")


def test_the_package_alone_is_light():
    assert pulled_in("rwkv_jax") == set()


def test_the_config_schema_needs_the_standard_library_alone():
    assert pulled_in("rwkv_jax.config") == set()


def test_the_operators_need_jax_and_jaxtyping_only():
    found = pulled_in("rwkv_jax.wkv")
    # JAX also takes what it finds installed: a compressor for its cache, say.
    assert {"jax", "jaxtyping"} <= found <= JAX | JAXTYPING | pulled_in("jax", "jaxtyping")


def test_data_knows_no_jax():
    package = rwkv_jax.data
    modules = [m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    assert modules, "rwkv_jax.data is empty"
    found = pulled_in(package.__name__, *modules)
    assert not found & ((JAX - {"numpy"}) | JAXTYPING | {"flax", "optax", "orbax", "torch"})


@pytest.mark.parametrize("name", rwkv_jax.__all__)
def test_a_public_name_resolves(name):
    value = getattr(rwkv_jax, name)
    assert getattr(rwkv_jax, name) is value, "the import put a module of that name in its place"
    assert name in dir(rwkv_jax)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = rwkv_jax.nonsense
