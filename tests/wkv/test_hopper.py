"""Version 7's kernel for Hopper GPUs: interpreted on this CPU, one callback at a time, against the
oracles; compiled ahead of time for an H100."""

import itertools
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from tolerances import KERNEL_BFLOAT16, relative_rms
from wkv import accuracy
from wkv.operators import VERSIONS

from benchmarks.aot import Case, compiled
from rwkv_jax import testing as cases
from rwkv_jax.hardware import GPUS
from rwkv_jax.planning.collectives import bytes_moved
from rwkv_jax.testing import leak_test
from rwkv_jax.wkv import wkv4, wkv6, wkv7
from rwkv_jax.wkv.operator import HOPPER
from rwkv_jax.wkv.pallas.hopper.driver import CHUNK
from rwkv_jax.wkv.v7 import STRONGEST

OLD = jax.__version_info__ < (0, 11)
interpreted = pytest.mark.skipif(OLD, reason=f"JAX {jax.__version__} cannot interpret Mosaic GPU")
slow = pytest.mark.slow

REPEATING = {"repeated key", "near-same key", "alternating sign"}
DISTINCT = 1e-2
"""Bar where keys do not repeat: at most 6e-3 measured (where they do, 3.0e-2)."""

mild = partial(wkv7, log_w_min=STRONGEST, implementation=HOPPER)
"""With a promise, so that the kernel is alone."""
MEETINGS = 7
"""Of the two warpgroups, in a chunk of the backward pass."""


def problem(shape, regime="typical", seed=0):
    """Inputs, a state, and cotangents of y and the state after."""
    inputs = {
        name: jnp.asarray(x, "float32" if name == "log_w" else "bfloat16")
        for name, x in cases.wkv7_inputs(regime, shape, seed).items()
    }
    rng = np.random.default_rng([seed, 3])
    state, dstate = rng.normal(size=(2, shape.batch, shape.heads, shape.size, shape.size))
    dy = jnp.asarray(rng.normal(size=shape.heads_shape), "bfloat16")
    return inputs, jnp.asarray(state, "float32"), (dy, jnp.asarray(dstate, "float32"))


def starts_at(shape, *tokens):
    return jnp.zeros((shape.batch, shape.time), bool).at[:, jnp.array(tokens)].set(True)


def gradients(operator, reset=None, **options):
    """(inputs, state, cotangents) -> all values and gradients, in one program."""

    @jax.jit
    def run(inputs, state, cotangents):
        def forward(inputs, state):
            return operator(**inputs, state=state, reset=reset, **options)

        values, pull_back = jax.vjp(forward, inputs, state)
        return values, pull_back(cotangents)

    return run


def assert_same(actual, expected):
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_near(actual, expected, allowed=KERNEL_BFLOAT16):
    errors = jax.tree.map(relative_rms, actual, expected)
    assert all(error <= allowed for error in jax.tree.leaves(errors)), errors


def against_float64(length, regimes, patterns, heads=2):
    """The largest error over the patterns of resets, for each regime and array."""
    version = replace(
        VERSIONS["7"],
        regimes=regimes,
        operator=mild,
        call=lambda inputs, state, reset, _: mild(**inputs, state=state, reset=reset),
    )
    shape = cases.Shape(1, accuracy.LENGTHS[length](CHUNK), heads, CHUNK)
    worst, wrong = {}, []
    for regime, pattern, found in accuracy.errors(
        version, HOPPER, "bfloat16", shape, patterns=patterns
    ):
        for array, (error, allowed) in found.items():
            allowed = allowed if regime in REPEATING else min(allowed, DISTINCT)
            worst[regime, array] = max(error, worst.get((regime, array), 0.0))
            if not error <= allowed:  # written so that a NaN fails
                wrong.append(f"{regime}, resets {pattern}: {array} {error:.1e}, bar {allowed:.1e}")
    for regime in regimes:  # shown with `pytest -rP`
        row = {array: error for (of, array), error in worst.items() if of == regime}
        print(f"{regime:16}", *(f"{array} {error:.1e}" for array, error in row.items()), sep="  ")
    assert not wrong, f"{len(wrong)} arrays, {shape}:\n" + "\n".join(wrong[:20])


