"""The operators' errors against float64: one function for all cases.

A case is a version, an implementation, a dtype, a length, a regime and a pattern of resets. The
errors are of y, the final state and the gradients of all inputs and of the initial state.
"""

import functools
import itertools
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tolerances import KERNEL_BFLOAT16, bar, relative_rms
from wkv.operators import Version, compiled, cotangents, forward

from rwkv_jax import testing
from rwkv_jax.wkv import IMPLEMENTATIONS, KERNELS
from rwkv_jax.wkv.operator import HOPPER
from rwkv_jax.wkv.v4 import chunked as v4_chunked
from rwkv_jax.wkv.v6 import associative as v6_associative
from rwkv_jax.wkv.v6 import chunked as v6_chunked
from rwkv_jax.wkv.v7 import chunked as v7_chunked

DTYPES = ("float32", "bfloat16", "float64")
FORMS = (None, *IMPLEMENTATIONS)
"""None is the default, without a gradient; with one it is `chunked`."""
LENGTHS = {
    "1": lambda chunk: 1,
    "C - 1": lambda chunk: chunk - 1,
    "C": lambda chunk: chunk,
    "C + 1": lambda chunk: chunk + 1,
    "3 C + 5": lambda chunk: 3 * chunk + 5,
}

_CHUNKS = {"4": v4_chunked.CHUNK, "6": v6_chunked.CHUNK, "7": v7_chunked.CHUNK}


def shape_of(version: Version, implementation: str | None, length: str) -> testing.Shape:
    """Two rows of two heads, with a length relative to the implementation's chunk; the longest case
    has heads of the official size."""
    number = "6" if version.name == "5" else version.name
    chunk = _CHUNKS[number]
    if implementation in KERNELS:
        chunk = 64 if implementation == "pallas_tpu" and number != "4" else 16
    if number == "6" and implementation == "associative":
        chunk = v6_associative.CHUNK
    return testing.Shape(2, LENGTHS[length](chunk), 2, 64 if length == "3 C + 5" else 16)


def errors(
    version: Version,
    implementation: str | None,
    dtype: str,
    shape: testing.Shape,
    jit=jax.jit,
    patterns: tuple[str, ...] = testing.RESETS,
) -> Iterator[tuple[str, str, dict[str, tuple[float, float]]]]:
    """(regime, resets, {array: (error, bar)}) for every regime and pattern of resets."""
    with jax.enable_x64(dtype == "float64"):
        for regime, pattern in itertools.product(version.regimes, patterns):
            case = version, dtype, shape, regime, pattern
            given, start, reset, expected, scale, slack = _case(*case)
            if implementation is None:
                out, after = forward(version, None, jit)(given, start, reset)
                actual = {"y": out} | version.final(after, scale)
            else:
                dy, dfinal, exact = _gradients(*case)
                values, gradients = compiled(version, implementation, jit)(
                    given, start, reset, scale, dy, dfinal
                )
                actual = values | {f"d {name}": x for name, x in gradients.items()}
                expected = expected | {f"d {name}": x for name, x in exact.items()}
            assert actual.keys() == expected.keys()
            found = {}
            for name, x in expected.items():
                # Where a gradient is zero, the oracle may hold its own rounding errors.
                x = x if np.abs(x).max() > 1e-14 else np.zeros_like(x)
                stored = dtype if actual[name].dtype == jnp.bfloat16 else _wide(dtype)
                assert actual[name].dtype == stored, f"{name} is {actual[name].dtype}"
                allowed = slack * bar(stored, shape.time)
                multiplies = implementation in (*KERNELS, HOPPER) and version.name != "4"
                if multiplies and dtype == "bfloat16":
                    allowed = KERNEL_BFLOAT16
                found[name] = relative_rms(np.asarray(actual[name], np.float64), x), allowed
            yield regime, pattern, found


_kept = functools.lru_cache(maxsize=64)
"""What does not depend on the implementation is computed once for those that come together."""


@_kept
def _case(version: Version, dtype: str, shape: testing.Shape, regime: str, pattern: str):
    """Inputs, initial state, resets; the oracle's results, the scale of its state, the slack."""
    inputs, state = version.inputs(regime, shape), version.state(shape)
    reset = testing.reset_pattern(pattern, shape, seed=1)
    given = {name: _typed(name, x, dtype) for name, x in inputs.items()}
    y, final, scale = version.expected(_exact(given), state, reset)
    start, scale = jax.tree.map(partial(np.asarray, dtype=_wide(dtype)), (state, scale))
    return given, start, reset, {"y": y} | final, scale, _slack(inputs)


@_kept
def _gradients(version: Version, dtype: str, shape: testing.Shape, regime: str, pattern: str):
    """Cotangents, and the oracle's gradients with them."""
    given, _, reset, expected, scale, _ = _case(version, dtype, shape, regime, pattern)
    final = {name: x for name, x in expected.items() if name != "y"}
    dy, dfinal = cotangents(version, shape, final)
    dy = _typed("y", dy, dtype)
    dfinal = jax.tree.map(partial(np.asarray, dtype=_wide(dtype)), dfinal)
    exact = version.gradients(
        _exact(given), version.state(shape), reset, np.asarray(dy, np.float64), dfinal, scale
    )
    return dy, dfinal, exact


def _wide(dtype: str) -> str:
    """The type of states, and of results that are not stored in fewer bits."""
    return "float64" if dtype == "float64" else "float32"


def _exact(given: dict[str, np.ndarray | jax.Array]) -> dict[str, np.ndarray]:
    return {name: np.asarray(x, np.float64) for name, x in given.items()}


def _typed(name: str, x: np.ndarray, dtype: str) -> np.ndarray | jax.Array:
    """Decays and bonuses of bfloat16 models are float32, as all states are."""
    if dtype == "bfloat16" and name in ("log_w", "u"):
        return x
    return jnp.asarray(x, dtype)


def _slack(inputs: dict[str, np.ndarray]) -> float:
    """The factor on the bar for large exponents: rounding x is a relative error of |x| eps in e^x.

    Version 4 keeps its sums as a mantissa and an exponent as large as the largest key.
    """
    return max(1.0, np.abs(inputs["k"]).max() / 2) if inputs["k"].ndim == 3 else 1.0
