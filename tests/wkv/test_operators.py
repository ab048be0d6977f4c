"""The properties that all implementations of all WKV operators share: states, documents, padding,
causality, dtypes, messages. Their accuracy is tested in `test_accuracy.py`."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from tolerances import CHANNEL, assert_close
from wkv.operators import (
    ANY_DECAY,
    LONG,
    SMALL,
    VERSIONS,
    compiled,
    cotangents,
    every_implementation,
    every_version,
    forward,
    per_token,
    quickly,
)

from rwkv_jax import testing
from rwkv_jax.testing import leak_test
from rwkv_jax.wkv import IMPLEMENTATIONS, KERNELS, Wkv4State, wkv4, wkv7


@pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("scan", "associative") else ())
        for name in (None, *IMPLEMENTATIONS)
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [1, pytest.param(8, marks=pytest.mark.slow), 128])
@quickly("7")
def test_head_sizes(version, implementation, size):
    """Head sizes that `test_accuracy.py` lacks, and an odd number of heads."""
    shape = testing.Shape(1, 37, 3, size)
    inputs, state, reset = (
        version.inputs("typical", shape),
        version.state(shape),
        testing.reset_pattern("random", shape),
    )
    y, final, scale = version.expected(inputs, state, reset)
    dy, dfinal = cotangents(version, shape, final)
    gradients = version.gradients(inputs, state, reset, dy, dfinal, scale)
    values, dinputs = compiled(version, implementation, jax.jit)(
        inputs, state, reset, scale, dy, dfinal
    )
    expected = {"y": y} | final | {f"d {name}": x for name, x in gradients.items()}
    actual = values | {f"d {name}": x for name, x in dinputs.items()}
    for name, x in expected.items():
        assert_close(actual[name], x, "float32", name=name)


@every_implementation
@every_version
def test_no_state_and_no_reset_are_the_defaults(version, implementation):
    inputs = version.inputs("typical", SMALL)
    y, final, scale = version.expected(inputs, None, None)
    actual_y, after = forward(version, implementation)(inputs, None, None)
    assert_close(actual_y, y, "float32", name="y")
    for name, x in version.final(after, scale).items():
        assert_close(x, final[name], "float32", name=name)


def halves(inputs, cut):
    """The inputs of the first `cut` tokens, and of the others; inputs without time in both."""
    whole = {name: x for name, x in inputs.items() if not per_token(x)}
    first = {name: x[:, :cut] for name, x in inputs.items() if per_token(x)}
    second = {name: x[:, cut:] for name, x in inputs.items() if per_token(x)}
    return first | whole, second | whole


@every_implementation
@quickly("6")
@settings(max_examples=4)
@given(cut=st.integers(1, SMALL.time - 1), seed=st.integers(0, 99))
def test_cut_anywhere_and_carry_the_state(version, implementation, cut, seed):
    """Two calls that pass the state are one call; two with a fresh state are one with a reset."""
    inputs, run = version.inputs("typical", SMALL, seed), forward(version, implementation)
    whole, _, scale = version.expected(inputs, version.state(SMALL), None)
    reset = np.zeros((SMALL.batch, SMALL.time), bool)
    reset[:, cut] = True
    restarted, final, fresh_scale = version.expected(inputs, None, reset)

    first, second = halves(inputs, cut)
    y1, state = run(first, version.state(SMALL), None)
    y2, carried = run(second, state, None)
    assert_close(np.concatenate([y1, y2], 1), whole, "float32", name=f"y, cut at {cut}")
    _, expected, scale = version.expected(inputs, version.state(SMALL), None)
    for name, x in version.final(carried, scale).items():
        assert_close(x, expected[name], "float32", name=f"{name}, cut at {cut}")

    y2, fresh = run(second, None, None)
    assert_close(y2, restarted[:, cut:], "float32", name=f"y after a reset at {cut}")
    for name, x in version.final(fresh, fresh_scale).items():
        assert_close(x, final[name], "float32", name=f"{name}, fresh at {cut}")


@every_implementation
@quickly("7")
def test_states_pass_between_implementations(version, implementation):
    """Any implementation resumes from another's state, and gradients flow back through it."""
    inputs = version.inputs("typical", SMALL)
    y, final, scale = version.expected(inputs, None, None)
    dy, dfinal = cotangents(version, SMALL, final)
    dy, dfinal = (
        np.where(np.arange(SMALL.time).reshape(-1, *(1,) * (dy.ndim - 2)) < 70, 0, dy),
        jax.tree.map(np.zeros_like, dfinal),
    )
    fresh = jax.tree.map(np.zeros_like, version.state(SMALL))
    gradients = version.gradients(inputs, fresh, None, dy, dfinal, scale)

    @partial(jax.jit, static_argnums=(1, 2))
    def two_calls(inputs, one, other):
        def run(inputs):
            first, second = halves(inputs, 70)
            _, state = version.call(first, None, None, one)
            return version.call(second, state, None, other)[0]

        y2, pull_back = jax.vjp(run, inputs)
        return y2, pull_back(jnp.asarray(dy[:, 70:], jnp.float32))[0]

    for one, other in {
        ("scan", implementation),
        (implementation, "scan"),
        (implementation, implementation),
    }:
        y2, dinputs = two_calls(inputs, one, other)
        assert_close(y2, y[:, 70:], "float32", name=f"y, {one} then {other}")
        for name, x in dinputs.items():
            assert_close(x, gradients[name], "float32", name=f"d {name}, {one} then {other}")


