"""A run's devices: their mesh, what of the training state and of a batch each of them has.

What doesn't divide is told before anything is compiled: a mesh that runs has equal parts.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
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
"""From the slowest links to the fastest: neighbours share the tensor axis, which sends most."""


class MeshError(UserError):
    """A mesh that the devices cannot form, or that the run does not divide over."""


def make_mesh(cfg: Config, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh of `cfg` over these devices (None: all there are), its axes of one device left out;
    None for a single device.

    Raises `MeshError` if the devices do not make it up, or heads, width, batch or context do not
    divide over it.
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
        what_does = " or ".join(f"mesh.{name} = {n}" for name, n in nearest)
        raise MeshError(
            f"{written}: {stated} devices, and there are {count}; what"
            f" {'divides' if rest else 'fits'} them: {what_does or 'fewer along each'}"
        )
    if not rest and stated < count and jax.process_count() > 1:
        raise MeshError(
            f"{written or 'mesh'}: {stated} devices of {count}, and every process needs to take"
            " part; set one of mesh.data and mesh.fsdp to -1 (the rest)"
        )
    sizes |= dict.fromkeys(rest, count // stated)
    return {name: sizes[name] for name in AXES}


def _check_divides(cfg: Config, shape: dict[str, int]) -> None:
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
                f" {_either(_divisors(size, count))}"
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
            what_does = [f"{name} = {' or '.join(near)}"]
            if parts > 1 and size % count == 0:
                fewer = max(n for n in range(1, parts) if size % (count * n) == 0)
                what_does.append(f"train.accumulate = {fewer}")
            for axis in axes:
                rest = whole // shape.get(axis, 1)
                if axis in shape and size % rest == 0 and jax.process_count() == 1:
                    # Of what it divides by now, so that width and heads still do.
                    divisors = (n for n in range(1, shape[axis]) if shape[axis] % n == 0)
                    fewer = max(n for n in divisors if size % (rest * n) == 0)
                    what_does.append(f"mesh.{axis} = {fewer}")
            raise MeshError(
                f"{name} = {size}{each} does not divide over the {count} devices of {written};"
                f" what does: {', '.join(what_does)}"
            )


def _count(axes: tuple[str, ...], shape: dict[str, int]) -> tuple[int, str]:
    """Devices along these axes together, and how the config writes them."""
    there = [f"mesh.{axis} = {shape[axis]}" for axis in axes if axis in shape]
    return math.prod(shape.get(axis, 1) for axis in axes), " x ".join(there)


def _divisors(size: int, near: int) -> list[int]:
    """The divisors of `size` next to `near`, below and above."""
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    below, above = [n for n in divisors if n < near], [n for n in divisors if n > near]
    return below[-1:] + above[:1]


def _either(numbers: list[int]) -> str:
    return " and ".join(f"{n:,}" for n in numbers)


def params_shardings(specs: PyTree, mesh: Mesh) -> PyTree:
    """Where the parameters of a table lie."""

    def one(spec):
        axes = spec.axes or (None,) * len(spec.shape)
        parted = sharding.spec(axes, mesh, spec.shape)
        return NamedSharding(mesh, PartitionSpec(*[None] * bool(spec.layers), *parted))

    return jax.tree.map(one, specs, is_leaf=is_spec)


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Where recurrent states [layers, b, ...] lie."""
    return sharding.named(mesh, None, "batch")


def stop_flag(mesh: Mesh, asked: bool) -> Array:
    """What this process says to all: a number for each of its devices, to be added up by a step."""
    place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.make_array_from_callback((mesh.size,), place, lambda _: np.full(1, asked, np.int32))


class Rows:
    """The rows of every batch that the devices of this process need."""

    def __init__(self, loader: Loader, mesh: Mesh):
        self.loader = loader
        self._sharding = sharding.named(mesh, "batch", "time")
        self._shape = (loader.batch, loader.context)
        places: Any = self._sharding.addressable_devices_indices_map(self._shape).values()
        every = np.arange(loader.batch)
        self.rows = np.unique(np.concatenate([every[place[0]] for place in places]))

    def read(self, step: int) -> Batch:
        """The batch of a step, each device's part on it; other processes read the others."""
        return jax.tree.map(self._place, self.loader.read(step, self.rows))

    def _place(self, mine: np.ndarray) -> Array:
        def piece(place: Any) -> np.ndarray:
            start, stop, _ = place[0].indices(self._shape[0])
            first, last = np.searchsorted(self.rows, [start, stop])
            return mine[first:last, place[1]]

        return jax.make_array_from_callback(self._shape, self._sharding, piece)


def gather_to_host(params: PyTree) -> PyTree:
    """Parameters as arrays of this process alone, whole; every process has to ask."""
    return jax.tree.map(
        lambda x: jnp.asarray(multihost_utils.process_allgather(x, tiled=True)), params
    )
