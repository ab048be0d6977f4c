"""Where the command lines keep compiled programs, so that the second start compiles nothing."""

from pathlib import Path

import jax


def keep_compiled_programs(cache: Path) -> None:
    """Keeps them below `cache`, the folder of the token cache, unless JAX is told of a place.

    For scripts that run as programs only: it sets JAX's configuration.
    """
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(cache / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
