"""Where the command lines keep compiled programs, so that the second start compiles nothing."""

import os
from pathlib import Path

import jax


def keep_compiled_programs(cache: Path) -> None:
    """Keeps them below `cache`, the folder of the token cache, if that can be written.

    Does nothing where JAX_COMPILATION_CACHE_DIR says where, or (empty) that nothing is kept. For
    scripts that run as programs only: it sets JAX's configuration.
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
