"""The kernels, interpreted on this CPU and lowered for their accelerators: the tests of every
implementation, and those that only kernels need."""

import logging
import math
import subprocess
import sys
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import unfused
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec
from tolerances import KERNEL_BFLOAT16, assert_close, relative_rms
from wkv import accuracy
from wkv.operators import DISTINCT, VERSIONS, compiled

from benchmarks import sass
from benchmarks.aot import calls
from rwkv_jax import testing as cases
from rwkv_jax.planning.collectives import bytes_moved
from rwkv_jax.testing import leak_test
from rwkv_jax.wkv import KERNELS, Wkv4State, pallas, wkv6, wkv7
from rwkv_jax.wkv.pallas.tpu import driver

slow = pytest.mark.slow
SHAPE = cases.Shape(2, 37, 2, 16)
every_kernel = pytest.mark.parametrize("name", KERNELS)
QUICK = (("6", "pallas_gpu"), ("7", "pallas_tpu"))
"""Together they cover both matrix versions and both backends. Version 4's kernels are slow to
compile for a CPU: long programs without a loop."""


def pairs(*quick):
    """Every version with every kernel; all but `quick` are marked slow."""
    every = [
        pytest.param(
            VERSIONS[version],
            name,
            marks=() if (version, name) in quick else slow,
            id=f"wkv{version}-{name}",
        )
        for version in "467"
        for name in KERNELS
    ]
    return pytest.mark.parametrize(("version", "name"), every)


one_of_each = pairs(*QUICK)
"""For tests of the kernels themselves: one pair of each version and backend is quick."""
one_of_all = pairs(QUICK[0])
"""For tests of what surrounds a kernel: one pair is quick."""
DEVICES = {
    "pallas_tpu": ("tpu", AbstractDevice("TPU v5 lite", 1, "tpu"), "tpu_custom_call"),
    "pallas_gpu": (
        "cuda",
        AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu"),
        "__gpu$xla.gpu.triton",
    ),
}


def on(name):
    """A context in which programs are traced for that kernel's accelerator."""
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=DEVICES[name][1])
    return jax.sharding.use_abstract_mesh(mesh)


def axis_type(name):
    """Of a mesh: XLA partitions kernels over automatic axes on GPUs, but not on TPUs."""
    return AxisType.Explicit if name == "pallas_tpu" else AxisType.Auto


def problem(version, shape=SHAPE, dtype="float32"):
    """Inputs in `dtype`, a state, and where documents start."""
    inputs = {
        name: jnp.asarray(x, "float32" if name in ("log_w", "u") else dtype)
        for name, x in version.inputs("typical", shape).items()
    }
    state = jax.tree.map(jnp.asarray, version.state(shape))
    state = Wkv4State(*state) if version.name == "4" else state
    return inputs, state, jnp.asarray(cases.reset_pattern("random", shape, seed=3))


def call(version, name, reset, inputs, state, **options):
    return version.operator(**inputs, state=state, reset=reset, implementation=name, **options)


def compiler(version):
    """Version 4's kernels, a chunk's tokens without a loop, compile too slowly with fusion."""
    return unfused if version.name == "4" else jax.jit


def accuracy_cases():
    """All cases; of the quick ones, the longest length with one dtype each."""
    for version in VERSIONS:
        for name in KERNELS:
            for dtype in ("float32", "bfloat16"):
                for length in accuracy.LENGTHS:
                    dtypes = dict(zip(QUICK, ("float32", "bfloat16"), strict=True))
                    quick = length == "3 C + 5" and dtypes.get((version, name)) == dtype
                    yield pytest.param(
                        *(version, name, dtype, length),
                        id=f"wkv{version}-{name}-{dtype}-{length}".replace(" ", ""),
                        marks=() if quick else slow,
                    )


@pytest.fixture
def released(version):
    """Frees what was compiled: XLA for CPUs crashes after some of version 4's long programs."""
    yield
    if version == "4":
        compiled.cache_clear()
        jax.clear_caches()


