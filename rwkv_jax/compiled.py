"""The command lines' cache of compiled programs: the second start compiles nothing."""

import os
from pathlib import Path

import jax


def keep_compiled_programs(cache: Path) -> None:
    """Caches compiled programs below `cache`, the folder of the token cache, if it is writable.

    Does nothing if JAX_COMPILATION_CACHE_DIR is set (empty: no cache). For entry points of programs
    only: it sets JAX's configuration.
    """
    folder = cache / "compiled"
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
