"""What the devices of a compiled program tell each other: read from XLA's text of it."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")

_COLLECTIVE = re.compile(rf"= (\(?[^=]*?) ({'|'.join(KINDS)})(-start)?\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", re.M | re.S)
_CALLED = re.compile(r"(?:to_apply|body|calls|branch_computations|called_computations)=")
_ENDS = re.compile(r"\b(?:[\w-]+-(?:done|update))\(")
_CHAIN = re.compile(r"channel_id=(\d+),.*chain_id=")
_REMARK = re.compile(r"/\*.*?\*/")
_CONDITION = re.compile(r"\bwhile\(.*condition=%([\w.\-]+)")
_CONSTANT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_SCATTERED = "all-reduce-scatter"
"""What a compiler for TPUs calls an all-reduce of which each device keeps its part."""
_TIMES = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}")
_ORDER = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_IOTA = re.compile(rf"replica_groups=\[([\d,]+)\]<={_ORDER}")
_NAMED = re.compile(
    rf"replica_groups=mesh\[([^\]]+)\](?:, device_ids=\({_ORDER}\))? \{{([^}}]*)\}}"
)
_BITS = re.compile(r"[a-z]+(\d+)")


@dataclass(frozen=True)
class Collective:
    """One exchange, as often as the program makes it."""

    kind: str
    size: int
    """Bytes of its result on a device."""
    groups: np.ndarray | None
    """int [groups, members]: the devices that take part together, or of a permute from and to;
    None: all."""
    times: int

    def axes(self, shape: dict[str, int]) -> tuple[str, ...]:
        """The mesh axes along which it goes, of a mesh of this shape."""
        if self.groups is None:
            return tuple(shape)
        places = np.stack(np.unravel_index(self.groups, tuple(shape.values())), -1)
        varies = (places != places[:, :1]).any((0, 1))
        return tuple(name for name, does in zip(shape, varies, strict=True) if does)

    def received(self, shape: dict[str, int]) -> int:
        """Bytes that a device receives, every time together, by an algorithm that moves least."""
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
    """Those of a compiled program (`compiled.as_text()`)."""
    bodies, main = {}, ""
    for entry, name, body in _COMPUTATION.findall(_REMARK.sub("", program)):
        bodies[name] = body
        main = name if entry else main

    @cache
    def within(name: str) -> tuple[tuple[str, int, bool], ...]:
        """The collectives' lines, how often they run, and whether only a part is kept."""
        found = []
        for line in bodies.get(name, "").splitlines():
            if _COLLECTIVE.search(line):
                found.append((line, 1, name.startswith(_SCATTERED)))
                continue
            if _ENDS.search(line) or not (called := _CALLED.search(line)):
                continue
            times = _trips(line, bodies)
            for callee in re.findall(r"%([\w.\-]+)", line[called.start() :]):
                found += [(inner, times * count, part) for inner, count, part in within(callee)]
        return tuple(found)

    chained = set()
    for line, times, part in within(main):
        if chain := _CHAIN.search(line):
            # One that is spread over several computations, to go on beside them.
            if chain[1] in chained:
                continue
            chained.add(chain[1])
        match = _COLLECTIVE.search(line)
        assert match
        shapes, kind, starts = match.groups()
        size, groups = _size(shapes, kind, bool(starts)), _groups(line)
        if part and kind == "all-reduce" and groups is not None:
            kind, size = "reduce-scatter", size // groups.shape[1]
        yield Collective(kind, size, groups, times)


def _trips(line: str, bodies: dict[str, str]) -> int:
    """How often a line runs what it calls: a loop's bound stands in its condition."""
    if known := _TIMES.search(line):
        return int(known[1])
    if not (condition := _CONDITION.search(line)):
        return 1
    return max(map(int, _CONSTANT.findall(bodies.get(condition[1], ""))), default=1)


def _size(shapes: str, kind: str, starts: bool) -> int:
    sizes = [_bytes(*shape) for shape in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes)]
    if starts and kind == "collective-permute":
        return sizes[1]  # what is sent, what comes, and signs of how far it is
    if starts and kind == "all-gather":
        return sum(sizes[len(sizes) // 2 :])  # operands, then results
    return sum(sizes)


def _bytes(dtype: str, shape: str) -> int:
    bits = int(found[1]) if (found := _BITS.fullmatch(dtype)) else 8
    return max(bits, 8) // 8 * math.prod(int(n) for n in shape.split(",") if n)


def _groups(line: str) -> np.ndarray | None:
    if found := _LISTED.search(line):
        rows = re.findall(r"\{([\d, ]+)\}", found[1])
        return np.array([[int(n) for n in row.split(",")] for row in rows])
    if found := _NAMED.search(line):
        given, counted, order, along = found.groups()
        sizes = _numbers(",".join(re.findall(r"=(\d+)", given)))
        names = re.findall(r"'([^']*)'=", given)
        mine = [i for i, name in enumerate(names) if f"'{name}'" in along]
        others = [i for i in range(len(sizes)) if i not in mine]
        devices = _devices(_numbers(counted) or sizes, order).reshape(sizes)
        return devices.transpose(others + mine).reshape(-1, math.prod(sizes[i] for i in mine))
    if not (found := _IOTA.search(line)):
        return None
    shape, counted, order = found.groups()
    return _devices(_numbers(counted), order).reshape(_numbers(shape))


def _devices(counted: list[int], order: str | None) -> np.ndarray:
    """Devices numbered along these axes, looked at along them in this order."""
    devices = np.arange(math.prod(counted)).reshape(counted)
    return devices.transpose(_numbers(order)) if order else devices


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in text.split(",")] if text else []