@every_implementation
@every_version
def test_documents_do_not_see_each_other(version, implementation):
    """Bit-exactly, in outputs and in gradients."""
    inputs, state, shape = version.inputs("typical", LONG), version.state(LONG), LONG
    reset = np.zeros((shape.batch, shape.time), bool)
    reset[0, [40, 41, 133]] = reset[1, [0, 131]] = True
    shared = {name: x for name, x in inputs.items() if not per_token(x)}
    dy, _ = cotangents(version, shape, {})
    run = compiled(version, implementation)
    _, final, scale = version.expected(inputs, state, reset)
    nothing = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), final)

    def everything(inputs, reset):
        tokens, dy = inputs
        values, grads = run(tokens | shared, state, reset, scale, dy, nothing)
        return {"y": values["y"]} | {f"d {name}": grads[name] for name in tokens}

    tokens = {name: x for name, x in inputs.items() if per_token(x)}
    leak_test(everything, (tokens, dy), jnp.asarray(reset))


@every_implementation
@every_version
def test_padding_leaves_the_state_alone(version, implementation):
    """As if the padding were not there: its values, even NaN, change nothing bit-exactly and have
    no gradient."""
    inputs, state, lengths = version.inputs("typical", SMALL), version.state(SMALL), (37, 101)
    real = np.arange(SMALL.time)[None] < np.array(lengths)[:, None]
    reset = testing.reset_pattern("random", SMALL)
    reset[0, 60] = True  # in the padding: no document starts
    operator = partial(version.operator, implementation=implementation)
    given = Wkv4State(*state) if version.name == "4" else state

    def mask(x):
        return jnp.where(real.reshape(*real.shape, *(1,) * (x.ndim - 2)), x, 0)

    @jax.jit
    def run(inputs, state, reset, lengths):
        out, pull_back = jax.vjp(
            lambda x, state: operator(**x, state=state, reset=reset, lengths=lengths), inputs, state
        )
        return out, pull_back((mask(jnp.ones_like(out[0])), jax.tree.map(jnp.ones_like, out[1])))

    out, (grads, dstate) = run(inputs, given, reset, np.array(lengths))
    padded = {
        n: jnp.where(mask(jnp.ones_like(x)) == 0, jnp.nan, x) if per_token(x) else x
        for n, x in inputs.items()
    }
    same, gradients = run(padded, given, reset, np.array(lengths))
    before, after = (
        (mask(y), *rest) for (y, *rest) in ((*out, grads, dstate), (*same, *gradients))
    )
    for x, y in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        assert np.array_equal(x, y)
    assert all(np.array_equal(x, mask(x)) for x in grads.values() if per_token(x))

    _, state_after = out
    for row, length in enumerate(lengths):
        alone = {n: x[row : row + 1, :length] if per_token(x) else x for n, x in inputs.items()}
        mine = jax.tree.map(lambda x, row=row: x[row : row + 1], given)
        y, after = jax.jit(operator)(**alone, state=mine, reset=reset[row : row + 1, :length])
        assert_close(out[0][row, :length], y[0], "float32")
        for x, x1 in zip(*map(jax.tree.leaves, (state_after, after)), strict=True):
            assert_close(x[row], x1[0], "float32")