@interpreted
def test_two_chunks_against_float64():
    against_float64("C + 1", ("typical", "repeated key"), ("random",), heads=1)


@interpreted
@slow
@pytest.mark.parametrize("length", accuracy.LENGTHS)
def test_against_float64(length):
    against_float64(length, cases.WKV7_REGIMES, cases.RESETS)


BORDERS = (CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 40, 2 * CHUNK + 1)
"""Documents that start with a chunk, and with its last token; several in one chunk."""


@interpreted
def test_documents_do_not_see_each_other():
    shape = cases.Shape(1, 2 * CHUNK + 9, 1, CHUNK)
    inputs, _, _ = problem(shape)
    run = jax.jit(lambda x, reset: mild(**x, reset=reset)[0])
    leak_test(run, inputs, starts_at(shape, *BORDERS))


@interpreted
@slow
def test_gradients_of_documents_do_not_see_each_other():
    shape = cases.Shape(1, 2 * CHUNK + 9, 1, CHUNK)
    inputs, _, (dy, _) = problem(shape)

    @jax.jit
    def run(inputs, reset):
        return jax.vjp(lambda x: mild(**x, reset=reset)[0], inputs)[1](dy)[0]

    leak_test(run, inputs, starts_at(shape, *BORDERS))


@interpreted
def test_padding_changes_nothing():
    """A row of fewer tokens is that of `lengths`, gradients included, whatever the padding is."""
    shape, valid = cases.Shape(1, CHUNK + 9, 1, CHUNK), CHUNK - 5
    inputs, state, (dy, dstate) = problem(shape)
    padded = {name: x.at[:, valid:].set(jnp.nan) for name, x in inputs.items()}
    padded["log_w"] = padded["log_w"].at[:, valid:].set(-jnp.inf)
    short = {name: x[:, :valid] for name, x in inputs.items()}
    run = gradients(mild, lengths=jnp.array([valid]))
    (y, after), (dx, dbefore) = run(padded, state, (dy.at[:, valid:].set(0), dstate))
    for x in dx.values():
        assert not np.any(np.asarray(x[:, valid:], np.float32))
    actual = (y[:, :valid], after), ({name: x[:, :valid] for name, x in dx.items()}, dbefore)
    assert_same(actual, gradients(mild)(short, state, (dy[:, :valid], dstate)))


@interpreted
@slow
def test_each_row_and_head_is_computed_alone():
    """Bit for bit what they are in a batch; the same under vmap, and on a mesh."""
    shape = cases.Shape(2, CHUNK + 7, 2, CHUNK)
    inputs, state, cotangents = problem(shape)
    reset = starts_at(shape, 30, CHUNK)
    together = gradients(mild, reset)(inputs, state, cotangents)

    def part(row, head):
        def of(x):
            return x[row : row + 1, :, head : head + 1]

        tokens, (dy, dstate) = jax.tree.map(of, inputs), cotangents
        where = slice(row, row + 1), slice(head, head + 1)
        return tokens, state[where], (of(dy), dstate[where])

    alone = [[gradients(mild, reset[:1])(*part(r, h)) for h in range(2)] for r in range(2)]

    def joined(*parts):
        head = 1 if parts[0].shape[1] == 1 else 2
        rows = [jnp.concatenate(parts[2 * row : 2 * row + 2], head) for row in range(2)]
        return jnp.concatenate(rows, 0)

    assert_same(jax.tree.map(joined, *(x for row in alone for x in row)), together)

    rows = jax.tree.map(lambda x: x[:, None], (inputs, state, cotangents))
    mapped = jax.vmap(gradients(mild, reset[:1]))(*rows)
    assert_same(jax.tree.map(lambda x: x[:, 0], mapped), together)

    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def put(x):
        spec = ("data", "tensor") if x.shape[1] == 2 else ("data", None, "tensor")
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    with jax.set_mesh(mesh):
        sharded = gradients(mild, reset)(*jax.tree.map(put, (inputs, state, cotangents)))
    assert_same(sharded, together)


