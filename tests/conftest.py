"""How every test runs: on eight virtual CPU devices, with JAX at its strictest."""

import gc
import itertools
import os
import signal
from pathlib import Path

# Read when NumPy and JAX are imported; workers and the programs that tests start inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A factorisation on each of eight devices, each by threads that spin, takes minutes.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import checking
import compiling
import hypothesis
import jax

compiling.set_up(devices=8)

# Ignored under `nohup` and in the background; programs that a test starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

checking.set_up("rwkv_jax")

# Compiling takes longer than any test's arithmetic: no deadline. Repeatable: a failure that only
# some seeds show is a new test, not a rerun.
hypothesis.settings.register_profile(
    "suite", deadline=None, max_examples=20, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("suite")

# Tracing makes millions of small objects, few of them garbage that only the collector finds.
gc.set_threshold(50_000, 20, 50)

MAPS = Path("/proc/self/maps")


_finished = itertools.count(1)


def pytest_runtest_teardown():
    """Drops compiled programs before they hold half of the 65,530 memory maps that Linux gives a
    process: without maps LLVM ends it."""
    if next(_finished) % 32 == 0 and os.path.exists(MAPS):
        with open(MAPS, "rb") as maps:  # not by Path, whose methods a test may have replaced
            if sum(1 for _ in maps) > 30_000:
                jax.clear_caches()


def pytest_collection_finish():
    gc.collect()
    gc.freeze()
