"""The protocol that every implementation follows, and the precision it computes in."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from rwkv_jax.typing import Array, Bool


@runtime_checkable
class Form(Protocol):
    """One implementation of one operator: `y` and the state after the last token.

    `x` is the version's `Inputs`, with every array of full rank and zeros in the padding. The state
    is a `Wkv4State` of [b, c] for version 4, else [b, h, v, k]; it is float32, or float64 if any
    input is.
    """

    def __call__(
        self, x: Any, state: Any, reset: Bool[Array, "b t"] | None, /
    ) -> tuple[Array, Any]: ...


def compute_dtype(*inputs: Any) -> Any:
    """float64 if any input is, else float32."""
    wide = any(x.dtype == jnp.float64 for x in jax.tree.leaves(inputs))
    return jnp.float64 if wide else jnp.float32


def in_compute_dtype(form: Form) -> Form:
    """`form` with all inputs cast to `compute_dtype`, and `y` cast back to the dtype of `v`."""

    def run(x: Any, state: Any, reset: Bool[Array, "b t"] | None, /) -> tuple[Array, Any]:
        dtype = compute_dtype(x, state)

        def cast(z: Array) -> Array:
            return z.astype(dtype) if jnp.issubdtype(z.dtype, jnp.floating) else z

        y, after = form(jax.tree.map(cast, x), jax.tree.map(cast, state), reset)
        return y.astype(x.v.dtype), after

    return run
