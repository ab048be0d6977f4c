"""A training step compiled for hardware that need not be present, and what the program reveals.

The program is the run's own: the same state, batch, mesh and step, as shapes without arrays.

    memory per device  arguments (parameters, optimizer state, batch), float32 gradients, and the
                       rest that the compiler reserves: activations and temporaries
    FLOPs              of the program's matrix products, and of those that the model needs
                       (`rwkv_jax.training.flops`)
    traffic            bytes that a device receives per step, by mesh axes (`collectives`)
    step time          between the longer of FLOPs at the chip's peak rate and traffic at its
                       links' (full overlap), and their sum (no overlap)
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from rwkv_jax import models, sharding
from rwkv_jax import params as tables
from rwkv_jax.config import Config, MeshConfig
from rwkv_jax.data.loader import Batch
from rwkv_jax.errors import UserError
from rwkv_jax.hardware import Topology
from rwkv_jax.planning.collectives import collectives
from rwkv_jax.training.flops import needed_flops, program_flops
from rwkv_jax.training.mesh import MeshError, make_mesh
from rwkv_jax.training.state import abstract_train_state
from rwkv_jax.training.step import make_train_step
from rwkv_jax.typing import PyTree

USABLE = 0.97
"""Fraction of a chip's memory available to programs; the rest is the runtime's."""


class PlanError(UserError):
    """A step that does not compile for the hardware."""


@dataclass(frozen=True)
class Plan:
    """What one step of a run needs; sizes are bytes per device.

    kernel         whether the recurrence runs as a Pallas kernel
    parameters     those that are trained
    frozen         the weights that an adapter belongs to
    carried        the batch, and the recurrent states carried to the next step
    rest           activations and temporaries
    program_flops  per step, all devices together
    needed_flops   the same, by the model's formula
    traffic        mesh axes -> kind of collective -> bytes received per step
    """

    cfg: Config
    topology: Topology
    mesh: dict[str, int]
    kernel: bool
    parameters: int
    frozen: int
    optimizer: int
    carried: int
    gradients: int
    rest: int
    program_flops: int
    needed_flops: int
    traffic: dict[tuple[str, ...], dict[str, int]]
    seconds_to_compile: float

    @property
    def memory(self) -> int:
        """Bytes per device in total."""
        state = self.parameters + self.frozen + self.optimizer
        return state + self.carried + self.gradients + self.rest

    @property
    def devices(self) -> int:
        """Number of devices."""
        return math.prod(self.mesh.values())

    @property
    def fits(self) -> bool | None:
        """Whether the chip's memory suffices; None if it is not known."""
        chip = self.topology.chip
        return None if chip is None else self.memory <= USABLE * chip.memory

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.cfg.train.batch * self.cfg.train.context

    @property
    def compute_seconds(self) -> float:
        """Seconds per step for its matrix products, at the chip's peak rate."""
        assert self.topology.chip
        return self.program_flops / self.devices / self.topology.chip.flops

    @property
    def traffic_seconds(self) -> float:
        """Seconds per step for its traffic, at `link_rate`."""
        return sum(sum(kinds.values()) for kinds in self.traffic.values()) / self.link_rate

    @property
    def link_rate(self) -> float:
        """Bytes per second that a chip receives. Between machines, data for all GPUs of a machine
        enters it once, over the networks of its GPUs together."""
        chip, hosts = self.topology.chip, self.topology.hosts
        assert chip
        if hosts == 1 or not chip.network:
            return chip.links
        return min(chip.links, chip.network * len(self.topology.devices) / hosts)

    @property
    def seconds(self) -> tuple[float, float]:
        """Per step: with full overlap of compute and traffic, and with none."""
        compute, traffic = self.compute_seconds, self.traffic_seconds
        return max(compute, traffic), compute + traffic

    @property
    def mfu(self) -> tuple[float, float]:
        """Model FLOPs utilisation that each of `seconds` gives."""
        assert self.topology.chip
        needed = self.needed_flops / self.devices / self.topology.chip.flops
        best, worst = self.seconds
        return needed / best, needed / worst


