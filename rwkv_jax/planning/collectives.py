"""Collectives of a compiled program, read from XLA's text of it (HLO)."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")

_COMMENT = re.compile(r"/\*.*?\*/")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", re.M | re.S)
_COLLECTIVE = re.compile(rf"= (\(?[^=]*?) ({'|'.join(KINDS)})(-start)?\(")
_SCATTERED = "all-reduce-scatter"
"""A TPU compiler's name for an all-reduce of which each device keeps one shard."""
_CHAIN = re.compile(r"channel_id=(\d+),.*chain_id=")
_DONE = re.compile(r"\b(?:[\w-]+-(?:done|update))\(")
_CALLED = re.compile(r"(?:to_apply|body|calls|branch_computations|called_computations)=")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"\bwhile\(.*condition=%([\w.\-]+)")
_CONSTANT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_LISTED_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_IOTA_GROUPS = re.compile(rf"replica_groups=\[([\d,]+)\]<={_IOTA}")
_MESH_GROUPS = re.compile(
    rf"replica_groups=mesh\[([^\]]+)\](?:, device_ids=\({_IOTA}\))? \{{([^}}]*)\}}"
)


@dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    size    bytes of its result on one device
    groups  int [groups, members]: the devices of each group, or a permute's (source, target) pairs;
            None: one group of all devices
    times   how often the program runs it
    """

    kind: str
    size: int
    groups: np.ndarray | None
    times: int

    def axes(self, shape: dict[str, int]) -> tuple[str, ...]:
        """The mesh axes that it communicates over, in a mesh of this shape."""
        if self.groups is None:
            return tuple(shape)
        places = np.stack(np.unravel_index(self.groups, tuple(shape.values())), -1)
        varies = (places != places[:, :1]).any((0, 1))
        return tuple(name for name, does in zip(shape, varies, strict=True) if does)

    def received(self, shape: dict[str, int]) -> int:
        """Bytes that each device receives in total, by a bandwidth-optimal algorithm."""
        members = max(math.prod(shape[name] for name in self.axes(shape)), 1)
        others = (members - 1) / members
        factor = {
            "all-gather": others,
            "all-reduce": 2 * others,
            "reduce-scatter": members - 1,
            "all-to-all": others,
            "collective-permute": 1,
        }[self.kind]
        return round(self.times * self.size * factor)


def bytes_moved(program: str) -> dict[str, int]:
    """Bytes of the collectives' results on one device, by kind, summed over all executions."""
    total: dict[str, int] = {}
    for exchange in collectives(program):
        total[exchange.kind] = total.get(exchange.kind, 0) + exchange.times * exchange.size
    return total


def collectives(program: str) -> Iterator[Collective]:
    """The collectives of a compiled program (`compiled.as_text()`)."""
    bodies, main = {}, ""
    for entry, name, body in _COMPUTATION.findall(_COMMENT.sub("", program)):
        bodies[name] = body
        main = name if entry else main

    @cache
    def within(name: str) -> tuple[tuple[str, int, bool], ...]:
        """(line, times, scattered) of each collective that a computation runs."""
        found = []
        for line in bodies.get(name, "").splitlines():
            if _COLLECTIVE.search(line):
                found.append((line, 1, name.startswith(_SCATTERED)))
                continue
            if _DONE.search(line) or not (called := _CALLED.search(line)):
                continue
            times = _trips(line, bodies)
            for callee in re.findall(r"%([\w.\-]+)", line[called.start() :]):
                found += [(inner, times * n, scattered) for inner, n, scattered in within(callee)]
        return tuple(found)

    seen = set()
    for line, times, scattered in within(main):
        if chain := _CHAIN.search(line):
            # One asynchronous collective, fused in parts into several computations.
            if chain[1] in seen:
                continue
            seen.add(chain[1])
        match = _COLLECTIVE.search(line)
        assert match
        shapes, kind, starts = match.groups()
        size, groups = _size(shapes, kind, bool(starts)), _groups(line)
        if scattered and kind == "all-reduce" and groups is not None:
            kind, size = "reduce-scatter", size // groups.shape[1]
        yield Collective(kind, size, groups, times)


def _trips(line: str, bodies: dict[str, str]) -> int:
    """How often a line runs what it calls; a loop without a trip count has it in its condition."""
    if known := _TRIP_COUNT.search(line):
        return int(known[1])
    if not (condition := _CONDITION.search(line)):
        return 1
    return max(map(int, _CONSTANT.findall(bodies.get(condition[1], ""))), default=1)


def _size(shapes: str, kind: str, starts: bool) -> int:
    sizes = [_bytes(*shape) for shape in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes)]
    if starts and kind == "collective-permute":
        return sizes[1]  # operand, result, and context values
    if starts and kind == "all-gather":
        return sum(sizes[len(sizes) // 2 :])  # operands, then results
    return sum(sizes)


def _bytes(dtype: str, shape: str) -> int:
    bits = int(found[1]) if (found := re.fullmatch(r"[a-z]+(\d+)", dtype)) else 8
    return max(bits, 8) // 8 * math.prod(int(n) for n in shape.split(",") if n)


def _groups(line: str) -> np.ndarray | None:
    if found := _LISTED_GROUPS.search(line):
        rows = re.findall(r"\{([\d, ]+)\}", found[1])
        return np.array([_numbers(row) for row in rows])
    if found := _IOTA_GROUPS.search(line):
        shape, counted, order = found.groups()
        return _devices(_numbers(counted), order).reshape(_numbers(shape))
    if not (found := _MESH_GROUPS.search(line)):
        return None
    axes, counted, order, grouped = found.groups()
    names, sizes = zip(*re.findall(r"'([^']*)'=(\d+)", axes), strict=True)
    sizes = [int(size) for size in sizes]
    inner = [i for i, name in enumerate(names) if f"'{name}'" in grouped]
    outer = [i for i in range(len(sizes)) if i not in inner]
    devices = _devices(_numbers(counted) if counted else sizes, order).reshape(sizes)
    return devices.transpose(outer + inner).reshape(-1, math.prod(sizes[i] for i in inner))


def _devices(shape: list[int], order: str | None) -> np.ndarray:
    """Device numbers in a grid of this shape, its axes transposed into `order`."""
    devices = np.arange(math.prod(shape)).reshape(shape)
    return devices.transpose(_numbers(order)) if order else devices


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]
