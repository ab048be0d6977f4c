"""Meshes: their devices, sizes that they do not divide, and steps equal to those of one device."""

import contextlib
import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from markers import each_recurrence, versions
from tolerances import MODEL_RMS, relative_rms
from training.meshes import MESHES, config

from rwkv_jax import models, sharding
from rwkv_jax.checkpoint.store import Store
from rwkv_jax.config import DataConfig, MeshConfig
from rwkv_jax.data.loader import Batching, Stream, open_loader
from rwkv_jax.params import is_spec
from rwkv_jax.planning.plan import abstract_batch
from rwkv_jax.training.mesh import LocalRows, MeshError, make_mesh, params_shardings
from rwkv_jax.training.state import (
    abstract_train_state,
    from_trees,
    init_train_state,
    to_trees,
)
from rwkv_jax.training.step import make_train_step


def loader(cfg, masked=False):
    tokens = np.random.default_rng(0).integers(0, 66, 5000).astype(np.uint16)
    mask = tokens % 3 > 0 if masked else None
    streams = [Stream("noise", tokens, 0, mask)]
    train = cfg.train
    sampler = "sequential" if train.carry_state else "shuffle"
    return open_loader(streams, Batching(0, train.batch, train.context, 66, sampler))


def steps(cfg, mesh, count=2, masked=False):
    """State after some steps, and what they reported."""
    batches = loader(cfg, masked)
    read = LocalRows(batches, mesh).read if mesh else batches.read
    state, reports = init_train_state(cfg, mesh=mesh), []
    abstract = abstract_train_state(cfg, mesh)
    step = make_train_step(cfg)
    with sharding.use_mesh(mesh):
        for number in range(count):
            state, metrics = step(state, read(number))
            reports.append(jax.device_get(metrics))
    for (path, found), expected in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(abstract), strict=True
    ):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        if mesh:
            assert found.sharding.is_equivalent_to(expected.sharding, found.ndim), path
    return state, reports


@functools.cache
def on_one_device(version):
    return steps(config(MeshConfig(fsdp=1), version, accumulate=2), None)


QUICK = [("7", "data2-fsdp2-tensor2")]
"""The case that the quick suite runs; `models/test_sharded.py` shards time."""


@pytest.mark.parametrize(
    ("version", "name"),
    [
        pytest.param(version, name, marks=() if (version, name) in QUICK else pytest.mark.slow)
        for version in models.VERSIONS
        for name in MESHES
    ],
)
def test_a_step_is_that_of_one_device(version, name):
    cfg = config(MESHES[name], version, accumulate=2)
    made = make_mesh(cfg)
    found, reports = steps(cfg, made)
    expected, wanted = on_one_device(version)
    for report, want in zip(reports, wanted, strict=True):
        assert report.finite
        assert report.loss == pytest.approx(want.loss, rel=1e-5)
        assert report.grad_norm == pytest.approx(want.grad_norm, rel=1e-4)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(found.params),
        jax.tree.leaves(expected.params),
        strict=True,
    ):
        assert relative_rms(np.asarray(one), np.asarray(other)) < MODEL_RMS, path


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize(
    "name, freeze",
    [("lion", []), ("muon", []), ("adamw", ["emb.weight", "blocks.0.*", "head.weight"])],
)
def test_other_optimizers_and_frozen_parameters_on_the_mesh(name, freeze, mesh):
    """Lion's updates are signs: what rounding decides is left out."""
    found, expected = (
        steps(
            dataclasses.replace(
                cfg,
                optimizer=dataclasses.replace(cfg.optimizer, name=name, peak_lr=3e-3, eps=1e-3),
                train=dataclasses.replace(cfg.train, freeze=freeze),
            ),
            make_mesh(cfg),
            count=1,
        )
        for cfg in (config(mesh), config(MeshConfig(fsdp=1)))
    )
    assert found[1][0].loss == pytest.approx(expected[1][0].loss, rel=1e-5)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(found[0].params),
        jax.tree.leaves(expected[0].params),
        strict=True,
    ):
        apart = np.abs(np.asarray(one) - np.asarray(other))
        assert np.quantile(apart, 0.95) < 3e-5, path


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MESHES["fsdp8"], MESHES["data2-sequence4"]])
def test_masks_and_carried_states_are_on_the_mesh(mesh):
    plain = config(mesh, accumulate=2)
    cfg = dataclasses.replace(
        plain,
        data=DataConfig(sampler="sequential", heldout=0.0),
        train=dataclasses.replace(plain.train, carry_state=True),
    )
    found, reports = steps(cfg, make_mesh(cfg), masked=True)
    one = dataclasses.replace(cfg, mesh=MeshConfig(fsdp=1))
    expected, wanted = steps(one, None, masked=True)
    assert reports[1].loss == pytest.approx(wanted[1].loss, rel=1e-5)
    for mine, other in zip(*(jax.tree.leaves(x.carried) for x in (found, expected)), strict=True):
        assert relative_rms(np.asarray(mine), np.asarray(other)) < MODEL_RMS


