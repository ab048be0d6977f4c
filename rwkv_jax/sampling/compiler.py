"""How decoding is compiled: in one place, as the options depend on the version of jaxlib."""

from functools import cache, wraps
from typing import Any

import jax

from rwkv_jax.typing import Callable

SINGLE_TOKEN = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""CPU: no YNNPACK fusions. jaxlib 0.10 makes them of every reduction, and on the few numbers of one
token they cost 13 of 37 ms at the 0.1B shape."""


@cache
def _options() -> dict[str, str]:
    """`SINGLE_TOKEN`; nothing on other devices, and with a jaxlib that does not know it."""
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x, compiler_options=SINGLE_TOKEN).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return SINGLE_TOKEN


def jit_for_decoding(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` with `cfg` static, and the options that single tokens want.

    They are looked up at the first call: importing a module must not start a backend.
    """

    @cache
    def jitted():
        return jax.jit(function, static_argnames="cfg", compiler_options=_options())

    return wraps(function)(lambda *args, **kwargs: jitted()(*args, **kwargs))
