"""A plan of a compiled step is what a run allocates, computes and communicates."""

import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from training.meshes import MESHES
from training.meshes import config as mesh_config

from rwkv_jax import models, sharding
from rwkv_jax import params as tables
from rwkv_jax.config import Config, MeshConfig, ModelConfig, TrainConfig, TuneConfig
from rwkv_jax.hardware import CHIPS, TopologyError, chip_of, open_topology
from rwkv_jax.params import is_spec
from rwkv_jax.planning.collectives import collectives
from rwkv_jax.planning.plan import make_plan
from rwkv_jax.training.flops import model_flops, program_flops
from rwkv_jax.training.mesh import make_mesh
from rwkv_jax.training.state import init_train_state

ROOT = Path(__file__).parents[2]
MESH = {"data": 2, "fsdp": 4}


def compiled(f, spec, shape=(8, 64)):
    """The text of a program that runs `f` over a mesh of eight devices, in a loop of five."""
    mesh = jax.make_mesh(tuple(MESH.values()), tuple(MESH), (AxisType.Explicit,) * 2)

    def looped(x):
        run = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(), check_vma=False)
        return lax.fori_loop(0, 5, lambda i, total: total + jnp.sum(run(x * i)), 0.0)

    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        return jax.jit(looped).trace(x).lower().compile().as_text()


@pytest.mark.parametrize(
    ("f", "kind", "axes", "received"),
    [
        # 8 x 64 floats: a device holds 2 x 64 and receives the rest
        (lambda x: lax.all_gather(x, "fsdp", tiled=True), "all-gather", ("fsdp",), 3 * 2 * 64 * 4),
        # of its 2 x 64 it sends and receives 3/4, twice
        (lambda x: lax.psum(x, "fsdp"), "all-reduce", ("fsdp",), 2 * 2 * 64 * 4 * 3 // 4),
        (lambda x: lax.psum(x, "data"), "all-reduce", ("data",), 2 * 64 * 4),
        (
            lambda x: lax.ppermute(x, "fsdp", [(0, 1), (1, 2), (2, 3)]),
            "collective-permute",
            ("fsdp",),
            2 * 64 * 4,
        ),
        (
            lambda x: lax.all_to_all(x, "fsdp", 1, 0, tiled=True),
            "all-to-all",
            ("fsdp",),
            2 * 64 * 4 * 3 // 4,
        ),
    ],
)
def test_bytes_received_by_a_device(f, kind, axes, received):
    found = list(collectives(compiled(f, PartitionSpec("fsdp"))))
    mine = [x for x in found if x.kind == kind]
    assert sum(x.received(MESH) for x in mine if x.axes(MESH) == axes) == 5 * received


TPU = """
%all-reduce-scatter.1 (p: bf16[512,64]) -> bf16[64,64] {
  %all-reduce.2 = (bf16[512,64]{1,0}, /*index=1*/f32[16]{0}) all-reduce(%p), ALL
}
%gather_start (p: bf16[64,8]) -> bf16[512,8] {
  %all-gather.1 = bf16[512,8]{1,0} all-gather(%p), CHAIN
}
%gather_done (p: bf16[64,8]) -> bf16[512,8] {
  %all-gather.2 = bf16[512,8]{1,0} all-gather(%p), CHAIN
}
%cond (p: s32[]) -> pred[] {
  %c = s32[]{:T(128)} constant(12)
}
%body (p: bf16[64,8]) -> bf16[64,8] {
  %a = bf16[512,8] fusion(%p), calls=%gather_start
  %b = bf16[512,8] fusion(%p), calls=%gather_done
  %c = bf16[64,64] fusion(%p), calls=%all-reduce-scatter.1
}
ENTRY %main (p: bf16[64,8]) -> bf16[64,8] {
  %while.1 = (s32[]{:T(128)}, bf16[64,8]) while(%p), condition=%cond, body=%body
  %start = (f32[4,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%p), replica_groups=[4,2]<=[4,2]
  %done = f32[8,8]{1,0} all-gather-done(%start)
}
"""
TPU = TPU.replace("ALL", "replica_groups={{0,1,2,3,4,5,6,7}}").replace(
    "CHAIN", """channel_id=7, replica_groups=mesh['a'=8,'b'=1] {'a'}, x={chain_id="3"}"""
)


def test_hlo_of_tpus():
    """As libtpu 0.0.42 writes it: loops without a trip count, gathers spread over several fusions,
    scattered sums."""
    found = {(x.kind, x.times, x.size) for x in collectives(TPU)}
    scattered = (512 * 64 * 2 + 16 * 4) // 8
    assert found == {
        ("all-gather", 12, 512 * 8 * 2),
        ("reduce-scatter", 12, scattered),
        ("all-gather", 1, 8 * 8 * 4),
    }
    axes = {
        x.times: x.axes({"fsdp": 4, "tensor": 2}) for x in collectives(TPU) if x.size != scattered
    }
    assert axes == {12: ("fsdp", "tensor"), 1: ("tensor",)}


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("[4,2]<=[8]", ("c",)),
        ("[4,2]<=[4,2]T(1,0)", ("b",)),
        ("[2,4]<=[2,2,2]T(1,0,2)", ("a", "c")),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("a",)),
        ("mesh['x'=4,'y'=2] {'y'}", ("c",)),
        ("mesh['x'=2,'y'=1,'z'=4], device_ids=([2,2,2]T(1,0,2)) {'x'}", ("b",)),
        ("mesh['x'=2,'y'=2,'z'=2], device_ids=([2,4]T(1,0)) {'x','y'}", ("b", "c")),
    ],
)
def test_groups_as_mesh_axes(groups, axes):
    """In XLA's notations, for a mesh a 2 x b 2 x c 2."""
    line = f"  %x = f32[8]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%f"
    (found,) = collectives(f"ENTRY %main (p: f32[8]) -> f32[8] {{\n{line}\n}}\n")
    assert found.axes({"a": 2, "b": 2, "c": 2}) == axes


