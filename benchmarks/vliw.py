"""How long a TPU kernel takes, read in the program that libtpu wrote for it: no TPU is needed.

A TPU's core executes bundles, one a cycle, each of which names what every unit does; the compiler
decides all waiting. Asked by `--xla_jf_dump_to` and `--xla_jf_dump_llo_text`, libtpu writes files
for each kernel, *-NAME.txt. Of them:

SCHEDULED  all bundles, empty ones of waiting included: the time
ISSUED     those that are fetched: the hardware stalls by itself
USED       the slots of each unit that a bundle uses
CODE       the program

They count one program of a kernel's grid, which has no loop inside, with both sides of its
conditions: what begins and ends a sequence is counted for each chunk. Copies between HBM and VMEM
are in neither count; they run beside the program, and bound it by `hbm`. Nothing was measured.
"""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rwkv_jax.hardware import CHIPS

if TYPE_CHECKING:
    from benchmarks.aot import Call

SCHEDULED = "schedule-analysis_packed-bundles-post-ra"
ISSUED = "schedule-analysis_final_bundles"
USED = "final_hlo-static-per-bundle-utilization"
CODE = "final_bundles"


class Tpu(NamedTuple):
    """A device of JAX's: a chip, or on tpu7x one of the two cores of a chip.

    topology   the smallest that libtpu describes
    flops      floating-point operations a second in bfloat16 matrix products
    bandwidth  bytes a second of its memory
    cores      how many share the programs of a grid; each has half of the bandwidth then
    units      matrix units of a core, as the utilization files have it
    width      rows and columns of weights that a matrix unit holds
    rows       rows that it multiplies a cycle: plain products are scheduled so
    """

    topology: str
    flops: float
    bandwidth: float
    cores: int = 1
    units: int = 4
    width: int = 128
    rows: int = 1

    @property
    def clock(self) -> float:
        """Cycles a second: as many as the maker's peak takes."""
        return self.flops / (2 * self.cores * self.units * self.rows * self.width**2)


def _chip(name: str, shape: str, **more: int) -> Tpu:
    chip = CHIPS[name]
    return Tpu(f"{name}:{shape}", chip.flops, chip.bandwidth, **more)


TPUS = {
    "v4": _chip("v4", "2x2x1", cores=2),
    "v5e": _chip("v5e", "2x2"),
    "v5p": _chip("v5p", "2x2x1", cores=2),
    "v6e": _chip("v6e", "2x2", units=2, width=256, rows=2),
    # Half of a chip's: https://docs.cloud.google.com/tpu/docs/tpu7x
    "tpu7x": Tpu("tpu7x:2x2x1", 2307e12 / 2, 7.37e12 / 2, units=2, width=256, rows=2),
}
"""Programs for v4 and v5p begin with the number of their core, and a barrier of both."""


class Program(NamedTuple):
    """A program of a kernel's grid.

    scheduled  cycles
    issued     bundles
    used       slots of each unit that are used
    slots      slots of each unit in a bundle
    rows       rows of products on matrix units
    """

    scheduled: int
    issued: int
    used: dict[str, int]
    slots: dict[str, int]
    rows: int


def counts(tpu: Tpu, folder: Path, kernel: str, units: int, call: "Call") -> dict:
    """What a kernel takes for a token of a head, of which there are `units`: cycles (`scheduled`,
    `issued`, and at least `hbm` for its bytes and `mxu` for its products), spilled registers, the
    share of each unit's slots in use, and the milliseconds of the whole grid."""
    found = read(folder, kernel)
    if found.slots["MXU"] != tpu.units:
        raise ValueError(f"{found.slots['MXU']} matrix units, not {tpu.units}")
    each = units / math.prod(call.grid)
    # Programs that are not independent run in order, on one core.
    rounds = math.ceil(call.independent / tpu.cores) * math.prod(call.grid) / call.independent
    cycles = {
        "scheduled": found.scheduled / each,
        "issued": found.issued / each,
        "hbm": call.bytes / units * tpu.clock * tpu.cores / tpu.bandwidth,
        "mxu": found.rows / (tpu.units * tpu.rows) / each,
        "spills": found.used["VSTORE:SPILL"] / each,
        "milliseconds": found.scheduled * rounds / tpu.clock * 1e3,
    }
    used = {unit: found.used[unit] / n / found.scheduled for unit, n in found.slots.items()}
    return {
        "grid": call.grid,
        **{name: round(x, 4) for name, x in cycles.items()},
        "used": {unit: round(share, 3) for unit, share in used.items()},
    }


def read(folder: Path, kernel: str) -> Program:
    """What libtpu wrote of a kernel; raises `ValueError` if that is not what is expected."""
    used, slots = utilization(_text(folder, kernel, USED))
    code = _text(folder, kernel, CODE)
    if code.count("LB: >") > 1:  # one is the grid's
        raise ValueError(f"{kernel} has a loop inside, whose turns are not counted")
    return Program(
        total(_text(folder, kernel, SCHEDULED)),
        total(_text(folder, kernel, ISSUED)),
        used,
        slots,
        matrix_rows(code),
    )


def _text(folder: Path, kernel: str, what: str) -> str:
    name = re.compile(rf"\d+-{kernel}[.\d]*-\d+-{what}\.txt")
    found = [path for path in folder.iterdir() if name.fullmatch(path.name)]
    if len(found) != 1:
        raise ValueError(f"libtpu wrote {len(found)} files *{kernel}*-{what}.txt, not 1")
    return found[0].read_text()


def total(analysis: str) -> int:
    """The bundles of a schedule."""
    found = re.search(r"total scheduled bundles:\s+(\d+)", analysis)
    if not found:
        raise ValueError(f"libtpu's schedule has no total: {analysis[:80]!r}")
    return int(found[1])


def utilization(table: str) -> tuple[dict[str, int], dict[str, int]]:
    """The slots of each unit that are used in all bundles, and those that a bundle has."""
    form = re.fullmatch(
        r"== CAPAC\w+:\n(?P<names>.+)\n(?P<slots>[ \d]+)\n== UTILIZATION:\n(?P<uses>[ \d\n]+)",
        table,
    )
    if not form:
        raise ValueError(f"libtpu's table of units is not as expected: {table[:80]!r}")
    names = [name.strip() for name in form["names"].split(",")]
    uses = [[int(n) for n in line.split()] for line in form["uses"].splitlines()]
    slots = [int(n) for n in form["slots"].split()]
    used = [sum(column) for column in zip(*uses, strict=True)]
    return dict(zip(names, used, strict=True)), dict(zip(names, slots, strict=True))


def matrix_rows(program: str) -> int:
    """Rows of operands that are multiplied: an instruction has the 8 rows of a register, or of
    bfloat16 the 16 of a packed one. A row is as wide as a matrix unit, whatever of it is used."""
    kinds = re.findall(r"\bvmatmul\.([\w.]+)", program)
    return sum(8 if "f32" in kind or "lmr" in kind else 16 for kind in kinds)


def vmem(program: str, kernel: str) -> int:
    """The bytes of VMEM that XLA reserves for a kernel of a compiled program."""
    for line in program.splitlines():
        if 'custom_call_target="tpu_custom_call"' in line and re.search(rf"\b{kernel}\b", line):
            sizes = re.findall(r'"used_scoped_memory_configs":\[\{[^]]*?"size":"(\d+)"', line)
            return int(sizes[0]) if sizes else 0
    raise ValueError(f"no kernel {kernel} in the compiled program")