@interpreted
@slow
def test_values_wider_than_keys_and_other_types_of_decays():
    shape = cases.Shape(1, CHUNK + 1, 1, CHUNK)
    inputs, _, (dy, dstate) = problem(shape)
    inputs["v"] = jnp.concatenate([inputs["v"], 2 * inputs["v"][:, ::-1]], -1)
    inputs["log_w"] = inputs["log_w"].astype("bfloat16")
    cotangents = jnp.concatenate([dy, -dy], -1), jnp.concatenate([dstate, -dstate], 2)
    actual = gradients(mild)(inputs, None, cotangents)
    assert actual[1][0]["log_w"].dtype == jnp.bfloat16
    assert_near(actual, gradients(wkv7, implementation="chunked")(inputs, None, cotangents))


@interpreted
@slow
def test_gradients_of_gradients():
    """They are those of `chunked`, at the outputs and gradients of the kernel."""
    shape = cases.Shape(1, 20, 1, CHUNK)
    inputs, state, (dy, _) = problem(shape)

    def second(operator):
        def loss(inputs):
            y = operator(**inputs, state=state)[0].astype(jnp.float32)
            return jnp.sum(y * y * dy.astype(jnp.float32))

        def along(inputs):
            return jax.jvp(jax.grad(loss), (inputs,), (inputs,))[1]

        def flat(inputs):
            return sum(
                jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(jax.grad(loss)(inputs))
            )

        return jax.jit(lambda x: (jax.grad(flat)(x), along(x)))(inputs)

    assert_near(second(mild), second(partial(wkv7, implementation="chunked")))


@interpreted
@slow
@pytest.mark.parametrize("strongest", [STRONGEST, 2 * STRONGEST])
def test_strong_decays(strongest):
    """At the kernel's limit it is right; beyond it the definition runs instead."""
    shape = cases.Shape(1, CHUNK, 1, CHUNK)
    inputs, state, cotangents = problem(shape)
    inputs["log_w"] = jnp.full_like(inputs["log_w"], strongest)
    run = gradients(partial(wkv7, implementation=HOPPER))
    exact = gradients(partial(wkv7, implementation="scan"))
    assert_near(run(inputs, state, cotangents), exact(inputs, state, cotangents))


@pytest.fixture
def traced_anew():
    """Neither uses what was traced before, nor leaves what is."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@interpreted
@slow
@pytest.mark.usefixtures("traced_anew")
@pytest.mark.parametrize("dropped", [None, *range(MEETINGS)])
def test_every_meeting_is_needed(dropped, monkeypatch, caplog):
    """All reads of shared memory come after the writes that they see, and before the next: the
    interpreter finds no race. Without one of the warpgroups' meetings it finds some."""
    from rwkv_jax.wkv.pallas.hopper.tiles import plgpu

    arrive, wait = plgpu.barrier_arrive, plgpu.barrier_wait
    meetings, skipped = itertools.cycle(range(MEETINGS)), []

    def arrive_or_not(barrier):
        if next(meetings) == dropped:
            skipped.append(barrier)
        else:
            arrive(barrier)

    def wait_or_not(barrier):
        if not (skipped and skipped.pop() is barrier):
            wait(barrier)

    monkeypatch.setattr(plgpu, "barrier_arrive", arrive_or_not)
    monkeypatch.setattr(plgpu, "barrier_wait", wait_or_not)
    watching = partial(plgpu.InterpretGPUParams, detect_races=True, on_race="warn")
    monkeypatch.setattr(plgpu, "InterpretGPUParams", watching)
    shape = cases.Shape(1, 3 * CHUNK, 1, CHUNK)
    for reset in (None, starts_at(shape, *BORDERS)):
        caplog.clear()
        jax.block_until_ready(gradients(mild, reset)(*problem(shape)))
        assert ("RACE DETECTED" in caplog.text) == (dropped is not None)


def named(inputs, **options):
    return wkv7(**inputs, implementation=HOPPER, **options)


def on(card):
    """A context in which programs are traced for a GPU."""
    mesh = AbstractMesh(
        (1,),
        ("x",),
        axis_types=(AxisType.Auto,),
        abstract_device=AbstractDevice(card, None, "gpu"),
    )
    return jax.sharding.use_abstract_mesh(mesh)


def test_only_version_7_has_it():
    for version, operator in ("4", wkv4), ("6", wkv6):
        inputs = VERSIONS[version].inputs("typical", cases.Shape(1, 4, 1, 16))
        inputs = jax.tree.map(jnp.asarray, inputs)
        with pytest.raises(ValueError, match=r"got 'mosaic_gpu', which only wkv7 has"):
            operator(**inputs, implementation=HOPPER)