@pytest.mark.parametrize(
    ("mesh", "changes", "expected"),
    [
        (
            MeshConfig(tensor=3),
            {},
            "mesh.tensor = 3: 3 devices do not divide the 8 available; set mesh.tensor = 4",
        ),
        (
            MeshConfig(data=4, fsdp=4),
            {},
            "mesh.data = 4 x mesh.fsdp = 4: 16 devices are more than the 8 available;"
            " set mesh.data = 2 or mesh.fsdp = 2",
        ),
        (
            MeshConfig(data=16, fsdp=2, tensor=2),
            {},
            "mesh.data = 16 x mesh.fsdp = 2 x mesh.tensor = 2: 64 devices are more than the 8"
            " available; set mesh.data = 2",
        ),
        (
            MeshConfig(data=16, fsdp=16),
            {},
            "mesh.data = 16 x mesh.fsdp = 16: 256 devices are more than the 8 available;"
            " set fewer along each axis",
        ),
        (
            MeshConfig(fsdp=1, tensor=8),
            {},
            "mesh.tensor = 8 does not divide the 4 heads of model.width = 128; the nearest that"
            " do: 4",
        ),
        (
            MeshConfig(),
            {"train": {"batch": 12}},
            "train.batch = 12 is not divisible by the 8 devices of mesh.fsdp = 8;"
            " set train.batch = 8 or 16, or mesh.fsdp = 4",
        ),
        (
            MeshConfig(data=2, fsdp=2, tensor=2),
            {"train": {"batch": 8, "accumulate": 4}},
            "train.batch = 8 in train.accumulate = 4 parts is not divisible by the 4 devices of"
            " mesh.data = 2 x mesh.fsdp = 2; set train.batch = 16, or train.accumulate = 2, or"
            " mesh.data = 1, or mesh.fsdp = 1",
        ),
        (
            MeshConfig(fsdp=1, sequence=8),
            {"train": {"context": 100}},
            "train.context = 100 is not divisible by the 8 devices of mesh.sequence = 8;"
            " set train.context = 96 or 104, or mesh.sequence = 4",
        ),
        (
            MeshConfig(fsdp=1, tensor=4),
            {"model": {"ffn_width": 130}},
            "mesh.tensor = 4 does not divide the 130 hidden channels of the channel mix"
            " (model.ffn_width); the nearest that do: 2 and 5",
        ),
        (
            MeshConfig(),
            {"model": {"width": 100, "head_size": 50}},
            "mesh.fsdp = 8 does not divide the 100 channels of model.width = 100; the nearest that"
            " do: 5 and 10",
        ),
    ],
)
def test_what_does_not_divide(mesh, changes, expected):
    cfg = config(mesh)
    for section, settings in changes.items():
        changed = dataclasses.replace(getattr(cfg, section), **settings)
        cfg = dataclasses.replace(cfg, **{section: changed})
    with pytest.raises(MeshError) as caught:
        make_mesh(cfg)
    assert str(caught.value) == expected