@pytest.mark.usefixtures("released")
@pytest.mark.parametrize(("version", "name", "dtype", "length"), [*accuracy_cases()])
def test_against_float64(version, name, dtype, length):
    version = VERSIONS[version]
    shape = accuracy.shape_of(version, name, length)
    wrong = [
        f"{regime}, resets {pattern}: {array} {error:.1e}, bar {allowed:.1e}"
        for regime, pattern, found in accuracy.errors(
            version, name, dtype, shape, compiler(version)
        )
        for array, (error, allowed) in found.items()
        if not error <= allowed  # written so that a NaN fails
    ]
    assert not wrong, f"{len(wrong)} arrays, {shape}:\n" + "\n".join(wrong[:20])


@pairs(*QUICK, ("6", "pallas_tpu"))
def test_odd_numbers_of_heads_and_wide_values(version, name):
    """Three heads where two share a tile; values twice as wide as keys; one row."""
    shape = cases.Shape(1, 21, 3, 64)
    inputs, _, reset = problem(version, shape)
    if version.name != "4":
        inputs["v"] = jnp.concatenate([inputs["v"], 2 * inputs["v"][:, ::-1]], -1)
    run = compiler(version)(partial(call, version), static_argnums=0)
    for got, expected in zip(
        jax.tree.leaves(run(name, reset, inputs, None)),
        jax.tree.leaves(run("chunked", reset, inputs, None)),
        strict=True,
    ):
        assert_close(got, expected, "float32")


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("6", "pallas_gpu"),
        *(pytest.param(*x, marks=slow) for x in (("6", "pallas_tpu"), ("7", "pallas_tpu"))),
    ],
)
def test_documents_from_a_learnt_state(version, name):
    version = VERSIONS[version]
    inputs, state, reset = problem(version)
    initial = jnp.asarray(np.random.default_rng(1).normal(size=state.shape[1:]), jnp.float32)

    def both(name):
        def run(inputs, state, initial):
            y, after = version.operator(
                **inputs, state=state, reset=reset, initial=initial, implementation=name
            )
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(after)), (y, after)

        gradient = jax.grad(run, argnums=(0, 1, 2), has_aux=True)
        return jax.jit(gradient)(inputs, state, initial)

    jax.tree.map(lambda a, b: assert_close(a, b, "float32"), both(name), both("chunked"))


@every_kernel
@pytest.mark.parametrize("version", ["6", "7"])
def test_one_token(version, name):
    """It has a kernel of its own, equal to `scan` with its gradient; it may start a document."""
    version = VERSIONS[version]
    inputs, state, _ = problem(version, cases.Shape(3, 1, 4, 16))
    reset = jnp.array([[False], [True], [False]])
    inputs |= {"initial": jnp.flip(state[0], -1)}

    def both(name):
        def run(inputs, state):
            y, after = call(version, name, reset, inputs, state)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(after)), (y, after)

        return jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))(inputs, state)

    jax.tree.map(lambda a, b: assert_close(a, b, "float32"), both(name), both("scan"))


@one_of_each
def test_documents_do_not_see_each_other(version, name):
    inputs, _, reset = problem(version, cases.Shape(1, 40, 2, 16))
    per_token = {k: x for k, x in inputs.items() if x.ndim > 2}
    shared = {k: x for k, x in inputs.items() if x.ndim <= 2}

    @compiler(version)
    def run(x, reset):
        return version.operator(**x, **shared, reset=reset, implementation=name)[0]

    leak_test(run, per_token, reset)


@one_of_all
def test_vmap_adds_rows(version, name):
    """The gradient under vmap is the gradient of each row alone; unmapped arguments broadcast."""
    inputs, state, reset = problem(version)
    double = partial(jax.tree.map, lambda x: jnp.stack([x, x * 0.7]))

    def loss(inputs, state):
        y, after = call(version, name, reset, inputs, state)
        after = after.num if version.name == "4" else after
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(after))

    gradient = jax.grad(loss, argnums=(0, 1))
    mapped = compiler(version)(jax.vmap(gradient, in_axes=(0, None)))(double(inputs), state)
    once = compiler(version)(gradient)
    for i in range(2):
        alone = once(jax.tree.map(lambda x, i=i: x[i], double(inputs)), state)
        jax.tree.map(lambda a, b, i=i: assert_close(a[i], b, "float32"), mapped, alone)