@every_implementation
@every_version
def test_causality_by_gradient(version, implementation):
    """A token's output depends on all earlier tokens of its document, and on no later one."""
    inputs, state, at = version.inputs("typical", LONG), version.state(LONG), 141
    reset = np.zeros((LONG.batch, LONG.time), bool)
    reset[1, 115] = True
    _, final, scale = version.expected(inputs, state, reset)
    dy, dfinal = cotangents(version, LONG, final)
    dy[:, :at], dy[:, at + 1 :] = 0, 0
    dfinal = jax.tree.map(np.zeros_like, dfinal)
    _, grads = compiled(version, implementation)(inputs, state, reset, scale, dy, dfinal)
    for name in ("k", "v"):
        seen = np.abs(np.asarray(grads[name])).reshape(LONG.batch, LONG.time, -1).max(-1) > 0
        assert seen[0].tolist() == [t <= at for t in range(LONG.time)], f"{name}, row 0"
        assert seen[1].tolist() == [115 <= t <= at for t in range(LONG.time)], f"{name}, row 1"
    for name, x in grads.items():
        if name in inputs and per_token(x):
            later = np.abs(np.asarray(x)[:, at + 1 :]).max()
            # Tokens of a chunk share cumulative decays: the gradient is a difference, and leaves
            # a rounding error.
            rounding = 1e-5 * np.abs(x).max() if name == "log_w" and implementation != "scan" else 0
            assert later <= rounding, f"{name} of a later token"


@every_version
def test_steps_equal_the_sequence(version):
    inputs, state = version.inputs("typical", SMALL), version.state(SMALL)
    y, final, scale = version.expected(inputs, state, None)
    step = jax.jit(version.step)
    outputs = []
    for t in range(SMALL.time):
        token = {name: x[:, t] if per_token(x) else x for name, x in inputs.items()}
        out, state = step(**token, state=state)
        outputs.append(out)
    assert_close(np.stack(outputs, 1), y, "float32", name="y")
    for name, x in version.final(state, scale).items():
        assert_close(x, final[name], "float32", name=name)


@every_implementation
@every_version
def test_vmap_is_a_loop(version, implementation):
    """A mapped leading axis equals a loop over it."""
    draws = [version.inputs("typical", SMALL, seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *draws)
    mapped, _ = jax.jit(jax.vmap(lambda x: version.call(x, None, None, implementation)))(stacked)
    for index, inputs in enumerate(draws):
        y, _, _ = version.expected(inputs, None, None)
        assert_close(mapped[index], y, "float32", name=f"y of {index}")


@quickly("7")
def test_chunked_backward_keeps_less_than_scan(version):
    """The gradient of `scan` keeps a state per token; that of `chunked` at most one per chunk."""
    shape = testing.Shape(1, 512, 2, 64)
    inputs, state = version.inputs("typical", shape), version.state(shape)
    reset = testing.reset_pattern("none", shape)
    _, final, scale = version.expected(inputs, state, reset)
    dy, dfinal = cotangents(version, shape, final)

    def temporaries(implementation):
        lowered = compiled(version, implementation).lower(inputs, state, reset, scale, dy, dfinal)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    # The scan's states alone, against which the chunked form is measured.
    states = shape.time * shape.heads * shape.size * (3 if version.name == "4" else shape.size) * 4
    assert temporaries("scan") > states
    assert temporaries("chunked") < (
        temporaries("scan") / 2.5 if version.name == "4" else states / 3
    )


@every_version
def test_errors_name_the_mistake(version):
    inputs = jax.tree.map(jnp.asarray, version.inputs("typical", SMALL))
    with pytest.raises(ValueError, match=r"must be scan, chunked, associative.*got 'flash'"):
        version.call(inputs, None, None, "flash")

    # The package's own checks, without those of its annotations, which only tests enable.
    operator = inspect.unwrap(version.operator)
    for name in inputs:
        wrong = inputs | {name: jnp.repeat(inputs[name], 2, axis=-1)}
        if version.name != "4" and name == "v":
            wrong = inputs | {"v": inputs["v"][:, 1:]}
        with pytest.raises(ValueError, match=rf"{operator.__name__}: shapes.*\b{name} \["):
            operator(**wrong)
    with pytest.raises(ValueError, match="reset"):
        operator(**inputs, reset=jnp.zeros((SMALL.batch, 3), bool))
    state = jax.tree.map(
        jnp.asarray, version.state(testing.Shape(SMALL.batch + 1, 1, SMALL.heads, SMALL.size))
    )
    with pytest.raises(ValueError, match="state"):
        operator(**inputs, state=Wkv4State(*state) if version.name == "4" else state)
    with pytest.raises(ValueError, match="reset must be bool, not int32"):
        operator(**inputs, reset=jnp.zeros((SMALL.batch, SMALL.time), jnp.int32))
    with pytest.raises(ValueError, match="lengths must be integers, not float32"):
        operator(**inputs, lengths=jnp.ones(SMALL.batch))
    for count in (-1, SMALL.time + 1):
        with pytest.raises(ValueError, match=f"lengths must be 0 to {SMALL.time}, .* got {count}"):
            operator(**inputs, lengths=jnp.array([3, count]))
    with pytest.raises(ValueError, match=r"log_w is up to [01].*, but the log of a decay is 0"):
        operator(**inputs | {"log_w": jnp.exp(inputs["log_w"])})
    with pytest.raises(ValueError, match="must be floating point, not int32"):
        operator(**inputs | {"v": inputs["v"].astype(jnp.int32)})
    with pytest.raises(ValueError, match="no tokens"):
        operator(**{name: x[:, :0] if per_token(x) else x for name, x in inputs.items()})
    spread = jax.shard_map(
        lambda x: operator(**x)[0],
        mesh=jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=({n: P("data") if per_token(x) else P() for n, x in inputs.items()},),
        out_specs=P("data"),
    )
    with pytest.raises(ValueError, match="check_vma=False"):
        spread(inputs)


@quickly("7")
def test_one_float64_makes_all_float64(version):
    """Whichever input it is: no other is rounded to float32."""
    with jax.enable_x64(True):
        inputs = jax.tree.map(jnp.asarray, version.inputs("typical", SMALL))
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), inputs)
        y, _ = version.operator(**wide)
        for name in inputs:
            if name != "v":  # which decides the dtype of y
                mixed, _ = version.operator(**wide | {name: inputs[name]})
                assert np.abs(mixed - y).max() < 1e-13, name