def test_an_older_jax_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    inputs, _, _ = problem(cases.Shape(1, 4, 1, CHUNK))
    with pytest.raises(ValueError, match=r"no kernel for JAX .* needs JAX 0.11 or newer"):
        named(inputs)


@interpreted
def test_what_it_is_not_for_is_refused():
    inputs, _, _ = problem(cases.Shape(1, 4, 1, CHUNK))
    wide = inputs | {"r": inputs["r"].astype("float32")}
    with pytest.raises(ValueError, match=r"no kernel for bfloat16 and float32 \(this one is for"):
        named(wide)
    small, _, _ = problem(cases.Shape(1, 4, 1, 32))
    with pytest.raises(ValueError, match="no kernel for heads of 32 channels"):
        named(small)
    for card in "NVIDIA A100-SXM4-80GB", "NVIDIA B200":
        with on(card), pytest.raises(ValueError, match=f"no kernel for {card}: .* for Hopper"):
            jax.jit(named).trace(inputs)
    tpu = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice("TPU v5 lite", 1, "tpu"))
    with jax.sharding.use_abstract_mesh(tpu), pytest.raises(ValueError, match="one is for cuda"):
        jax.jit(named).trace(inputs)


@interpreted
def test_a_program_for_hopper_has_one_kernel_a_pass():
    """And keeps no states where no gradient is taken."""
    shape = cases.Shape(2, 2 * CHUNK, 3, CHUNK)
    inputs, state, cotangents = problem(shape)

    def text(run, *given):
        with on("NVIDIA H100 80GB HBM3"):
            lowered = jax.jit(run).trace(*given).lower(lowering_platforms=("cuda",))
        return lowered.as_text()

    found = text(gradients(mild), inputs, state, cotangents)
    assert found.count("custom_call @mosaic_gpu_v2") == 2
    kept = "2x2x3x64x64xbf16"  # chunks, rows, heads
    assert kept in found
    found = text(lambda x, state: mild(**x, state=state), inputs, state)
    assert found.count("custom_call @mosaic_gpu_v2") == 1 and kept not in found


def hopper_gpus(count, *shape, kind=AxisType.Auto):
    """A mesh of GPUs that are not there."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=GPUS["H100"].target_config(), topology=f"1x1x{count}"
    )
    axes = ("data", "tensor")[: len(shape)]
    return Mesh(np.array(topology.devices).reshape(shape), axes, axis_types=(kind,) * len(shape))


has_compiler = pytest.mark.skipif(
    OLD or not find_spec("jax_cuda13_plugin"), reason="JAX 0.11, and pip install -e '.[aot]'"
)


@has_compiler
@slow
@pytest.mark.parametrize("resets", [False, True])
def test_compiles(resets):
    """Without a wgmma that waits for the one before; two forward programs fit a multiprocessor."""
    case = Case(HOPPER, "7", heads=4, resets=resets)
    found = [*compiled("H100", [case])]
    assert not [row for row in found if "error" in row]
    sizes = {row["kernel"]: row["shared_bytes"] for row in found}
    reserved = 1024  # bytes of every block
    assert 2 * (sizes["wkv7_forward"] + reserved) <= GPUS["H100"].core
    assert sizes["wkv7_backward"] <= GPUS["H100"].block


@has_compiler
@slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_each_gpu_of_a_mesh_has_its_own_rows_and_heads(kind):
    """And nothing moves between them."""
    shape = cases.Shape(4, 2 * CHUNK, 6, CHUNK)
    mesh = hopper_gpus(4, 2, 2, kind=kind)
    spec = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    inputs = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec)
        for name, x in problem(shape)[0].items()
    }

    def run(inputs):
        y, pull_back = jax.vjp(lambda x: mild(**x)[0], inputs)
        return pull_back(y)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(run).trace(inputs).lower(lowering_platforms=("cuda",))
    text = lowered.compile().as_text()
    assert text.count('custom_call_target="mosaic_gpu_v2"') == 2
    assert "bf16[2,128,3,64]" in text and "bf16[4,128,6,64]" not in text
    assert not bytes_moved(text)
