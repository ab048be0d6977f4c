"""A run's devices: their mesh, and how the training state and batches are sharded across it.

Sizes that a mesh does not divide are rejected before anything is compiled: all shards are equal.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rwkv_jax import sharding
from rwkv_jax.config import Config, MeshConfig
from rwkv_jax.data.loader import Batch, Loader
from rwkv_jax.errors import UserError
from rwkv_jax.params import is_spec
from rwkv_jax.typing import Array, PyTree

AXES = ("data", "fsdp", "sequence", "tensor")
"""From the slowest links to the fastest: along the tensor axis, which sends most, devices are
neighbours."""


class MeshError(UserError):
    """A mesh that the devices cannot form, or that does not divide the run's sizes."""


def make_mesh(cfg: Config, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh that `cfg` asks for, of these devices (None: all) and without axes of one device;
    None for a single device.

    Raises `MeshError` if the devices cannot form it, or it does not divide heads, width, batch or
    context.
    """
    devices = jax.devices() if devices is None else devices
    shape = {name: n for name, n in _sizes(cfg.mesh, len(devices)).items() if n > 1}
    _check_divides(cfg, shape)
    if not shape:
        return None
    used = list(devices)[: math.prod(shape.values())]
    types = (AxisType.Explicit,) * len(shape)
    return jax.make_mesh(tuple(shape.values()), tuple(shape), types, devices=used)


def _sizes(mesh: MeshConfig, count: int) -> dict[str, int]:
    """Devices along each axis, in the order of `AXES`."""
    sizes = asdict(mesh)
    stated = math.prod(n for n in sizes.values() if n > 0)
    written = " x ".join(f"mesh.{name} = {n}" for name, n in sizes.items() if n > 1)
    rest = [name for name, n in sizes.items() if n == -1]

    def fits(devices: int) -> bool:
        return count % devices == 0 if rest else devices <= count

    if not fits(stated):
        others = {
            (name, other): max(n, other) / min(n, other)
            for name, n in sizes.items()
            for other in range(1, count + 1)
            if n > 1 and fits(stated // n * other)
        }
        nearest = [axis for axis, far in others.items() if far == min(others.values())]
        fault = "do not divide" if rest else "are more than"
        remedy = " or ".join(f"mesh.{name} = {n}" for name, n in nearest)
        raise MeshError(
            f"{written}: {stated} devices {fault} the {count} available;"
            f" set {remedy or 'fewer along each axis'}"
        )
    if not rest and stated < count and jax.process_count() > 1:
        raise MeshError(
            f"{written or 'mesh'}: {stated} devices of {count}, and every process needs to take"
            " part; set one of mesh.data and mesh.fsdp to -1 (the rest)"
        )
    sizes |= dict.fromkeys(rest, count // stated)
    return {name: sizes[name] for name in AXES}


def _check_divides(cfg: Config, shape: dict[str, int]) -> None:
    """Raises `MeshError` if axes of these sizes do not divide what they shard."""
    model, train = cfg.model, cfg.train
    heads = "heads" if model.heads < model.width else "channels"
    hidden = "hidden channels of the channel mix (model.ffn_width)"
    needed = (
        (("fsdp",), model.width, f"channels of model.width = {model.width}"),
        (("tensor",), model.heads, f"{heads} of model.width = {model.width}"),
        (("tensor",), model.ffn, hidden),
        (("tensor", "fsdp"), model.width, f"channels of model.width = {model.width}"),
    )
    for axes, size, what in needed:
        count, written = _count(axes, shape)
        if size % count:
            raise MeshError(
                f"{written} does not divide the {size} {what}; the nearest that do:"
                f" {_nearest_divisors(size, count)}"
            )
    for axes, size, name, parts in (
        (("data", "fsdp"), train.batch, "train.batch", train.accumulate),
        (("sequence",), train.context, "train.context", 1),
    ):
        count, written = _count(axes, shape)
        whole = count * parts
        if size % whole:
            each = f" in train.accumulate = {parts} parts" if parts > 1 else ""
            near = [f"{x:,}" for x in (size - size % whole, size + -size % whole) if x]
            remedies = [f"{name} = {' or '.join(near)}"]
            if parts > 1 and size % count == 0:
                fewer = max(n for n in range(1, parts) if size % (count * n) == 0)
                remedies.append(f"train.accumulate = {fewer}")
            for axis in axes:
                rest = whole // shape.get(axis, 1)
                if axis in shape and size % rest == 0 and jax.process_count() == 1:
                    # A divisor of the present size, so that it still divides width and heads.
                    divisors = (n for n in range(1, shape[axis]) if shape[axis] % n == 0)
                    fewer = max(n for n in divisors if size % (rest * n) == 0)
                    remedies.append(f"mesh.{axis} = {fewer}")
            raise MeshError(
                f"{name} = {size}{each} is not divisible by the {count} devices of {written};"
                f" set {', or '.join(remedies)}"
            )


def _count(axes: tuple[str, ...], shape: dict[str, int]) -> tuple[int, str]:
    """Devices along these axes together, and how the config writes them."""
    present = [f"mesh.{axis} = {shape[axis]}" for axis in axes if axis in shape]
    return math.prod(shape.get(axis, 1) for axis in axes), " x ".join(present)


def _nearest_divisors(size: int, near: int) -> str:
    """The divisors of `size` next to `near`, below and above, as text."""
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    below, above = [n for n in divisors if n < near], [n for n in divisors if n > near]
    return " and ".join(f"{n:,}" for n in below[-1:] + above[:1])


def params_shardings(specs: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of each parameter of a table."""

    def one(spec):
        axes = sharding.spec(spec.axes or (None,) * len(spec.shape), mesh, spec.shape)
        return NamedSharding(mesh, PartitionSpec(*[None] * bool(spec.layers), *axes))

    return jax.tree.map(one, specs, is_leaf=is_spec)


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of recurrent states [layers, b, ...]."""
    return sharding.named(mesh, None, "batch")


def with_stop_vote(
    train_step: Callable, mesh: Mesh
) -> Callable[[PyTree, Batch, bool], tuple[PyTree, PyTree, Array]]:
    """The step of one of several processes: `(state, batch, stop) -> (state, metrics, votes)`.

    `stop` is whether this process was asked to stop; `votes`, the same on all processes, is the
    number of devices whose process was. Summed within the step, it costs no collective of its own.
    """
    place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    @partial(jax.jit, donate_argnums=0)
    def voting(state, batch, votes):
        return *train_step(state, batch), jnp.sum(votes)

    def step(state: PyTree, batch: Batch, stop: bool) -> tuple[PyTree, PyTree, Array]:
        def vote(_: Any) -> np.ndarray:
            return np.full(1, stop, np.int32)

        votes = jax.make_array_from_callback((mesh.size,), place, vote)
        return voting(state, batch, votes)

    return step


class LocalRows:
    """Reads those rows of every batch that the devices of this process need."""

    def __init__(self, loader: Loader, mesh: Mesh):
        self.loader = loader
        self._sharding = sharding.named(mesh, "batch", "time")
        self._shape = (loader.batch, loader.context)
        indices: Any = self._sharding.addressable_devices_indices_map(self._shape).values()
        every = np.arange(loader.batch)
        self.rows = np.unique(np.concatenate([every[index[0]] for index in indices]))

    def read(self, step: int) -> Batch:
        """The batch of a step, each device's shard on it; other processes read the other rows."""
        return jax.tree.map(self._put, self.loader.read(step, self.rows))

    def _put(self, mine: np.ndarray) -> Array:
        def shard(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(self._shape[0])
            first, last = np.searchsorted(self.rows, [start, stop])
            return mine[first:last, index[1]]

        return jax.make_array_from_callback(self._shape, self._sharding, shard)


def gather_to_host(params: PyTree) -> PyTree:
    """Parameters all-gathered into arrays of this process alone. A collective: all must call it."""
    return jax.tree.map(
        lambda x: jnp.asarray(multihost_utils.process_allgather(x, tiled=True)), params
    )