def make_plan(cfg: Config, topology: Topology) -> Plan:
    """Compiles the step of `cfg`, whose vocabulary and length must be known, for a topology.

    Raises `MeshError` for sizes that the mesh does not divide, `PlanError` if compiling fails.
    """
    mesh = make_mesh(cfg, topology.devices)
    state = abstract_train_state(cfg, mesh)
    batch = abstract_batch(cfg, mesh)
    if mesh is None:
        place = jax.sharding.SingleDeviceSharding(topology.devices[0])
        state, batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (state, batch)
        )
    started = time.monotonic()
    with sharding.use_mesh(mesh):
        traced = make_train_step(cfg).trace(state, batch)
        lowered = traced.lower(lowering_platforms=(topology.platform,))
        try:
            program = lowered.compile()
        except RuntimeError as error:  # JAX's errors are RuntimeErrors
            raise _compile_error(error) from error
    seconds = time.monotonic() - started
    shape = {} if mesh is None else dict(mesh.shape)
    memory = program.memory_analysis()
    assert memory is not None  # XLA's compilers for CPU, GPU and TPU report it
    gradients = min(_size(state.params), memory.temp_size_in_bytes)
    text = program.as_text() or ""
    traffic: dict[tuple[str, ...], dict[str, int]] = {}
    for one in collectives(text) if shape else ():
        kinds = traffic.setdefault(one.axes(shape), {})
        kinds[one.kind] = kinds.get(one.kind, 0) + one.received(shape)
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Plan(
        cfg=cfg,
        topology=topology,
        mesh=shape,
        kernel="custom-call" in text and ("tpu_custom_call" in text or "triton" in text),
        parameters=_size(state.params),
        frozen=_size(state.base),
        optimizer=_size(state.opt_state),
        carried=_size(state.carried) + _size(batch),
        gradients=gradients,
        rest=memory.temp_size_in_bytes - gradients + new,
        program_flops=program_flops(traced.jaxpr.jaxpr),
        needed_flops=needed_flops(cfg) * cfg.train.batch * cfg.train.context,
        traffic=traffic,
        seconds_to_compile=seconds,
    )


def abstract_batch(cfg: Config, mesh: Any) -> Batch:
    """A step's batch as shapes, sharded as in a run."""
    shape = (cfg.train.batch, cfg.train.context)
    place = None if mesh is None else sharding.named(mesh, "batch", "time")

    def array(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    masked = cfg.data.packing == "documents" or cfg.data.train_on != "all"
    mask = array(jnp.bool_) if masked else None
    return Batch(array(jnp.int32), array(jnp.int32), array(jnp.bool_), mask)


def _size(tree: PyTree) -> int:
    """Bytes per device of a tree of arrays or shapes."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _compile_error(error: RuntimeError) -> PlanError:
    line = str(error).strip().splitlines()[0]
    if "RESOURCE_EXHAUSTED" in line:
        return PlanError(
            f"does not fit the chip's memory ({line[:200]}); raise train.accumulate, set"
            " train.remat=block, or give more devices"
        )
    return PlanError(f"the compiler rejects this step ({line[:300]})")


def fit(cfg: Config, topology: Topology, tries: int) -> Iterator[tuple[Config, Plan | PlanError]]:
    """Compiles up to `tries` of `candidates`, one after the other.

    Skips those whose minimum memory is too large, and others of a `tensor` size that already fits.
    """
    assert topology.chip
    fitting, tried = set(), 0
    for candidate in candidates(cfg, len(topology.devices)):
        try:
            mesh = make_mesh(candidate, topology.devices)
        except MeshError:
            continue
        shape = {} if mesh is None else dict(mesh.shape)
        tensor = candidate.mesh.tensor
        if tensor in fitting or minimum_memory(candidate, shape) > topology.chip.memory:
            continue
        if tried == tries:
            return
        tried += 1
        try:
            plan = make_plan(candidate, topology)
        except PlanError as error:
            yield candidate, error
            continue
        if plan.fits:
            fitting.add(tensor)
        yield candidate, plan


def candidates(cfg: Config, devices: int) -> Iterator[Config]:
    """Variants of a run for so many devices, those that are likely faster first: little traffic,
    then little recomputation, then few parts of a batch."""
    for tensor in (n for n in (1, 2, 4, 8) if devices % n == 0):
        for remat in ("none", "dots", "block"):
            for parts in (n for n in range(1, cfg.train.batch + 1) if cfg.train.batch % n == 0):
                mesh = MeshConfig(data=1, fsdp=-1, tensor=tensor, sequence=cfg.mesh.sequence)
                train = replace(cfg.train, remat=remat, accumulate=parts)
                yield replace(cfg, mesh=mesh, train=train)


def minimum_memory(cfg: Config, mesh: dict[str, int]) -> int:
    """A rough lower bound on the bytes per device of a run, so that hopeless ones are not compiled:
    parameters, gradients, two moments (or frozen weights), and the saved activations in the
    compute type (half of what versions 6 and 7 were measured to save)."""
    data, fsdp, tensor, sequence = (
        mesh.get(axis, 1) for axis in ("data", "fsdp", "tensor", "sequence")
    )
    each = 4 * 4 if cfg.tune.method == "full" else 4 if cfg.tune.base == "float32" else 2
    state = each * tables.count(models.specs(cfg.model)) / (fsdp * tensor)
    rows = cfg.train.batch / cfg.train.accumulate / fsdp / data
    tokens = rows * cfg.train.context / sequence
    layers = cfg.model.width * cfg.model.layers * jnp.dtype(cfg.train.dtype).itemsize
    return int(state + tokens * layers * {"dots": 6, "none": 12}.get(cfg.train.remat, 1))
