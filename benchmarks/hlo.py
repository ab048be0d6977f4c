"""What a compiled program says of itself: the bytes that its collectives move."""

import re

import numpy as np

_KINDS = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
_COLLECTIVE = re.compile(rf"= (\(?[^=]*?) ({_KINDS})(?:-start)?\(")
_BYTES = {"f64": 8, "s64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1}


def bytes_moved(program: str) -> dict[str, int]:
    """Bytes that a device receives, by kind of collective, each operation counted once."""
    total: dict[str, int] = {}
    for shapes, kind in _COLLECTIVE.findall(program):
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            count = int(np.prod([int(n) for n in sizes.split(",") if n] or [1]))
            total[kind] = total.get(kind, 0) + _BYTES[dtype] * count
    return total
