"""Time sharded over a mesh axis: the same values and gradients, and the bytes that it moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tolerances import assert_close
from wkv.operators import (
    ANY_DECAY,
    DISTINCT,
    VERSIONS,
    every_implementation,
    every_version,
    per_token,
    quickly,
)

from rwkv_jax import testing
from rwkv_jax.planning.collectives import bytes_moved
from rwkv_jax.wkv import Wkv4State, wkv7

SHAPE = testing.Shape(2, 144, 2, 8)


def mesh(devices, kind=AxisType.Auto):
    return jax.make_mesh(
        (devices,), ("sequence",), axis_types=(kind,), devices=jax.devices()[:devices]
    )


def everything(version, **options):
    """(inputs, state, reset, lengths, dy, dstate) -> y, sums of the final state, all gradients."""

    def run(inputs, state, reset, lengths, dy, dstate):
        def call(inputs, state):
            given = Wkv4State(*state) if version.name == "4" else state
            y, after = version.operator(
                **inputs, state=given, reset=reset, lengths=lengths, **options
            )
            if version.name == "4":
                after = (after.num * jnp.exp(after.max_exp), after.den * jnp.exp(after.max_exp))
            return y, after

        values, pull_back = jax.vjp(call, inputs, state)
        return values, pull_back((dy, dstate))

    return jax.jit(run)


def arguments(version, lengths=None):
    inputs, state = version.inputs("typical", SHAPE), version.state(SHAPE)
    reset = np.zeros((SHAPE.batch, SHAPE.time), bool)
    reset[1, [50, 51, 72]] = True  # the last at the boundary of two devices; row 0 is one document
    rng = np.random.default_rng(1)
    y = (SHAPE.batch, SHAPE.time, SHAPE.width) if version.name == "4" else SHAPE.heads_shape
    after = state[:2] if version.name == "4" else state
    draw = lambda shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    dy, dstate = draw(y), jax.tree.map(lambda x: draw(x.shape), after)
    if lengths is not None:
        real = np.arange(SHAPE.time)[None] < np.array(lengths)[:, None]
        dy = dy * real.reshape(*real.shape, *(1,) * (dy.ndim - 2))
        lengths = np.array(lengths)
    return inputs, state, reset, lengths, dy, dstate


def compare(version, devices, lengths=None, kind=AxisType.Auto, implementation=None):
    x = arguments(version, lengths)
    whole = everything(version, implementation=implementation)(*x)
    with jax.set_mesh(mesh(devices, kind)):
        split = everything(version, implementation=implementation, mesh_axis="sequence")(*x)
    if lengths is not None:  # y of padding is undefined
        real = (np.arange(SHAPE.time)[None] < np.array(lengths)[:, None]).astype(np.float32)
        whole, split = (
            ((y * real.reshape(*real.shape, *(1,) * (y.ndim - 2)), *rest), grads)
            for (y, *rest), grads in (whole, split)
        )
    paths = jax.tree_util.tree_leaves_with_path(split)
    for (path, actual), expected in zip(paths, jax.tree.leaves(whole), strict=True):
        assert_close(actual, expected, "float32", name=jax.tree_util.keystr(path))


@quickly("6")
@pytest.mark.parametrize("devices", [8, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))])
def test_as_on_one_device(version, devices):
    compare(version, devices)


@pytest.mark.slow
@every_implementation
@every_version
def test_every_implementation_runs_on_a_shard(version, implementation):
    compare(version, 4, implementation=implementation)


@pytest.mark.parametrize(
    "version",
    [
        pytest.param(version, marks=() if name == "4" else pytest.mark.slow)
        for name, version in VERSIONS.items()
    ],
    ids=VERSIONS,
)
def test_padding_across_devices(version):
    """Rows that end on another device, one of them on the first."""
    compare(version, 4, lengths=(100, 30), kind=AxisType.Explicit)


MESHES = {
    "rows and heads": {"data": 4, "tensor": 2},
    "time too": {"data": 2, "sequence": 2, "tensor": 2},
}


@pytest.mark.parametrize(
    ("axes", "kind"),
    [
        pytest.param(MESHES["time too"], AxisType.Explicit, id="time-too"),
        *(
            pytest.param(*mesh, id=name, marks=pytest.mark.slow)
            for name, mesh in {
                "rows-and-heads": (MESHES["rows and heads"], AxisType.Explicit),
                "time-too-automatic": (MESHES["time too"], AxisType.Auto),
            }.items()
        ),
    ],
)
@pytest.mark.parametrize(
    "version",
    [
        pytest.param(ANY_DECAY, id="wkv7-any-decay"),
        *(pytest.param(x, id=f"wkv{x.name}", marks=pytest.mark.slow) for x in DISTINCT),
    ],
)
def test_rows_and_heads_across_devices(version, axes, kind):
    """Only states move, and gradients of shared inputs are summed once; also without `jit`."""
    shape = testing.Shape(4, 48, 4, 8)
    inputs, reset = version.inputs("typical", shape), testing.reset_pattern("random", shape)
    axis = "sequence" if "sequence" in axes else None

    def loss(inputs, reset, mesh_axis=None):
        y, after = version.operator(**inputs, reset=reset, mesh_axis=mesh_axis)
        after = after.num / after.den if version.name == "4" else after
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(after)), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs, reset)
    devices = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))

    def spread(x):
        spec = ("data", axis, "tensor") if per_token(x) else ("tensor",)
        return jax.device_put(x, NamedSharding(devices, PartitionSpec(*spec)))

    with jax.set_mesh(devices):
        given = jax.tree.map(spread, inputs)
        starts = jax.device_put(reset, NamedSharding(devices, PartitionSpec("data", axis)))
        run = jax.value_and_grad(lambda x, reset: loss(x, reset, axis), has_aux=True)
        program = jax.jit(run).lower(given, starts).compile()
        (_, split), split_grads = program(given, starts)
        moved = bytes_moved(program.as_text())
        if version.name == "7" and not axis:
            eager, _ = version.operator(**given, reset=starts)
            assert_close(eager, y, "float32")
    states = {"collective-permute"} if axis else set()
    assert moved.keys() <= {"all-reduce", *states}
    assert sum(moved.values()) < 20 * shape.batch * shape.heads * shape.size**2 * 4
    assert split.sharding.spec[0] == "data"
    for a, b in zip(
        jax.tree.leaves((split, split_grads)), jax.tree.leaves((y, grads)), strict=True
    ):
        assert_close(a, b, "float32")


@quickly("7")
def test_explicit_axes_of_any_input_count(version):
    """If only one array is sharded, the others follow it."""
    shape = testing.Shape(4, 20, 4, 8)
    inputs = jax.tree.map(jnp.asarray, version.inputs("typical", shape))
    reset = jnp.asarray(testing.reset_pattern("random", shape))
    y, _ = version.operator(**inputs, reset=reset)
    devices = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(devices):
        for name, spec in {"k": ("data",), "reset": ("data",), "v": (None, None, "tensor")}.items():
            given = inputs | {"reset": reset}
            given[name] = jax.device_put(given[name], NamedSharding(devices, PartitionSpec(*spec)))
            assert_close(version.operator(**given)[0], y, "float32", name=name)


def test_unsupported_shardings_raise():
    """With a sentence, where JAX would complain about a scan's carry."""
    inputs = testing.wkv7_inputs("typical", testing.Shape(2, 48, 2, 8))
    devices = mesh(4, AxisType.Explicit)

    def given(spec):
        sharding = NamedSharding(devices, PartitionSpec(*spec))
        return {name: jax.device_put(x, sharding) for name, x in inputs.items()}

    with jax.set_mesh(devices):
        with pytest.raises(ValueError, match=r"time is sharded over 'sequence'; .*mesh_axis='seq"):
            wkv7(**given([None, "sequence"]))
        with pytest.raises(ValueError, match="the channels of a head are sharded, over 'sequence'"):
            wkv7(**given([None, None, None, "sequence"]))