@one_of_all
def test_gradients_of_gradients(version, name):
    """They are those of `chunked`, in both modes: XLA differentiates a kernel's gradient."""
    inputs, state, reset = problem(version, cases.Shape(1, 20, 1, 16))

    def second(name):
        def loss(inputs, state):
            y, _ = call(version, name, reset, inputs, state)
            return jnp.sum(jnp.sin(y))

        def flat(inputs):
            # Not cosines: gradients are in the hundreds, and a cosine of them loses digits.
            return sum(jnp.sum(x * x) for x in jax.tree.leaves(jax.grad(loss)(inputs, state)))

        def along(inputs):
            return jax.jvp(jax.grad(loss), (inputs, state), (inputs, state))[1]

        return compiler(version)(lambda x: (jax.grad(flat)(x), along(x)))(inputs)

    jax.tree.map(lambda a, b: assert_close(a, b, "float32"), second(name), second("chunked"))


@one_of_each
def test_sharded_rows_and_heads_move_nothing(version, name):
    """Each device of a mesh runs its own kernel, here with heads that do not fill its tiles."""
    inputs, state, reset = problem(version, cases.Shape(2, 37, 6, 64))
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(axis_type(name),) * 2)

    def spec(x):
        return {4: ("data", None, "tensor"), 3: ("data", None, "tensor")}.get(x.ndim, ("tensor",))

    def put(x, axes):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    given = {k: put(x, spec(x)) for k, x in inputs.items()}
    states = jax.tree.map(lambda x: put(x, ("data", "tensor")), state)

    def run(inputs, state):
        y, pull_back = jax.vjp(lambda *x: call(version, name, reset, *x)[0], inputs, state)
        return y, pull_back(y)

    with jax.set_mesh(mesh):
        sharded = compiler(version)(run).lower(given, states).compile()
    # The gradient of inputs that all rows share is summed over rows: one vector.
    shared = sum(4 * x.size for x in inputs.values() if x.ndim <= 2)
    assert sum(bytes_moved(sharded.as_text()).values()) <= shared
    alone = compiler(version)(run)(inputs, state)
    jax.tree.map(lambda a, b: assert_close(a, b, "float32"), sharded(given, states), alone)


@one_of_all
def test_sharded_time(version, name):
    """Each device runs the kernel on its part of the sequence."""
    shape = cases.Shape(1, 64, 2, 16)
    inputs, state, _ = problem(version, shape)
    reset = jnp.zeros((1, 64), bool).at[0, 19].set(True)

    def run(inputs, state, **options):
        kernel = partial(call, version, name, reset, **options)
        y, pull_back = jax.vjp(lambda *x: kernel(*x)[0], inputs, state)
        return y, pull_back(y)

    alone = compiler(version)(run)(inputs, state)
    with jax.set_mesh(jax.make_mesh((4,), ("sequence",), axis_types=(AxisType.Auto,))):
        sharded = compiler(version)(partial(run, mesh_axis="sequence"))(inputs, state)
    jax.tree.map(lambda a, b: assert_close(a, b, "float32"), sharded, alone)


def lowered(name, run, *given):
    platform, _, custom_call = DEVICES[name]
    with on(name):
        text = jax.jit(run).trace(*given).lower(lowering_platforms=(platform,)).as_text()
    return text.count(f"custom_call @{custom_call}(")


@every_kernel
@pytest.mark.parametrize(
    ("version", "dtype"),
    [
        pytest.param(
            version,
            dtype,
            marks=slow if dtype == "float32" and version.name != "7" else (),
            id=f"wkv{version.name}-{dtype}",
        )
        for version in DISTINCT
        for dtype in ("bfloat16", "float32")
    ],
)
def test_the_default_on_an_accelerator_is_its_kernel(version, name, dtype):
    """Lowered for the device: one kernel forward and one backward."""
    inputs, state, reset = problem(version, cases.Shape(2, 64, 4, 64), dtype)

    def both(inputs, state):
        y, pull_back = jax.vjp(lambda *x: call(version, None, reset, *x)[0], inputs, state)
        return y, pull_back(y)

    assert lowered(name, both, inputs, state) == 2
    if version.name != "4":
        one = {k: x[:, :1] if x.ndim > 2 else x for k, x in inputs.items()}
        assert lowered(name, lambda *x: call(version, None, None, *x), one, state) == 1