@pytest.mark.parametrize(
    "implementation",
    [*IMPLEMENTATIONS, *(pytest.param(name, marks=pytest.mark.slow) for name in KERNELS)],
)
def test_version_4_gradients_channel_by_channel(implementation):
    """Decays from slow to those that forget at once: gradients of fast channels are small, and
    right all the same."""
    rng = np.random.default_rng(1)
    log_w = -np.exp(np.linspace(-6, 3, 64))
    k, v, dy = rng.normal(size=(3, 2, 70, 64))
    u = rng.normal(size=64)
    zeros = np.zeros((2, 64))
    exact = oracles.wkv4_grad(log_w, k, v, u, None, None, dy, (zeros, zeros))

    @jax.jit
    def gradient(*parameters):
        def loss(log_w, u):
            y, _ = wkv4(log_w, *map(jnp.float32, (k, v)), u, implementation=implementation)
            return jnp.sum(y * jnp.float32(dy))

        return jax.grad(loss, (0, 1))(*parameters)

    found = gradient(jnp.float32(log_w), jnp.float32(u))
    for name, gradient in zip(("log_w", "u"), found, strict=True):
        error = np.abs(np.asarray(gradient) / exact[name] - 1)
        assert np.all(error <= CHANNEL), f"{name}: {error.max():.1e} in channel {error.argmax()}"


@pytest.mark.slow
def test_version_4_forgets_at_once():
    """log w = -inf: only the bonus and the token before count; padding has no decay at all."""
    shape = testing.Shape(2, 70, 1, 8)
    inputs = jax.tree.map(jnp.asarray, testing.wkv4_inputs("typical", shape))
    inputs["log_w"] = jnp.full_like(inputs["log_w"], -jnp.inf)
    lengths = jnp.array([70, 5])
    for implementation in IMPLEMENTATIONS:
        y, state = wkv4(**inputs, lengths=lengths, implementation=implementation)
        k, v, bonus = inputs["k"], inputs["v"], jnp.exp(inputs["u"][None, None] + inputs["k"])
        past = jnp.exp(k[:, :-1])
        expected = (past * v[:, :-1] + bonus[:, 1:] * v[:, 1:]) / (past + bonus[:, 1:])
        assert_close(y[0, 1:], expected[0], "float32")
        assert_close(state.num[1] / state.den[1], v[1, 4], "float32")


@every_implementation
@pytest.mark.parametrize("name", [pytest.param("5", marks=pytest.mark.slow), "6", "7"])
def test_documents_start_from_the_initial_state(name, implementation):
    """`initial` stands in for zero, with and without a reset, and gets its gradient."""
    check_initial(VERSIONS[name], implementation)


