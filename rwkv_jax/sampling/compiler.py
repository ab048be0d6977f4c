"""Compiler options of decoding, which depend on the version of jaxlib."""

from functools import cache, wraps
from typing import Any

import jax

from rwkv_jax.typing import Callable

FEW_ROWS = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""CPU: no YNNPACK fusions. jaxlib 0.10 applies them to every reduction, and for a single token they
cost 13 of 37 ms at the 0.1B shape. For many rows its matrix products are the faster ones."""

MANY = 8
"""Rows from which these options are not used."""


@cache
def _options() -> dict[str, str]:
    """`FEW_ROWS` on CPU if jaxlib knows it, else no options."""
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x, compiler_options=FEW_ROWS).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return FEW_ROWS


def jit_by_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` of `function(params, decoding, ...)` with `cfg` static and the options for as many
    rows as `decoding` has.

    They are determined at the first call, as importing a module must not start a backend.
    """

    @cache
    def jitted(many: bool):
        options = {} if many else _options()
        return jax.jit(function, static_argnames="cfg", compiler_options=options)

    @wraps(function)
    def call(params: Any, decoding: Any, *args: Any, **kwargs: Any) -> Any:
        return jitted(len(decoding.done) >= MANY)(params, decoding, *args, **kwargs)

    return call