@every_kernel
def test_unsupported_inputs_fall_back_to_xla_with_one_warning(name, caplog):
    pallas.warn_once.cache_clear()
    odd = cases.wkv7_inputs("typical", cases.Shape(1, 64, 2, 40))
    with caplog.at_level(logging.WARNING, "rwkv_jax"):
        assert lowered(name, lambda x: wkv7(**x), odd) == 0
        assert lowered(name, lambda x: wkv7(**x), odd) == 0
        with jax.enable_x64(True):
            wide = {
                k: jnp.asarray(x, jnp.float64)
                for k, x in cases.wkv7_inputs("typical", SHAPE).items()
            }
            assert lowered(name, lambda x: wkv7(**x), wide) == 0
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "wkv7: no kernel for heads of 40 channels" in said[0]
    assert "wkv7: no kernel for float64" in said[1]


@every_kernel
def test_without_its_backend_of_pallas_xla_runs(name, caplog, monkeypatch):
    """JAX removes backends; the package still imports and runs."""
    pallas.warn_once.cache_clear()
    backend = {"pallas_gpu": "triton", "pallas_tpu": "tpu"}[name]
    monkeypatch.setitem(sys.modules, f"jax.experimental.pallas.{backend}", None)
    inputs, state, reset = problem(VERSIONS["7"])
    with caplog.at_level(logging.WARNING, "rwkv_jax"):
        assert lowered(name, partial(call, VERSIONS["7"], None, reset), inputs, state) == 0
    (said,) = caplog.records
    assert f"does not import jax.experimental.pallas.{backend}" in said.getMessage()
    with pytest.raises(ValueError, match=rf"no kernel for JAX .*pallas\.{backend} .*'chunked'"):
        call(VERSIONS["7"], name, reset, inputs, state)


