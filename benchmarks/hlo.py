"""What a compiled program says of itself: the bytes that its collectives move."""

import re
from functools import cache

import numpy as np

_KINDS = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
_COLLECTIVE = re.compile(rf"= (\(?[^=]*?) ({_KINDS})(?:-start)?\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", re.M | re.S)
_CALLED = re.compile(r"(?:to_apply|body|calls|branch_computations|called_computations)=")
_TIMES = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BYTES = {"f64": 8, "s64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1}


def bytes_moved(program: str) -> dict[str, int]:
    """Bytes that a device receives, by kind of collective: of one in a loop, every time."""
    bodies, main = {}, ""
    for entry, name, body in _COMPUTATION.findall(program):
        bodies[name] = body
        main = name if entry else main

    @cache
    def moved(name: str) -> dict[str, int]:
        total: dict[str, int] = {}
        for line in bodies.get(name, "").splitlines():
            for shapes, kind in _COLLECTIVE.findall(line):
                total[kind] = total.get(kind, 0) + _size(shapes)
            if not (called := _CALLED.search(line)):
                continue
            times = int(found[1]) if (found := _TIMES.search(line)) else 1
            for callee in re.findall(r"%([\w.\-]+)", line[called.start() :]):
                for kind, count in moved(callee).items():
                    total[kind] = total.get(kind, 0) + times * count
        return total

    return moved(main)


def _size(shapes: str) -> int:
    total = 0
    for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
        total += _BYTES[dtype] * int(np.prod([int(n) for n in sizes.split(",") if n] or [1]))
    return total
