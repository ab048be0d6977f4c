"""The operators under JAX's transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import relative_rms
from wkv.operators import ANY_DECAY, quickly

from rwkv_jax import testing
from rwkv_jax.wkv import IMPLEMENTATIONS, Wkv4State

slow = pytest.mark.slow
chunked_and_slowly_others = pytest.mark.parametrize(
    "implementation",
    ["chunked", *(pytest.param(x, marks=slow) for x in (None, *IMPLEMENTATIONS) if x != "chunked")],
)
"""The others are differentiated by JAX itself, or by the code of `chunked`."""
default_and_slowly_others = pytest.mark.parametrize(
    "implementation", [None, *(pytest.param(x, marks=slow) for x in IMPLEMENTATIONS)]
)

TINY = testing.Shape(1, 37, 2, 4)


def problem(version, implementation):
    """A scalar function of all of an operator's inputs, in float64, and a point.

    The default, None, is asked as users do who know nothing about their decays.
    """
    if version.name == "7" and implementation is None:
        version = ANY_DECAY
    inputs, state = version.inputs("typical", TINY), version.state(TINY)
    inputs, state = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (inputs, state))
    state = Wkv4State(*state) if version.name == "4" else state
    reset = jnp.asarray(testing.reset_pattern("random", TINY, seed=3))

    def loss(x):
        y, after = version.operator(**x[0], state=x[1], reset=reset, implementation=implementation)
        if version.name == "4":
            after = (after.num / after.den,)
        return sum(jnp.sum(jnp.sin(z)) for z in jax.tree.leaves((y, after)))

    return loss, (inputs, state)


def directions(x):
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda z: jnp.asarray(rng.normal(size=z.shape)), x)


def inner(x, y):
    return sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (x, y)), strict=True))


def close(x, y, bound=1e-9):
    for a, b in zip(*map(jax.tree.leaves, (x, y)), strict=True):
        assert relative_rms(a, b) < bound


@default_and_slowly_others
@quickly("7")
def test_forward_mode_is_the_gradient(version, implementation):
    """Tangents along a direction, by `jvp` and by `linearize`."""
    with jax.enable_x64(True):
        loss, x = problem(version, implementation)
        v = directions(x)
        _, along = jax.jit(lambda x, v: jax.jvp(loss, (x,), (v,)))(x, v)
        assert np.isclose(along, inner(jax.jit(jax.grad(loss))(x), v), rtol=1e-9)
        if version.name == "7":
            linear = jax.jit(lambda x, v: jax.linearize(loss, x)[1](v))
            assert np.isclose(linear(x, v), along, rtol=1e-9)


@default_and_slowly_others
@quickly("7")
def test_mixed_partials(version, implementation):
    """The gradient of some inputs along a direction of others, in three orders of modes."""
    with jax.enable_x64(True):
        loss, (inputs, state) = problem(version, implementation)
        v = directions(inputs)["k"]

        def of(k, value):
            return loss((inputs | {"k": k, "v": value}, state))

        def forward_over_reverse(k, value):
            return jax.jvp(lambda k: jax.grad(of, 1)(k, value), (k,), (v,))[1]

        def reverse_over_forward(k, value):
            return jax.grad(lambda value: jax.jvp(lambda k: of(k, value), (k,), (v,))[1])(value)

        def reverse_over_reverse(k, value):
            return jax.grad(lambda value: jnp.vdot(jax.grad(of)(k, value), v))(value)

        at = inputs["k"], inputs["v"]
        expected = jax.jit(reverse_over_reverse)(*at)
        close(jax.jit(forward_over_reverse)(*at), expected)
        close(jax.jit(reverse_over_forward)(*at), expected)


@chunked_and_slowly_others
@quickly("7")
def test_gradients_of_gradients(version, implementation):
    """Reverse over reverse, and forward over reverse, against finite differences of gradients."""
    with jax.enable_x64(True):
        loss, x = problem(version, implementation)
        v = directions(x)
        gradient = jax.jit(jax.grad(loss))
        step = 1e-5
        ahead, behind = (jax.tree.map(lambda a, b, s=s: a + s * b, x, v) for s in (step, -step))
        differences = jax.tree.map(
            lambda a, b: (a - b) / (2 * step), gradient(ahead), gradient(behind)
        )
        curved = jax.jit(jax.grad(lambda x: inner(jax.grad(loss)(x), v)))(x)
        close(curved, differences, 1e-6)
        # Version 4's `max_exp` is a scale that its gradient by hand does not move.
        if version.name != "4":
            close(jax.jit(lambda x, v: jax.jvp(jax.grad(loss), (x,), (v,))[1])(x, v), curved)


@default_and_slowly_others
@quickly("7")
def test_mapped_tangents(version, implementation):
    """`vmap` around and inside of derivatives in both modes."""
    with jax.enable_x64(True):
        loss, (inputs, state) = problem(version, implementation)

        def of(value):
            return loss((inputs | {"v": value}, state))

        values = jnp.stack([inputs["v"], 2 * inputs["v"]])
        outside = jax.jit(jax.vmap(jax.grad(of)))(values)
        inside = jax.jit(jax.grad(lambda values: jnp.sum(jax.vmap(of)(values))))(values)
        close(inside, outside)

        def along(value):
            return jax.jvp(of, (value,), (value,))[1]

        expected = jnp.sum(outside * values, axis=range(1, values.ndim))
        close(jax.jit(jax.vmap(along))(values), expected)


@pytest.mark.parametrize(
    "mapped", ["r", *(pytest.param(x, marks=pytest.mark.slow) for x in ("log_w", "k", "v"))]
)
def test_one_argument_is_mapped(mapped):
    """The gradient of a `vmap` over one argument, on which not all results depend."""
    with jax.enable_x64(True):
        loss, (inputs, state) = problem(ANY_DECAY, None)

        def of(scale):
            return loss((inputs | {mapped: scale * inputs[mapped]}, state))

        scales = jnp.arange(1.0, 4.0)
        inside = jax.jit(jax.grad(lambda scales: jnp.sum(jax.vmap(of)(scales))))(scales)
        close(inside, jax.jit(lambda scales: jax.lax.map(jax.grad(of), scales))(scales))


@chunked_and_slowly_others
@quickly("7")
def test_checkpoint_and_scan(version, implementation):
    """Inside `jax.checkpoint` and `lax.scan` the gradient is the same."""
    with jax.enable_x64(True):
        loss, x = problem(version, implementation)
        plain = jax.jit(jax.grad(loss))(x)

        def twice(x):
            body = jax.checkpoint(lambda total, _: (total + loss(x), None))
            return jax.lax.scan(body, jnp.zeros(()), None, length=2)[0]

        for a, b in zip(*map(jax.tree.leaves, (jax.jit(jax.grad(twice))(x), plain)), strict=True):
            assert relative_rms(a, 2 * b) < 1e-12


@chunked_and_slowly_others
@quickly("6")
@pytest.mark.parametrize("mapped", ["one input", pytest.param("state", marks=slow)])
def test_vmap_over_one_of_all(version, implementation, mapped):
    """Other inputs need no copies: parameters shared by sequences, or one sequence with several
    states."""
    with jax.enable_x64(True):
        loss, (inputs, state) = problem(version, implementation)
        if mapped == "state":
            axes = {name: None for name in inputs}, 0
            rows = [(inputs, state), (inputs, directions(state))]
        else:
            name = "u" if "u" in inputs else "a"
            axes = {other: 0 if other == name else None for other in inputs}, None
            rows = [(inputs, state), (inputs | {name: 0.5 * inputs[name]}, state)]
        if mapped == "state" and version.name == "4":
            rows[1] = (inputs, Wkv4State(state.num + 1, state.den + 1, state.max_exp - 1))
        gradient = jax.grad(loss)
        pairs = jax.tree.map(lambda *x: jnp.stack(x), *rows)
        x = (
            {name: pairs[0][name] if axes[0][name] == 0 else inputs[name] for name in inputs},
            pairs[1] if axes[1] == 0 else state,
        )
        together = jax.jit(jax.vmap(gradient, in_axes=(axes,)))(x)
        alone = jax.jit(gradient)
        for i, row in enumerate(rows):
            for a, b in zip(*map(jax.tree.leaves, (together, alone(row))), strict=True):
                assert relative_rms(a[i], b) < 1e-10