def test_programs_for_a_cpu_do_without_pallas():
    code = """
import sys
sys.modules["jax.experimental.pallas"] = None
import jax.numpy as jnp
from rwkv_jax.wkv import wkv6
x = jnp.ones((1, 4, 1, 8))
wkv6(x, -x, x, x, jnp.ones((1, 8)))
assert not any(name.startswith("rwkv_jax.wkv.pallas.table") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def asking(monkeypatch, answer):
    """Has the compiler of this process' devices asked, as on an accelerator; what it was asked for:
    the numbers of kernels."""
    asked = []

    def compiler(traced):
        asked.append(str(traced.jaxpr).count("pallas_call["))
        answer()

    pallas.warn_once.cache_clear()
    pallas._trial.cache_clear()
    monkeypatch.setattr(pallas, "is_here", lambda platform: True)
    monkeypatch.setattr(pallas, "compile_here", compiler)
    return asked


def refusing():
    raise RuntimeError("failed to legalize operation\nand more")


@every_kernel
@pytest.mark.parametrize("version", DISTINCT, ids=lambda version: version.name)
def test_the_compiler_is_asked_for_the_kernel(version, name, monkeypatch):
    """Once for each kind of program; wide values, padding and a learnt state are none."""
    asked = asking(monkeypatch, lambda: None)
    inputs, state, reset = problem(version, cases.Shape(2, 37, 2, 64))

    def kernels(inputs, state=None, **options):
        return lowered(name, lambda x, s: version.operator(**x, state=s, **options), inputs, state)

    assert [kernels(inputs, state, reset=reset) for _ in range(2)] == [1, 1]
    assert kernels(inputs, state, lengths=jnp.array([3, 37])) == 1
    assert asked == [2]  # a forward and a backward kernel
    if version.name == "4":
        return
    wide = inputs | {"v": jnp.concatenate([inputs["v"]] * 2, -1)}
    assert kernels(wide) == 2
    assert kernels(inputs, initial=state[0]) == 1
    # Where documents start from it inside the row, version 7 is XLA's.
    assert kernels(inputs, initial=state[0], reset=reset) == (version.name == "6")
    assert asked == [2]
    one = {k: x[:, :1] if x.ndim > 2 else x for k, x in inputs.items()}
    assert kernels(one, state) == 1
    assert asked == [2, 1]


@every_kernel
def test_a_kernel_that_the_compiler_refuses_falls_back_to_xla(name, caplog, monkeypatch):
    asked = asking(monkeypatch, refusing)
    inputs, state, reset = problem(VERSIONS["7"], cases.Shape(2, 37, 2, 64))
    run = partial(call, VERSIONS["7"], None, reset)
    with caplog.at_level(logging.WARNING, "rwkv_jax"):
        assert [lowered(name, run, inputs, state) for _ in range(2)] == [0, 0]
    assert asked == [2]
    (said,) = caplog.records
    assert "refuses it (RuntimeError: failed to legalize operation); XLA's" in said.getMessage()


def test_processes_do_not_fall_back_on_their_own(monkeypatch):
    asking(monkeypatch, refusing)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    inputs, state, reset = problem(VERSIONS["7"], cases.Shape(2, 37, 2, 64))
    with pytest.raises(RuntimeError, match=r"refuses it .*'chunked' \(train.wkv\)"):
        lowered("pallas_gpu", partial(call, VERSIONS["7"], None, reset), inputs, state)


@pytest.mark.parametrize("version", DISTINCT, ids=lambda version: version.name)
def test_tpus_have_no_kernel_for_float16(version):
    """Mosaic casts none, which interpretation would hide."""
    inputs, state, reset = problem(version, dtype="float16")
    with pytest.raises(ValueError, match=r"no kernel for float16 \(bfloat16, float32 are"):
        call(version, "pallas_tpu", reset, inputs, state)


@every_kernel
def test_a_named_kernel_raises_for_unsupported_inputs(name):
    odd = jax.tree.map(jnp.asarray, cases.wkv7_inputs("typical", cases.Shape(1, 8, 1, 40)))
    with pytest.raises(ValueError, match=r"wkv7: no kernel for heads of 40 channels .*'chunked'"):
        wkv7(**odd, implementation=name)
    with jax.enable_x64(True):
        wide = {k: jnp.asarray(x, jnp.float64) for k, x in odd.items()}
        with pytest.raises(ValueError, match=r"wkv7: no kernel for float64; .*'chunked'"):
            wkv7(**wide, implementation=name)


@every_kernel
def test_float64_falls_back_to_xla(name):
    """One float64 input makes the computation float64, for which there is no kernel."""
    inputs, state, _ = problem(VERSIONS["6"], cases.Shape(1, 64, 2, 64))
    with jax.enable_x64(True):
        for wide in ("k", "u", "state"):
            given = inputs | {"state": state}
            given[wide] = given[wide].astype(jnp.float64)
            assert lowered(name, lambda x: wkv6(**x), given) == 0


@every_kernel
def test_a_kernel_named_for_another_device_raises(name):
    inputs, *_ = problem(VERSIONS["7"])
    (other,) = set(KERNELS) - {name}
    with on(other), pytest.raises(ValueError, match=rf"this one is for {DEVICES[name][0]}"):
        jax.jit(lambda x: wkv7(**x, implementation=name)).trace(inputs)


@one_of_all
@pytest.mark.slow
def test_sharded_time_rows_and_heads(version, name):
    """Values and gradients are those of one device, and a device moves as much as it would if its
    rows and heads were all there are."""

    def run(inputs, state):
        def y(*x):
            return call(version, name, None, *x, mesh_axis="sequence")[0]

        out, pull_back = jax.vjp(y, inputs, state)
        return out, pull_back(out)

    def sharded(sizes, shape):
        inputs, state, _ = problem(version, shape)
        shared = {k for k, x in inputs.items() if x.ndim <= 2}
        names = ("sequence", "data", "tensor")
        mesh = jax.make_mesh(sizes, names, axis_types=(axis_type(name),) * 3)
        with jax.set_mesh(mesh):
            put = {
                k: jax.device_put(x, PartitionSpec("tensor"))
                if k in shared
                else jax.device_put(x, PartitionSpec("data", "sequence", "tensor"))
                for k, x in inputs.items()
            }
            states = jax.tree.map(
                lambda x: jax.device_put(x, PartitionSpec("data", "tensor")), state
            )
            compiled = compiler(version)(run).lower(put, states).compile()
            moved = bytes_moved(compiled.as_text())
            # Gradients of shared inputs are also summed over rows, once for each use: version 4
            # runs its kernel twice, and computes the decay over a device's tokens.
            uses = {"log_w": 3, "u": 2} if version.name == "4" else dict.fromkeys(shared, 1)
            more = sum(uses[k] * 4 * inputs[k].size // sizes[2] for k in shared) * (sizes[1] > 1)
            return compiled(put, states), sum(moved.values()) - more

    whole = cases.Shape(4, 64, 6, 64)
    results, moved = sharded((2, 2, 2), whole)
    alone, _ = sharded((1, 1, 1), whole)
    jax.tree.map(lambda a, b: assert_close(a, b, "float32"), results, alone)
    _, own = sharded((2, 1, 1), cases.Shape(2, 64, 3, 64))
    assert moved <= own


def test_automatic_axes_on_tpus_fall_back_to_xla(caplog):
    """XLA for TPUs cannot partition a kernel: it would not compile. Over explicit axes the kernel
    runs, even if they shard nothing."""
    pallas.warn_once.cache_clear()
    x = jax.tree.map(jnp.asarray, cases.wkv7_inputs("typical", cases.Shape(4, 64, 6, 64)))

    def traced(kind, spec):
        mesh = AbstractMesh(
            (2, 2), ("a", "b"), axis_types=(kind,) * 2, abstract_device=DEVICES["pallas_tpu"][1]
        )
        with jax.sharding.use_abstract_mesh(mesh):
            given = {
                k: jax.ShapeDtypeStruct(z.shape, z.dtype, sharding=NamedSharding(mesh, spec))
                for k, z in x.items()
            }
            text = str(jax.jit(lambda x: wkv7(**x)).trace(given).jaxpr)
        return "wkv7_forward" in text, text

    with caplog.at_level(logging.WARNING, "rwkv_jax"):
        assert not traced(AxisType.Auto, PartitionSpec())[0]
    assert "no kernel for automatic mesh axes (a, b) on TPUs" in caplog.text
    for spec in (PartitionSpec(), PartitionSpec("a", None, "b")):
        found, text = traced(AxisType.Explicit, spec)
        assert found and "shard_map" in text and "custom_partitioning" not in text


@pytest.mark.parametrize(("card", "takes"), [("NVIDIA L4", False), ("NVIDIA H100 PCIe", True)])
def test_heads_of_128_in_float32_need_a_large_gpu(card, takes):
    device = AbstractDevice(card, None, "gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    x = jax.tree.map(jnp.asarray, cases.wkv7_inputs("typical", cases.Shape(1, 64, 1, 128)))
    half = {k: z if k == "log_w" else z.astype(jnp.bfloat16) for k, z in x.items()}
    with jax.sharding.use_abstract_mesh(mesh):
        for given, expected in ((x, takes), (half, True)):
            assert (
                "wkv7_forward" in str(jax.jit(lambda x: wkv7(**x)).trace(given).jaxpr)
            ) is expected


def test_rows_and_heads_that_do_not_divide():
    """JAX pads the last shard; so does the kernel's sharding."""
    inputs, state, _ = problem(VERSIONS["6"], cases.Shape(2, 20, 6, 16))
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        wide = jax.device_put(inputs["r"].reshape(2, 20, 96), PartitionSpec(None, None, "tensor"))

        def run(wide, inputs, state):
            r = wide.reshape(2, 20, 6, 16)
            return wkv6(**inputs | {"r": r}, state=state, implementation="pallas_gpu")

        sharded = jax.jit(run)(wide, inputs, state)
    alone = jax.jit(run)(inputs["r"].reshape(2, 20, 96), inputs, state)
    jax.tree.map(lambda a, b: assert_close(a, b, "float32"), sharded, alone)