def test_axes_of_one_device_are_left_out():
    assert dict(make_mesh(config(MeshConfig(data=-1, fsdp=1, tensor=2))).shape) == {
        "data": 4,
        "tensor": 2,
    }
    assert make_mesh(config(MeshConfig()), jax.devices()[:1]) is None


REPLICATED_OVER_TENSOR = (2, 128, 32**2)
"""The only such large parameter: version 7a computes matrices of its channel mix from it."""


@each_recurrence
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_large_parameters_are_sharded(version, mesh):
    """A device has only its shard of them; the vocabulary is sharded only where it divides."""
    cfg = config(mesh, version)
    made = make_mesh(cfg)
    parts = made.shape.get("fsdp", 1) * made.shape.get("tensor", 1)
    places = params_shardings(models.specs(cfg.model), made)
    specs = jax.tree.leaves(models.specs(cfg.model), is_leaf=is_spec)
    whole = mine = 0
    for spec, place in zip(specs, jax.tree.leaves(places), strict=True):
        share = math.prod(place.shard_shape(spec.full_shape))
        if spec.full_shape == REPLICATED_OVER_TENSOR:
            share //= made.shape.get("tensor", 1)
        if len(spec.shape) > 1 and min(spec.shape) > 5:
            whole, mine = whole + math.prod(spec.full_shape), mine + share
    assert mine / whole <= 1.35 / parts


EVERY_AXIS = ("data2-sequence4", "data2-fsdp2-tensor2")
"""Meshes that together have all of them."""


def arrays(jaxpr):
    """The types of all arrays of a program and of what it calls, without broadcast scalars and
    without what a device computes inside a `shard_map`."""
    for equation in jaxpr.eqns:
        scalar = equation.primitive.name == "broadcast_in_dim" and not equation.invars[0].aval.shape
        if not scalar:
            yield from (x.aval for x in equation.outvars if hasattr(x.aval, "shape"))
        if equation.primitive.name != "shard_map":
            for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from arrays(inner)


@versions("7")
@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(mesh, id=name, marks=() if name in EVERY_AXIS else pytest.mark.slow)
        for name, mesh in MESHES.items()
    ],
)
def test_what_grows_with_rows_and_time_is_sharded(version, mesh):
    """Every device has its own rows, time, heads and hidden channels only."""
    cfg = config(mesh, version, context=512)
    made = make_mesh(cfg)
    with sharding.use_mesh(made):
        given = abstract_train_state(cfg, made), abstract_batch(cfg, made)
        program = make_train_step(cfg).trace(*given).jaxpr.jaxpr
    rows_and_time = math.prod(size for axis, size in made.shape.items() if axis != "tensor")
    every = rows_and_time * made.shape.get("tensor", 1)
    heads, hidden = (cfg.model.heads, cfg.model.head_size), cfg.model.ffn
    seen = {rows_and_time: 0, every: 0}
    for x in arrays(program):
        if x.size < 16 * 512 * 66:  # no parameter is as large
            continue
        least = every if x.shape[-2:] == heads or x.shape[-1] == hidden else rows_and_time
        seen[least] += 1
        assert x.size >= least * math.prod(x.sharding.shard_shape(x.shape)), x
    assert all(seen.values())


def test_a_checkpoint_is_restored_bit_for_bit_on_any_mesh(tmp_path):
    cfg = config(MESHES["fsdp8"])
    saved = init_train_state(cfg, mesh=make_mesh(cfg))
    with contextlib.closing(Store(tmp_path, keep=1)) as store:
        store.save(1, to_trees(saved), {})
        store.wait()
        for mesh in (MESHES["data2-fsdp2-tensor2"], MeshConfig(fsdp=1)):
            other = make_mesh(config(mesh))
            abstract = abstract_train_state(cfg, other)
            found = from_trees(store.restore(to_trees(abstract), 1))
            trees = zip(*(jax.tree.leaves(x) for x in (found, saved, abstract)), strict=True)
            for mine, theirs, expected in trees:
                np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))
                assert expected.sharding is None or mine.sharding == expected.sharding
