"""The protocol that every implementation follows, and the precision it computes in."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from rwkv_jax.typing import Array, Bool, Float

Starts = Bool[Array, "b t"] | None
"""Where documents start."""
Output = Float[Array, "b t h v"]
"""`y` of versions 5 to 7."""
State = Float[Array, "b h v k"]
"""The state of versions 5 to 7; that of version 4 is `Wkv4State`."""


@runtime_checkable
class Form(Protocol):
    """One implementation of one operator: `y` and the state after the last token.

    `x` is the version's `Inputs`, with every array of full rank and zeros in the padding. The state
    is float32, or float64 if any input is.
    """

    def __call__(self, x: Any, state: Any, reset: Starts, /) -> tuple[Array, Any]: ...


def is_concrete(x: Any) -> bool:
    """Whether this process has all of the array's values: no tracer, no part of it elsewhere."""
    return not isinstance(x, Tracer) and getattr(x, "is_fully_addressable", True)


def check_lengths(called: str, lengths: Any, time: int) -> None:
    """Raises `ValueError` for lengths beyond the tokens, where they are concrete."""
    if not is_concrete(lengths):
        return
    counts = np.asarray(lengths)
    if (odd := counts[(counts < 0) | (counts > time)]).size:
        raise ValueError(f"{called} must be 0 to {time}, the number of tokens, got {odd[0]}")


def compute_dtype(*inputs: Any) -> Any:
    """float64 if any input is, else float32."""
    wide = any(x.dtype == jnp.float64 for x in jax.tree.leaves(inputs))
    return jnp.float64 if wide else jnp.float32


def in_compute_dtype(form: Form) -> Form:
    """`form` with all inputs cast to `compute_dtype`, and `y` cast back to the dtype of `v`, unless
    it is float64."""

    def run(x: Any, state: Any, reset: Starts, /) -> tuple[Array, Any]:
        dtype = compute_dtype(x, state)

        def cast(z: Array) -> Array:
            return z.astype(dtype) if jnp.issubdtype(z.dtype, jnp.floating) else z

        y, after = form(jax.tree.map(cast, x), jax.tree.map(cast, state), reset)
        return y if dtype == jnp.float64 else y.astype(x.v.dtype), after

    return run