@pytest.mark.parametrize(
    ("version", "dtype"),
    [("7", "float32"), pytest.param("6", "bfloat16", marks=slow)],
)
def test_chunks_side_by_side(version, dtype, monkeypatch):
    """A program's rows, tiles and times, in any numbers, give what one chunk a program gives."""
    version, shape = VERSIONS[version], cases.Shape(1, 100, 4, 64)
    inputs, state, reset = problem(version, shape, dtype)

    @jax.jit
    def both(inputs, state):
        y, pull_back = jax.vjp(lambda *x: call(version, "pallas_tpu", reset, *x)[0], inputs, state)
        return y, pull_back(y)

    def limited(chunks):
        jax.clear_caches()
        monkeypatch.setattr(driver, "limits", lambda *_: (chunks, 1))
        return both(inputs, state)

    alone = limited(1)
    jax.tree.map(lambda a, b: assert_close(a, b, "float32"), limited(4), alone)


def test_how_many_chunks_a_program_has():
    assert driver.program(8, 16, 64, 16, 1) == (1, 16, 1)  # tiles first
    assert driver.program(8, 6, 64, 16, 1) == (2, 6, 1)  # then rows
    assert driver.program(1, 6, 64, 16, 1) == (1, 6, 2)  # then times
    assert driver.program(1, 1, 17, 16, 1) == (1, 1, 1)  # of which 16 do not divide 17
    assert driver.program(1, 16, 64, 16, 2) == (1, 8, 2)  # a program for each core
    assert driver.program(1, 1, 64, 16, 2) == (1, 1, 16)


