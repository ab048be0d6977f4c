"""One table of the operators' versions for the tests, and their compiled calls."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from rwkv_jax import testing
from rwkv_jax.wkv import (
    IMPLEMENTATIONS,
    Wkv4State,
    wkv4,
    wkv4_step,
    wkv6,
    wkv6_step,
    wkv7,
    wkv7_step,
)
from rwkv_jax.wkv.v7 import STRONGEST

LONG, SMALL = testing.Shape(2, 200, 2, 64), testing.Shape(2, 101, 2, 8)
"""Both span several chunks of any implementation, and end inside one."""


@dataclass(frozen=True)
class Version:
    """One operator. Final states are compared gauge-free: version 4's as sums over e^scale."""

    name: str
    regimes: tuple[str, ...]
    inputs: Callable
    state: Callable
    call: Callable  # (inputs, state, reset, implementation) -> y, state
    final: Callable  # (state, scale) -> named arrays
    expected: Callable  # (inputs, state, reset) -> y, named arrays, scale
    gradients: (
        Callable  # (inputs, state, reset, dy, cotangents of `final`, scale) -> named gradients
    )
    step: Callable  # (inputs of one token, state) -> y, state
    operator: Callable


def _call4(inputs, state, reset, implementation):
    state = None if state is None else Wkv4State(*state)
    return wkv4(**inputs, state=state, reset=reset, implementation=implementation)


def _final4(state, scale):
    factor = jnp.exp(state.max_exp - scale)
    return {"final N": state.num * factor, "final D": state.den * factor}


def _expected4(inputs, state, reset):
    sums = None if state is None else oracles.wkv4_sums(*state)
    y, (n, d) = oracles.wkv4(**inputs, sums=sums, reset=reset)
    scale = np.log(d).astype(np.float32)
    factor = np.exp(-scale.astype(np.float64))
    return y, {"final N": n * factor, "final D": d * factor}, scale


def _gradients4(inputs, state, reset, dy, dfinal, scale):
    factor = np.exp(-scale.astype(np.float64))
    dsums = dfinal["final N"] * factor, dfinal["final D"] * factor
    grads = oracles.wkv4_grad(
        **inputs, sums=oracles.wkv4_sums(*state), reset=reset, dy=dy, dsums=dsums
    )
    weight = np.exp(state[2].astype(np.float64))
    return grads | {"num": grads.pop("N") * weight, "den": grads.pop("D") * weight}


def _call6(inputs, state, reset, implementation):
    return wkv6(**inputs, state=state, reset=reset, implementation=implementation)


def _expected6(inputs, state, reset):
    y, state = oracles.wkv6(**inputs, state=state, reset=reset)
    return y, {"final state": state}, np.zeros((), np.float32)


def _gradients6(inputs, state, reset, dy, dfinal, scale):
    dstate = dfinal["final state"]
    grads = oracles.wkv6_grad(**inputs, state=state, reset=reset, dy=dy, dstate=dstate)
    del grads["initial"]
    return grads


def _step6(r, log_w, k, v, u, state):
    return wkv6_step(r, jnp.broadcast_to(log_w, r.shape), k, v, u, state)


mild_wkv7 = functools.wraps(wkv7)(functools.partial(wkv7, log_w_min=STRONGEST))


def _call7(inputs, state, reset, implementation, operator=mild_wkv7):
    return operator(**inputs, state=state, reset=reset, implementation=implementation)


def _expected7(inputs, state, reset):
    y, state = oracles.wkv7(**inputs, state=state, reset=reset)
    return y, {"final state": state}, np.zeros((), np.float32)


def _gradients7(inputs, state, reset, dy, dfinal, scale):
    dstate = dfinal["final state"]
    grads = oracles.wkv7_grad(**inputs, state=state, reset=reset, dy=dy, dstate=dstate)
    del grads["initial"]
    return grads


VERSIONS = {
    "4": Version(
        "4",
        testing.WKV4_REGIMES,
        testing.wkv4_inputs,
        testing.wkv4_state,
        _call4,
        _final4,
        _expected4,
        _gradients4,
        lambda state, **token: wkv4_step(**token, state=Wkv4State(*state)),
        wkv4,
    ),
    "5": Version(
        "5",
        testing.WKV6_REGIMES,
        testing.wkv5_inputs,
        testing.matrix_state,
        _call6,
        lambda state, scale: {"final state": state},
        _expected6,
        _gradients6,
        _step6,
        wkv6,
    ),
    "6": Version(
        "6",
        testing.WKV6_REGIMES,
        testing.wkv6_inputs,
        testing.matrix_state,
        _call6,
        lambda state, scale: {"final state": state},
        _expected6,
        _gradients6,
        _step6,
        wkv6,
    ),
    "7": Version(
        "7",
        testing.WKV7_REGIMES,
        testing.wkv7_inputs,
        testing.matrix_state,
        _call7,
        lambda state, scale: {"final state": state},
        _expected7,
        _gradients7,
        wkv7_step,
        mild_wkv7,
    ),
}
ANY_DECAY = replace(VERSIONS["7"], call=functools.partial(_call7, operator=wkv7), operator=wkv7)
"""Version 7 without a promise of mild decays, which all regimes keep; it compiles a second form."""

every_implementation = pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(name, marks=() if name == "chunked" else pytest.mark.slow)
        for name in IMPLEMENTATIONS
    ],
)
"""The others are slow tests, but for `test_accuracy.py`, which always runs all of them."""
DISTINCT = [version for name, version in VERSIONS.items() if name != "5"]
"""Version 5 is version 6 with one decay for all tokens; a test of its own has the difference."""


def quickly(*names):
    """Every version; the ones that are not named are slow tests."""
    return pytest.mark.parametrize(
        "version",
        [pytest.param(x, marks=() if x.name in names else pytest.mark.slow) for x in DISTINCT],
        ids=lambda version: f"wkv{version.name}",
    )


every_version = quickly(*(version.name for version in DISTINCT))


@functools.cache
def compiled(version, implementation, jit=jax.jit):
    """(inputs, state, reset, scale, dy, dfinal) -> all values and gradients, in one program."""

    @jit
    def everything(inputs, state, reset, scale, dy, dfinal):
        def run(inputs, state):
            y, after = version.call(inputs, state, reset, implementation)
            return {"y": y} | version.final(after, scale)

        values, pull_back = jax.vjp(run, inputs, state)
        dinputs, dstate = pull_back({"y": dy} | dfinal)
        dstate = {"num": dstate[0], "den": dstate[1]} if version.name == "4" else {"state": dstate}
        return values, dinputs | dstate

    return everything


@functools.cache
def forward(version, implementation, jit=jax.jit):
    """(inputs, state, reset) -> y and the raw state; state and reset may be None."""
    return jit(lambda inputs, state, reset: version.call(inputs, state, reset, implementation))


def cotangents(version, shape, final, seed=0):
    rng = np.random.default_rng([seed, 2])
    size = (shape.batch, shape.time, shape.width) if version.name == "4" else shape.heads_shape
    dfinal = {name: rng.normal(size=x.shape).astype(np.float32) for name, x in final.items()}
    return rng.normal(size=size).astype(np.float32), dfinal


def per_token(x):
    """Whether an input has a time axis, unlike u and the log_w of versions 4 and 5."""
    return x.ndim > 2
