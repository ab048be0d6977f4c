"""How far an answer may be from its oracle: the one place that says so.

The measure is the relative RMS error `rms(actual - expected) / rms(expected)`, which does not
depend on scale or shape. The bars are one and a half to ten times what correct implementations
measure against a float64 recurrence, in typical regimes and at the extremes of the decay; they are
never relaxed to make a change pass.
"""

import numpy as np

GOLDEN_LOGITS = 5e-5
"""Largest absolute difference from the logits of official code, float32, logits of order one."""

PEFT_LOGITS = 1e-4
"""Largest difference from the logits that `peft` gives with an adapter, over the largest of them
(at most 8e-6 measured)."""

MODEL_RMS = 5e-5
"""Relative RMS error between two float32 orders of the same whole model, its gradients included:
group norms of random weights multiply rounding (at most 1.7e-5 measured, version 5.1)."""

MODEL_BFLOAT16 = 2e-2
"""Relative RMS error of a whole model that computes in bfloat16."""

KERNEL_BFLOAT16 = 3e-2
"""Relative RMS error of kernels that multiply in bfloat16: scaled tokens and states are rounded
before each product. Typical inputs measure 3e-3 to 8e-3; where the same key comes again and again,
what is removed is as large as what is there, and it is 2e-2."""

CHANNEL = 1e-4
"""Relative error of one channel's gradient of a parameter, a sum over tokens whose terms may nearly
cancel (at most 2e-5 measured)."""

MEASURED_LENGTH = 4096


def bar(dtype, length: int = MEASURED_LENGTH) -> float:
    """Relative RMS error allowed after `length` tokens, from the unit of rounding eps of `dtype`.

    A token's own roundings are a fixed number; what a state gathers from independent ones grows as
    a random walk: eps (28 + 7/8 sqrt(length)), at 4096 tokens 1e-5 for float32.
    bfloat16 is how results are stored, once rounded: nothing accumulates in it.
    """
    if np.dtype(dtype).name == "bfloat16":
        return 2.0**-8 + bar("float32", length)
    return float(np.finfo(dtype).eps) * (28 + 7 / 8 * length**0.5)


def relative_rms(actual, expected) -> float:
    """The relative RMS error, computed in float64; the plain RMS where `expected` is all zero."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {actual.shape}, expected {expected.shape}")
    if not expected.size:
        return 0.0
    scale = np.sqrt(np.mean(expected**2))
    return float(np.sqrt(np.mean((actual - expected) ** 2)) / (scale if scale else 1.0))


def assert_close(actual, expected, dtype, length: int = MEASURED_LENGTH, *, name: str = "") -> None:
    """Fails, with the error and its bar, where `actual` is further from `expected` than allowed."""
    error, allowed = relative_rms(actual, expected), bar(dtype, length)
    # Written so that a NaN fails.
    assert error <= allowed, f"{name or 'array'}: relative RMS error {error:.2e}, bar {allowed:.0e}"
