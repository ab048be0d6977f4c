"""A training step compiled for hardware that need not be there, and what it says of a run.

The program is the run's own: the same state, batch, mesh and step, as shapes without arrays.

    memory a device    arguments (parameters, optimizer, what is carried), the float32 gradients,
                       and the rest that the compiler reserves: activations and temporaries
    products           floating-point operations of the program's matrix products, and of those
                       that the model needs (`flops.py`)
    traffic            bytes that a device receives a step, by mesh axes (`collectives.py`)
    step time          at best: the longer of products at the chip's peak rate and traffic at its
                       links' (perfect overlap); without any overlap: their sum
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
from rwkv_jax.training.flops import model_flops, program_flops
from rwkv_jax.training.mesh import MeshError, make_mesh
from rwkv_jax.training.state import abstract_train_state
from rwkv_jax.training.step import make_train_step
from rwkv_jax.typing import PyTree

USABLE = 0.97
"""Share of a chip's memory that programs get; the rest is the runtime's."""


class PlanError(UserError):
    """A run that cannot be planned."""


@dataclass(frozen=True)
class Plan:
    """What one step of a run needs; bytes of one device, unless said otherwise."""

    cfg: Config
    topology: Topology
    mesh: dict[str, int]
    kernel: bool
    """Whether the recurrence is a kernel of ours."""
    parameters: int
    optimizer: int
    carried: int
    gradients: int
    rest: int
    program_flops: int
    """Of all devices together."""
    needed_flops: int
    """Of all devices together, by the model's formula."""
    traffic: dict[tuple[str, ...], dict[str, int]]
    """Mesh axes -> kind of collective -> bytes."""
    seconds_to_compile: float

    @property
    def memory(self) -> int:
        """All of it."""
        return self.parameters + self.optimizer + self.carried + self.gradients + self.rest

    @property
    def devices(self) -> int:
        """How many take part."""
        return math.prod(self.mesh.values())

    @property
    def fits(self) -> bool | None:
        """Whether a chip has the memory; None where it is not known."""
        chip = self.topology.chip
        return None if chip is None else self.memory <= USABLE * chip.memory

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.cfg.train.batch * self.cfg.train.context

    @property
    def computing(self) -> float:
        """Seconds of a step for its products, at the peak rate."""
        assert self.topology.chip
        return self.program_flops / self.devices / self.topology.chip.flops

    @property
    def telling(self) -> float:
        """Seconds of a step for its traffic, at the links' rate."""
        return sum(sum(kinds.values()) for kinds in self.traffic.values()) / self.link_rate

    @property
    def link_rate(self) -> float:
        """Bytes a second that a chip receives. Between machines of GPUs what goes to all of one
        enters it once, over the network of all its GPUs."""
        chip, hosts = self.topology.chip, self.topology.hosts
        assert chip
        if hosts == 1 or not chip.network:
            return chip.links
        return min(chip.links, chip.network * len(self.topology.devices) / hosts)

    @property
    def seconds(self) -> tuple[float, float]:
        """Of a step: with perfect overlap, with none."""
        return max(self.computing, self.telling), self.computing + self.telling


def make_plan(cfg: Config, topology: Topology) -> Plan:
    """Compiles the step of a run whose vocabulary and length are known.

    Raises `MeshError` for what does not divide, `PlanError` if the compiler refuses it.
    """
    mesh = make_mesh(cfg, topology.devices)
    state = abstract_train_state(cfg, cfg.model, mesh)
    batch = abstract_batch(cfg, mesh)
    if mesh is None:
        place = jax.sharding.SingleDeviceSharding(topology.devices[0])
        state, batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (state, batch)
        )
    platform = topology.platform
    began = time.monotonic()
    with sharding.use_mesh(mesh):
        traced = make_train_step(cfg, cfg.model).trace(state, batch)
        lowered = traced.lower(lowering_platforms=(platform,))
        try:
            program = lowered.compile()
        except RuntimeError as error:  # JAX's errors are RuntimeErrors
            raise _refused(error) from error
    seconds = time.monotonic() - began
    shape = {} if mesh is None else dict(mesh.shape)
    memory = program.memory_analysis()
    assert memory is not None  # of XLA's compilers for CPU, GPU and TPU
    gradients = min(_size(state.params), memory.temp_size_in_bytes)
    text = program.as_text() or ""
    traffic: dict[tuple[str, ...], dict[str, int]] = {}
    for exchange in collectives(text) if shape else ():
        kinds = traffic.setdefault(exchange.axes(shape), {})
        kinds[exchange.kind] = kinds.get(exchange.kind, 0) + exchange.received(shape)
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Plan(
        cfg=cfg,
        topology=topology,
        mesh=shape,
        kernel="custom-call" in text and ("tpu_custom_call" in text or "triton" in text),
        parameters=_size(state.params),
        optimizer=_size(state.opt_state),
        carried=_size(state.carried) + _size(batch),
        gradients=gradients,
        rest=memory.temp_size_in_bytes - gradients + new,
        program_flops=program_flops(traced.jaxpr.jaxpr),
        needed_flops=model_flops(cfg.model) * cfg.train.batch * cfg.train.context,
        traffic=traffic,
        seconds_to_compile=seconds,
    )