@pytest.mark.parametrize("name", [pytest.param("6", marks=pytest.mark.slow), "7"])
def test_documents_start_from_the_initial_state_on_every_device(name):
    """Also where heads are sharded."""
    version = VERSIONS[name]
    inputs, state, reset, _, dy, dstate = arguments(version)
    shape = (SHAPE.heads, SHAPE.size, SHAPE.size)
    inputs |= {"initial": np.random.default_rng(3).normal(size=shape).astype(np.float32)}
    x = (inputs, state, reset, None, dy, dstate)
    whole = everything(version)(*x)
    devices = jax.make_mesh((4, 2), ("sequence", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(devices):
        heads = NamedSharding(devices, PartitionSpec("tensor"))
        inputs["initial"] = jax.device_put(inputs["initial"], heads)
        split = everything(version, mesh_axis="sequence")(*x)
    for a, b in zip(*map(jax.tree.leaves, (split, whole)), strict=True):
        assert_close(a, b, "float32")


def test_inside_a_shard_map_of_the_caller():
    """The operator gets one device's shard, and only `mesh_axis` says so."""
    inputs = jax.tree.map(jnp.asarray, VERSIONS["7"].inputs("typical", SHAPE))
    y, after = jax.jit(wkv7)(**inputs)
    time = PartitionSpec(None, "sequence")
    part = jax.shard_map(
        lambda x: wkv7(**x, mesh_axis="sequence"),
        mesh=mesh(4),
        in_specs=time,
        out_specs=(time, PartitionSpec()),
        check_vma=False,
    )
    y4, after4 = jax.jit(part)(inputs)
    assert_close(y4, y, "float32")
    assert_close(after4, after, "float32")


@quickly("7")
def test_bytes_moved_do_not_grow_with_length(version):
    """Forward and backward move only the devices' maps, which are as large as states."""
    moved = {}
    for length in (64, 256):
        shape = testing.Shape(1, length, 2, 8)
        devices = mesh(4)
        with jax.set_mesh(devices):
            inputs = {
                name: jax.device_put(
                    x,
                    NamedSharding(
                        devices, PartitionSpec(*((None, "sequence") if per_token(x) else ()))
                    ),
                )
                for name, x in version.inputs("typical", shape).items()
            }

            def loss(x):
                y, _ = version.operator(**x, mesh_axis="sequence")
                return jnp.sum(jnp.sin(y))

            program = jax.jit(jax.grad(loss)).lower(inputs).compile().as_text()
        moved[length] = sum(bytes_moved(program).values())
    state = 4 * (shape.width * 3 if version.name == "4" else shape.heads * shape.size**2)
    assert state <= moved[64] == moved[256] <= 20 * 4 * state


@every_version
def test_errors_name_the_axis_and_the_length(version):
    inputs = jax.tree.map(jnp.asarray, version.inputs("typical", testing.Shape(1, 30, 2, 8)))
    with pytest.raises(ValueError, match=r"no mesh axis 'sequence': no mesh is set.*set_mesh"):
        version.operator(**inputs, mesh_axis="sequence")
    with jax.set_mesh(mesh(4)):
        with pytest.raises(ValueError, match=r"no mesh axis 'time': the mesh has 'sequence'"):
            version.operator(**inputs, mesh_axis="time")
        message = r"30 tokens cannot be split .* over the 4 devices .* nearest .* 28 or 32"
        with pytest.raises(ValueError, match=message):
            version.operator(**inputs, mesh_axis="sequence")