@pytest.mark.parametrize(
    "implementation", [pytest.param("associative", marks=pytest.mark.slow), "chunked"]
)
def test_documents_of_any_decay_start_from_the_initial_state(implementation):
    """Decays that are too strong for chunks: token by token."""
    shape = testing.Shape(2, 41, 2, 8)
    log_w = STRONG["some"](np.random.default_rng(4), shape.heads_shape).astype(np.float32)
    check_initial(ANY_DECAY, implementation, shape, log_w=log_w)


ORACLES = {
    "5": (oracles.wkv6, oracles.wkv6_grad),
    "6": (oracles.wkv6, oracles.wkv6_grad),
    "7": (oracles.wkv7, oracles.wkv7_grad),
}
"""Values and gradients of the versions that have `initial`."""


def check_initial(version, implementation, shape=SMALL, **changed):
    """Values and gradients, of documents that start from `initial`, against the oracles."""
    rng = np.random.default_rng(8)
    inputs = version.inputs("typical", shape) | changed
    initial = rng.normal(size=(shape.heads, shape.size, shape.size)).astype(np.float32)
    start = np.broadcast_to(initial, (shape.batch, *initial.shape))
    reset = jnp.asarray(testing.reset_pattern("random", shape, seed=2))
    dy, dstate = rng.normal(size=shape.heads_shape), rng.normal(size=start.shape)
    dy, dstate = jnp.asarray(dy, jnp.float32), jnp.asarray(dstate, jnp.float32)
    oracle, gradient = ORACLES[version.name]
    given = inputs | {"state": start, "reset": reset, "initial": initial}
    y, final = oracle(**given)
    gradients = gradient(**given, dy=dy, dstate=dstate)
    gradients["initial"] += gradients.pop("state").sum(0)

    @jax.jit
    def everything(inputs):
        values, pull_back = jax.vjp(
            lambda x: version.operator(**x, reset=reset, implementation=implementation), inputs
        )
        return values, pull_back((dy, dstate))[0]

    (actual_y, after), grads = everything(jax.tree.map(jnp.asarray, inputs | {"initial": initial}))
    assert_close(actual_y, y, "float32", name="y")
    assert_close(after, final, "float32", name="final state")
    assert grads.keys() == gradients.keys()
    for array, x in gradients.items():
        assert_close(grads[array], x, "float32", name=f"d {array}")


@pytest.mark.parametrize(("name", "size"), [("6", 8), ("6", 64), ("7", 8)])
def test_the_default_starts_documents_from_the_learnt_state(name, size):
    """Without a gradient: small heads of version 6 and all of version 7 go token by token."""
    shape, version = testing.Shape(2, 40, 2, size), VERSIONS[name]
    inputs, reset = version.inputs("typical", shape), testing.reset_pattern("random", shape)
    reset[0, [0, 1, 39]] = True
    initial = testing.matrix_state(shape)[0]
    start = np.broadcast_to(initial, (shape.batch, *initial.shape))
    y, state = ORACLES[name][0](**inputs, state=start, reset=reset, initial=initial)
    actual_y, actual = jax.jit(version.operator)(**inputs, reset=reset, initial=initial)
    assert_close(actual_y, y, "float32", name="y")
    assert_close(actual, state, "float32", name="final state")


@every_implementation
@pytest.mark.parametrize("name", [pytest.param("6", marks=pytest.mark.slow), "7"])
def test_a_packed_row_is_rows_that_start_from_the_learnt_state(name, implementation):
    """Two documents and padding, against each of the two in a row of its own."""
    version, cut, end = VERSIONS[name], 37, 90
    inputs = version.inputs("typical", SMALL)
    initial = jnp.asarray(testing.matrix_state(SMALL)[0])
    reset = np.zeros((SMALL.batch, SMALL.time), bool)
    reset[:, [cut, end + 3]] = True  # the last one is in the padding
    run = jax.jit(partial(version.operator, initial=initial, implementation=implementation))
    y, after = run(**inputs, reset=reset, lengths=np.full(SMALL.batch, end))
    for start, stop in ((0, cut), (cut, end)):
        alone = {n: x[:, start:stop] if per_token(x) else x for n, x in inputs.items()}
        expected, last = run(**alone)
        assert_close(y[:, start:stop], expected, "float32", name=f"y from {start}")
    assert_close(after, last, "float32", name="final state")