@pytest.mark.parametrize(
    "version, level, chunks", [("7", "O2", 8), ("7", "O3", 16), ("6", "O2", 4), ("6", "O3", 16)]
)
def test_more_chunks_a_program_if_compiled_for_speed(version, level, chunks):
    """As many as `JAX_OPTIMIZATION_LEVEL` asks for: the grid of the whole kernel has the rest."""
    version = VERSIONS[version]
    inputs, _, reset = problem(version, cases.Shape(1, 128, 64, 64), "bfloat16")
    before = jax.config.jax_optimization_level
    jax.config.update("jax_optimization_level", level)
    jax.clear_caches()
    try:
        with on("pallas_tpu"):
            forward = partial(call, version, "pallas_tpu", reset, state=None)
            traced = jax.jit(lambda x: forward(inputs=x)[0]).trace(inputs)
    finally:
        jax.config.update("jax_optimization_level", before)
        jax.clear_caches()
    (kernel,) = dict(calls(traced.jaxpr)).values()
    assert 32 * 2 // math.prod(kernel.grid) == chunks


def test_float16_states_do_not_overflow():
    """States of float16 inputs are kept for the gradient in float32, which holds larger values."""
    shape = cases.Shape(1, 33, 1, 16)
    inputs, state, _ = problem(VERSIONS["6"], shape)
    k = jnp.full_like(inputs["k"], 100)
    inputs |= {"k": k, "v": k, "r": 1e-4 * inputs["r"], "log_w": jnp.zeros_like(inputs["log_w"])}

    def gradient(name, dtype):
        def loss(log_w):
            x = {n: z if n in ("log_w", "u") else z.astype(dtype) for n, z in inputs.items()}
            y, _ = wkv6(**x | {"log_w": log_w}, state=state, implementation=name)
            return jnp.sum(y.astype(jnp.float32))

        return jax.jit(jax.grad(loss))(inputs["log_w"])

    expected = gradient("chunked", "float32")
    assert relative_rms(gradient("pallas_gpu", "float16"), expected) < KERNEL_BFLOAT16


needs_libtpu = pytest.mark.skipif(not find_spec("libtpu"), reason="pip install -e '.[aot]'")
needs_cuda = pytest.mark.skipif(
    not (find_spec("jax_cuda13_plugin") and sass.find("ptxas") and sass.find("nvdisasm")),
    reason="pip install -e '.[aot]', and a CUDA toolkit",
)


def compiled_ahead(*arguments):
    command = [sys.executable, "-m", "benchmarks.schedule", "--quick", *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@needs_libtpu
def test_compiles_for_a_tpu():
    compiled_ahead("--target", "v5e")


@needs_cuda
def test_compiles_for_a_gpu():
    compiled_ahead("--target", "H100")


@slow
@needs_libtpu
@needs_cuda
def test_compiles_for_every_target():
    compiled_ahead()
