"""The room every test runs in: CPU, eight virtual devices, JAX at its strictest, and compiled
quickly (`compiling.py`)."""

import atexit
import os
import shutil
import tempfile

# Read when JAX is first imported; subprocesses of a test inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What several tests, workers and processes compile is compiled once in a run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.mkdtemp(prefix="rwkv_jax_tests_")
    atexit.register(shutil.rmtree, _programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

import hypothesis
import jax
from compiling import QUICK_FLAGS
from jaxtyping import install_import_hook

# Read when the first array is made.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        QUICK_FLAGS,
    ]
).strip()

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Every annotation of the package is checked on every call, in tests only.
install_import_hook("rwkv_jax", "beartype.beartype")

# Compiling takes longer than any test's arithmetic: no deadline. Repeatable: a failure that only
# some seeds show is a new test, not a rerun.
hypothesis.settings.register_profile(
    "suite", deadline=None, max_examples=20, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("suite")
