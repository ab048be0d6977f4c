"""How far an answer may be from its oracle: the one place that says so.

The measure is the relative RMS error `rms(actual - expected) / rms(expected)`, which does not
depend on scale or shape. The bars are three to ten times what correct implementations measure
against a float64 recurrence over 4096 tokens, in typical regimes and at the extremes of the decay;
they are never relaxed to make a change pass.
"""

import numpy as np

GOLDEN_LOGITS = 5e-5
"""Largest absolute difference from the logits of official code, float32, logits of order one."""

MODEL_RMS = 5e-5
"""Relative RMS error between two float32 orders of the same whole model, its gradients included:
group norms of random weights multiply rounding (at most 1.7e-5 measured, version 5.1)."""

RELATIVE_RMS = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2}
"""Bar by the type of the computation, for up to `MEASURED_LENGTH` tokens."""

ADVERSARIAL_BFLOAT16 = 4e-2
"""bfloat16 where keys nearly repeat and nothing decays: rounding of the inputs adds up."""

MEASURED_LENGTH = 4096


def bar(dtype, length: int = MEASURED_LENGTH, *, adversarial: bool = False) -> float:
    """Relative RMS error allowed for `dtype` over `length` tokens.

    Rounding errors of independent steps add up as a random walk: past the measured length the bar
    grows with the square root of the length.
    """
    name = np.dtype(dtype).name
    allowed = RELATIVE_RMS[name]
    if adversarial and name == "bfloat16":
        allowed = ADVERSARIAL_BFLOAT16
    return allowed * max(1.0, length / MEASURED_LENGTH) ** 0.5


def relative_rms(actual, expected) -> float:
    """The relative RMS error, computed in float64; the plain RMS where `expected` is all zero."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {actual.shape}, expected {expected.shape}")
    if not expected.size:
        return 0.0
    scale = np.sqrt(np.mean(expected**2))
    return float(np.sqrt(np.mean((actual - expected) ** 2)) / (scale if scale else 1.0))


def assert_close(
    actual,
    expected,
    dtype,
    length: int = MEASURED_LENGTH,
    *,
    adversarial: bool = False,
    name: str = "",
) -> None:
    """Fails, with the error and its bar, where `actual` is further from `expected` than allowed."""
    error, allowed = relative_rms(actual, expected), bar(dtype, length, adversarial=adversarial)
    # Written so that a NaN fails.
    assert error <= allowed, f"{name or 'array'}: relative RMS error {error:.2e}, bar {allowed:.0e}"
