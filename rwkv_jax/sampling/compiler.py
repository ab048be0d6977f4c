"""Compiler options of decoding, which depend on the version of jaxlib."""

from functools import cache, wraps
from typing import Any

import jax

from rwkv_jax.typing import Callable

SINGLE_TOKEN = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""CPU: no YNNPACK fusions. jaxlib 0.10 applies them to every reduction, and for a single token they
cost 13 of 37 ms at the 0.1B shape."""


@cache
def _options() -> dict[str, str]:
    """`SINGLE_TOKEN` on CPU if jaxlib knows it, else no options."""
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x, compiler_options=SINGLE_TOKEN).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return SINGLE_TOKEN


def jit_for_decoding(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` with `cfg` static and the options for single tokens.

    They are determined at the first call, as importing a module must not start a backend.
    """

    @cache
    def jitted():
        return jax.jit(function, static_argnames="cfg", compiler_options=_options())

    return wraps(function)(lambda *args, **kwargs: jitted()(*args, **kwargs))