def abstract_batch(cfg: Config, mesh: Any) -> Batch:
    """A step's rows as shapes, parted as a run's are."""
    shape = (cfg.train.batch, cfg.train.context)
    place = None if mesh is None else sharding.named(mesh, "batch", "time")

    def array(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    masked = cfg.data.packing == "documents" or cfg.data.train_on != "all"
    mask = array(jnp.bool_) if masked else None
    return Batch(array(jnp.int32), array(jnp.int32), array(jnp.bool_), mask)


def _size(tree: PyTree) -> int:
    """Bytes of a tree on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _refused(error: RuntimeError) -> UserError:
    line = str(error).strip().splitlines()[0]
    if "RESOURCE_EXHAUSTED" in line:
        return PlanError(
            f"does not fit the chip's memory ({line[:200]}); raise train.accumulate, set"
            " train.remat=block, or give more devices"
        )
    return PlanError(f"the compiler refuses this step ({line[:300]})")


def candidates(cfg: Config, count: int) -> Iterator[Config]:
    """Runs like this one on so many devices, those that are likely faster first: few exchanges
    before many, little made twice before much, large parts of a batch before small ones."""
    rows = cfg.train.batch
    for tensor in (1, 2, 4, 8):
        if count % tensor:
            continue
        for remat in ("none", "dots", "block"):
            for accumulate in (n for n in range(1, rows + 1) if rows % n == 0):
                mesh = MeshConfig(data=1, fsdp=-1, tensor=tensor, sequence=cfg.mesh.sequence)
                train = replace(cfg.train, remat=remat, accumulate=accumulate)
                yield replace(cfg, mesh=mesh, train=train)


def least_memory(cfg: Config, mesh: dict[str, int]) -> int:
    """About the bytes of a device that a program of this run needs, so that what is far too large
    is not compiled: parameters, their gradients, two moments, and what the layers keep for the
    backward pass, in the compute type (half of what versions 6 and 7 were seen to keep)."""
    share = mesh.get("fsdp", 1) * mesh.get("tensor", 1)
    state = 4 * 4 * tables.count(models.specs(cfg.model)) / share
    rows = cfg.train.batch / cfg.train.accumulate / mesh.get("fsdp", 1) / mesh.get("data", 1)
    kept = {"dots": 6, "none": 12}.get(cfg.train.remat, 1)
    tokens = rows * cfg.train.context / mesh.get("sequence", 1)
    layers = cfg.model.width * cfg.model.layers * jnp.dtype(cfg.train.dtype).itemsize
    return int(state + tokens * layers * kept)


def fit(cfg: Config, topology: Topology, tries: int) -> Iterator[Plan | tuple[Config, str]]:
    """Plans of `candidates`, compiled one after the other, or why one is none; those are left out
    whose least memory is too much, and all after the first of a mesh that fits. At most `tries`."""
    assert topology.chip
    done, tried = set(), 0
    for candidate in candidates(cfg, len(topology.devices)):
        try:
            mesh = make_mesh(candidate, topology.devices)
        except MeshError:
            continue
        shape = {} if mesh is None else dict(mesh.shape)
        tensor = shape.get("tensor", 1)
        if tensor in done or least_memory(candidate, shape) > topology.chip.memory:
            continue
        if tried == tries:
            return
        tried += 1
        try:
            plan = make_plan(candidate, topology)
        except PlanError as error:
            yield candidate, str(error)
            continue
        yield plan
        if plan.fits:
            done.add(tensor)