def test_flops_of_a_program():
    def f(x, w):
        def layer(x, _):
            return jax.checkpoint(lambda x: jnp.tanh(x @ w))(x), None

        return jnp.sum(lax.scan(layer, x, length=3)[0])

    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))
    product = 2 * 4 * 8 * 8
    assert program_flops(jax.make_jaxpr(f)(x, w).jaxpr) == 3 * product
    # forward, recomputed, and the gradients of both factors
    gradient = jax.make_jaxpr(jax.grad(f, (0, 1)))(x, w).jaxpr
    assert program_flops(gradient) == 3 * 4 * product


def test_a_models_flops_are_those_of_its_programs():
    """Token by token a step has the FLOPs of the formula, except those of the recurrence that the
    program computes as sums of products."""
    cfg = ModelConfig(version="7", layers=3, width=128, vocab_size=512)
    tokens = jnp.zeros((1, 1), jnp.int32)

    def loss(params):
        return jnp.sum(models.forward(params, tokens, cfg=cfg, implementation="scan")[0])

    traced = jax.make_jaxpr(jax.grad(loss))(models.abstract_params(cfg))
    recurrence = 3 * 8 * cfg.head_size * cfg.width * cfg.layers
    assert model_flops(cfg) - recurrence < program_flops(traced.jaxpr) <= model_flops(cfg)


def plan_and_state(mesh, **model):
    cfg = Config(
        model=ModelConfig(layers=2, width=128, vocab_size=512, **model),
        train=TrainConfig(batch=8, context=64, steps=1),
        mesh=mesh,
    )
    return make_plan(cfg, open_topology("here")), init_train_state(cfg, mesh=make_mesh(cfg))


def test_a_plan_is_what_a_run_allocates_and_communicates():
    plan, state = plan_and_state(MeshConfig())

    def bytes_on_one(tree):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    assert plan.parameters == bytes_on_one(state.params)
    assert plan.optimizer == bytes_on_one(state.opt_state)
    assert plan.mesh == {"fsdp": 8} and plan.fits is None
    # Each matrix is gathered twice, forward and backward, the head once.
    table = models.specs(plan.cfg.model)
    blocks = jax.tree.leaves(table.blocks, is_leaf=is_spec)
    layers = sum(
        math.prod(x.full_shape) for x in blocks if "embed" in x.axes or "channels" in x.axes
    )
    head = math.prod(table.head.full_shape)
    expected = 4 * (2 * layers + head) * 7 / 8
    assert plan.traffic[("fsdp",)]["all-gather"] == pytest.approx(expected, rel=0.03)
    # The embedding's rows are sent, not the table: 8 rows of 64 tokens, an eighth from each device.
    assert plan.traffic[("fsdp",)]["all-to-all"] == 2 * 64 * 128 * 4 * 7 // 8


