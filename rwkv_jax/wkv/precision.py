"""What the operators compute in, whatever the type of their inputs."""

from typing import Any

import jax
import jax.numpy as jnp

from rwkv_jax.typing import Array, Callable


def precision(*inputs: Any) -> Any:
    """float64 if there is any, float32 for everything else."""
    wide = any(x.dtype == jnp.float64 for x in jax.tree.leaves(inputs))
    return jnp.float64 if wide else jnp.float32


def computed(form: Callable[..., Any], *, v: int) -> Callable[..., Any]:
    """`form` in that precision, `y` in the type of its argument number `v`."""

    def run(*given: Any) -> tuple[Array, Any]:
        dtype = precision(given)

        def cast(x: Array) -> Array:
            return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

        y, after = form(*jax.tree.map(cast, given))
        return y.astype(given[v].dtype), after

    return run
