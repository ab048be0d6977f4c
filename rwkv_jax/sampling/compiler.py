"""Compiler options of decoding, which depend on the CPU and the version of jaxlib."""

import math
from contextlib import suppress
from functools import cache, wraps
from pathlib import Path
from typing import Any

import jax

from rwkv_jax.typing import Callable

NO_YNNPACK = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""CPU: products by Eigen. jaxlib 0.10 uses YNNPACK, which on x86 CPUs with AVX-512 is the faster
one for many rows and the slower one for few, and on those without never the faster one."""

MANY = 8
"""Rows from which YNNPACK's products are used, except on CPUs where Eigen's are always faster."""

CPU_INFO = Path("/proc/cpuinfo")


@cache
def ynnpack_rows() -> int | float:
    """`MANY`, or infinity on a CPU with AVX2 and without AVX-512 (known on Linux)."""
    with suppress(OSError):
        features = CPU_INFO.read_bytes().split()
        if b"avx2" in features and b"avx512f" not in features:
            return math.inf
    return MANY


@cache
def _options() -> dict[str, str]:
    """`NO_YNNPACK` on CPU if jaxlib knows it, else no options."""
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x, compiler_options=NO_YNNPACK).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return NO_YNNPACK


def jit_by_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` of `function(params, decoding, ...)` with `cfg` static and the options for as many
    rows as `decoding` has.

    They are determined at the first call, as importing a module must not start a backend.
    """

    @cache
    def jitted(ynnpack: bool):
        options = {} if ynnpack else _options()
        return jax.jit(function, static_argnames="cfg", compiler_options=options)

    @wraps(function)
    def call(params: Any, decoding: Any, *args: Any, **kwargs: Any) -> Any:
        return jitted(len(decoding.done) >= ynnpack_rows())(params, decoding, *args, **kwargs)

    return call