STRONG = {
    "all": lambda rng, size: np.full(size, -20.0),
    "some": lambda rng, size: rng.choice([-3e-4, -20.0, -1e4], size=size),
    "endless": lambda rng, size: rng.choice([-3e-4, -np.inf], size=size),
}


@pytest.mark.parametrize(
    ("decays", "implementation"),
    [
        ("some", "chunked"),
        *(pytest.param("some", x, marks=pytest.mark.slow) for x in (None, "associative", *KERNELS)),
        *(pytest.param(x, "chunked", marks=pytest.mark.slow) for x in ("all", "endless")),
    ],
)
def test_version_7_holds_any_decay(decays, implementation):
    """In chunks their factors overflow: token by token, values and gradients are right."""
    shape = testing.Shape(2, 70, 2, 16)
    version, rng = ANY_DECAY, np.random.default_rng(4)
    inputs, state = version.inputs("typical", shape), version.state(shape)
    inputs["log_w"] = STRONG[decays](rng, shape.heads_shape).astype(np.float32)
    reset = testing.reset_pattern("random", shape)
    y, final, scale = version.expected(inputs, state, reset)
    dy, dfinal = cotangents(version, shape, final)
    gradients = version.gradients(inputs, state, reset, dy, dfinal, scale)
    values, dinputs = compiled(version, implementation)(inputs, state, reset, scale, dy, dfinal)
    expected = {"y": y} | final | {f"d {name}": x for name, x in gradients.items()}
    actual = values | {f"d {name}": x for name, x in dinputs.items()}
    for name, x in expected.items():
        assert_close(actual[name], x, "float32", name=name)


def test_a_promise_of_mild_decays_changes_no_bit():
    """Only the question whether they are is left out; under `vmap` it has one answer for all."""
    inputs = jax.tree.map(jnp.asarray, VERSIONS["7"].inputs("typical", SMALL))

    def gradient(inputs, **options):
        return jax.value_and_grad(lambda x: jnp.sum(jnp.sin(wkv7(**x, **options)[0])))(inputs)

    asked, promised = (
        jax.jit(partial(gradient, **options)) for options in ({}, {"log_w_min": -0.7})
    )
    jax.tree.map(np.testing.assert_array_equal, asked(inputs), promised(inputs))
    both = jax.tree.map(lambda x: jnp.stack([x, x]), inputs)
    together = str(jax.make_jaxpr(jax.vmap(gradient))(both))
    assert "cond[" in together and "cond[" not in str(jax.make_jaxpr(promised)(inputs))


@quickly("6", "7")
def test_float64_in_float64_out(version):
    """Whichever input is: `y` and the state have one type."""
    shape = testing.Shape(1, 20, 1, 4)
    with jax.enable_x64(True):
        inputs = jax.tree.map(jnp.asarray, version.inputs("typical", shape))
        for name in inputs:
            wide = inputs | {name: inputs[name].astype(jnp.float64)}
            kinds = {x.dtype for x in jax.tree.leaves(jax.eval_shape(version.operator, **wide))}
            assert kinds == {np.dtype("float64")}, name
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), inputs)
        y, state = jax.eval_shape(version.operator, **half)
        assert y.dtype == jnp.bfloat16
        assert {x.dtype for x in jax.tree.leaves(state)} == {np.dtype("float32")}


@every_version
def test_a_list_is_no_array(version):
    inputs = jax.tree.map(jnp.asarray, version.inputs("typical", SMALL))
    operator = inspect.unwrap(version.operator)
    for name in inputs:
        with pytest.raises(ValueError, match=rf"{name} must be an array \[.*\], got list"):
            operator(**inputs | {name: inputs[name].tolist()})


@every_version
def test_no_rows_have_no_gradients(version):
    """The gradients of an empty batch are empty, or zero."""
    inputs = jax.tree.map(jnp.asarray, version.inputs("typical", SMALL))
    empty = {name: x[:0] if per_token(x) else x for name, x in inputs.items()}
    gradients = jax.grad(lambda x: jnp.sum(version.operator(**x)[0]))(empty)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, 0 * y), gradients, empty)


def test_float64_of_numpy_is_float32_where_jax_has_none():
    """Without a warning: every warning is an error here."""
    inputs = {name: np.float64(x) for name, x in VERSIONS["4"].inputs("typical", SMALL).items()}
    y, _ = inspect.unwrap(wkv4)(**inputs)
    assert y.dtype == jnp.float32
