"""Values, states and all gradients against float64: every version, implementation, dtype and
length, in every hard regime and with every pattern of resets."""

import itertools

import jax
import pytest
from compiling import as_users_do
from wkv import accuracy
from wkv.operators import VERSIONS


def cases():
    """All of them. The quick suite has every implementation of each version in float32 at the
    longest length; of `chunked` also one token and a whole chunk, and for version 7 every dtype."""
    for name, form, dtype, length in itertools.product(
        VERSIONS, accuracy.FORMS, accuracy.DTYPES, accuracy.LENGTHS
    ):
        longest, single, trains = length == "3 C + 5", dtype == "float32", form == "chunked"
        edges = trains and length in ("1", "C")
        quick = form is not None and single and (longest or edges) and name != "5"
        quick |= longest and trains and name == "7"
        yield pytest.param(
            *(VERSIONS[name], form, dtype, length),
            id=f"wkv{name}-{form}-{dtype}-{length}".replace(" ", ""),
            marks=() if quick else pytest.mark.slow,
        )


@pytest.mark.parametrize(("version", "implementation", "dtype", "length"), [*cases()])
def test_against_float64(version, implementation, dtype, length):
    shape = accuracy.shape_of(version, implementation, length)
    jit = as_users_do if length == "3 C + 5" and dtype == "float32" else jax.jit
    wrong = [
        f"{regime}, resets {pattern}: {name} {error:.1e}, bar {allowed:.1e}"
        for regime, pattern, found in accuracy.errors(version, implementation, dtype, shape, jit)
        for name, (error, allowed) in found.items()
        if not error <= allowed  # written so that a NaN fails
    ]
    assert not wrong, f"{len(wrong)} arrays, {shape}:\n" + "\n".join(wrong[:20])