def test_a_plan_of_tuning():
    """Frozen weights have neither gradients nor moments, and their products no gradient of them."""

    def plan_of(tune):
        model = ModelConfig(layers=2, width=128, vocab_size=512)
        train = TrainConfig(batch=8, context=64, steps=1, remat="dots")
        cfg = Config(model=model, train=train, mesh=MeshConfig(data=1, fsdp=1), tune=tune)
        return make_plan(cfg, open_topology("here"))

    whole = plan_of(TuneConfig())
    tuned = plan_of(TuneConfig(method="lora", rank=4, base="bfloat16"))
    assert (whole.frozen, tuned.frozen) == (0, whole.parameters // 2)
    adapter = 4 * (2 * (4 * 2 * 128 + 2 * 5 * 128) * 4)  # bytes; 4 and 2 matrices of 2 layers
    assert tuned.parameters == adapter and tuned.optimizer < 2.1 * adapter
    assert whole.memory - tuned.memory > 3 * whole.parameters
    assert 0.6 < tuned.needed_flops / whole.needed_flops < 0.75
    assert 0.6 < tuned.program_flops / whole.program_flops < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("version", ["4", "6", "7"])
@pytest.mark.parametrize("name", MESHES)
def test_no_needless_traffic(name, version):
    """Gradients are summed over every axis but `tensor`; parameters are gathered over `fsdp`;
    activations are summed over `tensor`; states and last tokens are passed along `sequence`;
    nothing else is gathered."""
    cfg = mesh_config(MESHES[name], version, context=256)
    plan = make_plan(cfg, open_topology("here"))
    sizes = plan.mesh | {axis: 1 for axis in sharding.RULES["batch"] if axis not in plan.mesh}
    tensor = plan.mesh.get("tensor", 1)
    count = tables.count(models.specs(cfg.model))
    gathered = {
        axes: kinds["all-gather"] for axes, kinds in plan.traffic.items() if "all-gather" in kinds
    }
    rows = cfg.train.batch // sizes["data"] // sizes["fsdp"]
    activation = 4 * rows * cfg.train.context * cfg.model.width * (tensor - 1) // tensor
    # The columns of the embedding, of a device's tokens.
    assert gathered.pop(("tensor",), 0) == activation
    if "fsdp" in plan.mesh:
        # Twice, forward and backward; and the ids of the tokens that are looked up.
        share = (sizes["fsdp"] - 1) / sizes["fsdp"] / tensor
        assert 0.8 < gathered.pop(("fsdp",)) / (2 * 4 * count * share) < 1.25
    assert not gathered
    if tensor > 1:
        # Two sums per layer, and as many backward, some of which are split into several.
        activations = plan.traffic["tensor",]
        assert activations.keys() <= {"all-reduce", "reduce-scatter", "all-gather"}
        assert activations["all-reduce"] <= 9 * cfg.model.layers * 2 * activation
    # Gradients once over each axis, and little else: norms, the loss, last tokens of documents.
    gradients = plan.parameters * sizes["fsdp"]
    over = {axis: size for axis, size in plan.mesh.items() if axis != "tensor"}
    summed = sum(
        kinds.get("all-reduce", 0) + kinds.get("reduce-scatter", 0)
        for axes, kinds in plan.traffic.items()
        if over.keys() >= set(axes)
    )
    assert summed <= 1.1 * gradients * sum(2 * (size - 1) / size for size in over.values())
    passed = sum(kinds.get("collective-permute", 0) for kinds in plan.traffic.values())
    assert (passed > 0) == ("sequence" in plan.mesh)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_what_a_run_takes():
    """The peak that a step adds to the memory of a process with eight devices."""
    program = ROOT / "tests" / "planning" / "memory_of_a_step.py"
    for tensor in (1, 2):
        done = subprocess.run(
            [sys.executable, program, str(tensor)], capture_output=True, text=True, check=True
        )
        planned, used = map(float, done.stdout.split())
        assert 0.9 < used / planned < 1.15


def test_chips_by_device_kind():
    assert chip_of("TPU v5 lite") is CHIPS["v5e"]
    assert chip_of("TPU v5") is CHIPS["v5p"]
    assert chip_of("NVIDIA H100 80GB HBM3") is CHIPS["h100"]
    assert chip_of("cpu") is None


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "v5e:2by2", "v5e:2x2x2", "v5p:4x4", ""])
def test_unknown_hardware(name):
    with pytest.raises(TopologyError, match="not known; give one of v4, v5e"):
        open_topology(name)
