"""How tests compile programs, several times faster than users do, and where these are cached.

Most of a test's time is compiling, so LLVM optimises little. XLA's own passes, and so nearly all of
the numerics, are the same; the hard regimes and the golden files are compiled as users do. Compiled
programs are kept between runs, so that the next run compiles only what has changed.
"""

import atexit
import contextlib
import hashlib
import os
import platform
import shutil
import tempfile
from functools import partial
from pathlib import Path

import jax
import jaxlib

QUICK_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,  # every core has a worker of the suite
}
"""Options of XLA; `set_up` makes them the default of this process and of those it starts."""
if jaxlib.version.__version_info__ < (0, 11):
    # Fused loops by LLVM alone instead of MLIR first. Later XLAs end at an option they don't have.
    QUICK_OPTIONS["xla_cpu_use_fusion_emitters"] = False

QUICK_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK_OPTIONS.items())
"""As `XLA_FLAGS`, for processes that are started with flags of their own."""

as_users_do = partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 3,
        "xla_llvm_disable_expensive_passes": False,
        "xla_cpu_parallel_codegen_split_count": 32,
    }
    | {name: True for name in QUICK_OPTIONS if name == "xla_cpu_use_fusion_emitters"},
)
"""`jax.jit` with XLA's defaults."""

for_long_loops = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})
"""`jax.jit` for small programs whose loops are long: they run several times faster."""

unfused = partial(jax.jit, compiler_options={"xla_disable_hlo_passes": "fusion"})
"""`jax.jit` for long programs without loops, whose chains of elementwise work XLA for CPUs would
fuse, with all that comes before copied into each: five times quicker to compile."""

LARGEST = 1 << 30
"""Bytes of programs that are kept between runs; those used longest ago go first."""
ROOM = 1 << 30
"""Bytes that must be free where they are kept."""


def set_up(devices: int) -> None:
    """Compiles quickly for so many virtual devices, and keeps what is compiled unless
    `JAX_COMPILATION_CACHE_DIR` says where. Before JAX's first array; child processes inherit it."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags += [f"--xla_force_host_platform_device_count={devices}", *QUICK_FLAGS.split()]
    os.environ["XLA_FLAGS"] = " ".join(dict.fromkeys(flags))  # a worker has inherited them
    options = {"jax_traceback_in_locations_limit": 0}  # else each instruction has 100 frames
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        options |= {
            "jax_compilation_cache_dir": str(_lasting_folder() or _temporary_folder()),
            "jax_persistent_cache_min_compile_time_secs": 0,
            "jax_persistent_cache_min_entry_size_bytes": 0,
        }
    for name, value in options.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


def _lasting_folder() -> Path | None:
    """`~/.cache/rwkv_jax/tests/KEY`; None where it cannot be written or the disk is full."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        root = root / "rwkv_jax" / "tests"
        folder = root / _key()
        folder.mkdir(parents=True, exist_ok=True)
        trim(root, LARGEST)
        with tempfile.TemporaryFile(dir=folder):
            return folder if shutil.disk_usage(folder).free > ROOM else None
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None


def _temporary_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="rwkv_jax_tests_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def trim(root: Path, largest: int) -> None:
    """Deletes files below `root`, those used longest ago first, until `largest` bytes are left."""
    found = []
    for path in root.rglob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another run deletes, too
            status = path.stat()
            found.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    excess = sum(size for _, size, _ in found) - largest
    for _, size, path in sorted(found):
        if excess <= 0:
            break
        path.unlink(missing_ok=True)
        excess -= size


def _key() -> str:
    """Of versions, flags, and the CPU: JAX's own keys do not say what CPU a program is for."""
    cpu: list[str] = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        cpu += [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    parts = [jax.__version__, jaxlib.__version__, platform.python_version()]
    parts += [os.environ["XLA_FLAGS"], platform.machine(), platform.processor(), *cpu]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
