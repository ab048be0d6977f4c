"""Values, states and all gradients against float64: every version, implementation, dtype and
length, in every hard regime and with every pattern of resets."""

import itertools

import jax
import pytest
from compiling import as_users_do, for_long_loops
from wkv import accuracy
from wkv.operators import VERSIONS


def cases():
    """All of them. The quick suite has every implementation of each version in float32 at the
    longest length; of `chunked` also one token and a whole chunk, and for version 7 every dtype.

    The longest length in float32 is compiled as users do, quickly only for `chunked`.
    """
    for name, dtype, length, form in itertools.product(
        VERSIONS, accuracy.DTYPES, accuracy.LENGTHS, accuracy.FORMS
    ):
        longest, single, trains = length == "3 C + 5", dtype == "float32", form == "chunked"
        edges = trains and length in ("1", "C")
        quick = form is not None and single and (longest or edges) and name != "5"
        quick |= longest and trains and name == "7"
        case = VERSIONS[name], form, dtype, length
        slow = () if quick else pytest.mark.slow
        title = f"wkv{name}-{form}-{dtype}-{length}".replace(" ", "")
        if not (longest and single):
            yield pytest.param(*case, jax.jit, id=title, marks=slow)
        elif trains:
            yield pytest.param(*case, as_users_do, id=title, marks=slow)
        else:
            jit = for_long_loops if form == "scan" else jax.jit
            yield pytest.param(*case, jit, id=title, marks=slow)
            yield pytest.param(*case, as_users_do, id=f"{title}-optimised", marks=pytest.mark.slow)


@pytest.mark.parametrize(("version", "implementation", "dtype", "length", "jit"), [*cases()])
def test_against_float64(version, implementation, dtype, length, jit):
    shape = accuracy.shape_of(version, implementation, length)
    wrong = [
        f"{regime}, resets {pattern}: {name} {error:.1e}, bar {allowed:.1e}"
        for regime, pattern, found in accuracy.errors(version, implementation, dtype, shape, jit)
        for name, (error, allowed) in found.items()
        if not error <= allowed  # written so that a NaN fails
    ]
    assert not wrong, f"{len(wrong)} arrays, {shape}:\n" + "\n".join(wrong[:20])
