"""What the compilers of accelerators make of the kernels: cycles on TPUs, machine code on GPUs.

    python -m benchmarks.schedule [--target v5e H100 ...] [--quick] [--check] [--before CHECKOUT]

Nothing runs on a device, and none is needed: `pip install -e '.[aot]'`, and for GPUs `ptxas`, from
a toolkit or `pip install nvidia-cuda-nvcc nvidia-nvvm`. Every program of the kernels is compiled
for every target. Also a mesh of four TPUs is compiled for.

For TPUs (`vliw.py`), in cycles a token and head, or for version 4 a token and 64 channels:
scheduled cycles, the bundles issued in them, the floor of HBM (what a kernel reads and writes, each
once) and of the matrix units (the rows that they multiply), spilled registers, and the share of
each unit's slots in use; the VMEM that XLA reserves; milliseconds of the whole case at the clock
with which the matrix units reach the maker's peak; CPU seconds to trace, lower and compile the
program of both passes. For GPUs (`sass.py`): registers, spilled bytes,
programs a multiprocessor, and the instructions that a warp executes a chunk. From JAX 0.11 on, an
H100 has version 7's `mosaic_gpu` too, whose wgmma must not be serialised (ptxas' C7511).

`--check` compares with results/schedule.json, and fails if a kernel takes 3 % more cycles, or on a
GPU instructions or spills. Another compiler schedules differently: then its targets are not
compared, and the command says so. `--before` shows cycles and seconds of another checkout's kernels
beside them.
"""

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path

from benchmarks import aot, harness, sass, vliw
from benchmarks.aot import MOSAIC_GPU, TARGETS, Case
from benchmarks.worker import versions

MORE = 1.03
"""Cycles that fail the check, over those of the results."""
DTYPES = (("bfloat16", False), ("bfloat16", True), ("float32", False))
"""With and without documents that start inside a sequence."""
HOPPER = "H100"
"""The target that version 7 has a second kernel for."""
QUICK = {
    "pallas_tpu": [
        Case("pallas_tpu", "4", resets=True),
        Case("pallas_tpu", "6", batch=1, heads=12),
        Case("pallas_tpu", "7"),
        Case("pallas_tpu", "7", level="O3"),
    ],
    "pallas_gpu": [Case("pallas_gpu", version, resets=True) for version in "467"],
}
FEW = [
    Case("pallas_tpu", version, batch=batch, heads=heads)
    for batch, heads in ((1, 2), (8, 3), (1, 12), (1, 32))
    for version in "67"
]
"""One tile; 0.1B over 4 chips of `tensor`, and one row of it on one; one row of 32 heads. Chunks of
several rows, or times of a row, are then in flight in place of those of more heads."""
FAST = [
    Case("pallas_tpu", version, resets=resets, level="O3")
    for version in "67"
    for resets in (False, True)
]
"""Compiled for speed, with more chunks side by side."""
SIZES = [
    Case("pallas_tpu", version, heads=2048 // size, size=size)
    for size in (16, 32, 128)
    for version in "67"
]


def cases(target: str, quick: bool) -> list[Case]:
    """The programs that are compiled for a target."""
    name = "pallas_tpu" if target in vliw.TPUS else "pallas_gpu"
    found = []
    if not quick:
        found += [Case(name, v, dtype, resets=resets) for v in "467" for dtype, resets in DTYPES]
        found += [Case(name, v, batch=32, tokens=1) for v in "67"]
        found += FAST if target in vliw.TPUS else []
        found += FEW + SIZES if target == "v5e" else []
    if target == HOPPER and has_mosaic_gpu():
        found += [Case(MOSAIC_GPU, "7", resets=resets) for resets in (False, True)[quick:]]
    return list(dict.fromkeys(found + QUICK[name]))


def has_mosaic_gpu() -> bool:
    return tuple(map(int, versions("jax")["jax"].split(".")[:2])) >= (0, 11)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--target", nargs="+", choices=TARGETS, default=TARGETS, help="devices to compile for"
    )
    parser.add_argument("--quick", action="store_true", help="a few bfloat16 kernels a target")
    parser.add_argument("--check", action="store_true", help="fail if a kernel became slower")
    parser.add_argument("--before", type=Path, help="another checkout, compiled too", metavar="DIR")
    args = parser.parse_args()
    missing = [f"no {name}" for name in needed(args.target) if not found(name)]
    known = harness.RESULTS / "schedule.json"
    if args.check and not known.exists():
        missing.append(f"no {known} to compare with: python -m benchmarks.schedule writes it")
    if missing:
        sys.exit("\n".join([*missing, INSTALL]))

    rows, before = [], []
    for target in args.target:
        harness.console.print(f"[dim]compiling for {target}[/]")
        chosen = cases(target, args.quick)
        rows += aot.compiled(target, chosen)
        if target in vliw.TPUS:
            rows += aot.compiled_on_meshes(target)
            before += aot.compiled(target, chosen, args.before.resolve()) if args.before else []
    if HOPPER in args.target and not has_mosaic_gpu():
        harness.console.print(f"not compiled: {MOSAIC_GPU} for {HOPPER}, which needs JAX 0.11")
    show(rows, before)
    if not (args.quick or args.check):
        made = {"versions": {"ours": compilers()}}
        # Apart, because it needs a newer JAX than the rest may have been compiled with.
        hopper = [row for row in rows if row.get("implementation") == MOSAIC_GPU]
        if hopper:
            harness.report("schedule_hopper", made | {"rows": hopper})
        if args.target == TARGETS:
            rest = [row for row in rows if row not in hopper]
            harness.report("schedule", made | {"rows": rest})
    wrong = [f"{name_of(row)}: {row['error']}" for row in rows if "error" in row]
    wrong += [f"before, {name_of(row)}: {row['error']}" for row in before if "error" in row]
    if args.check:
        wrong += slower(rows, json.loads(known.read_text()))
    for message in wrong:
        harness.console.print(message, markup=False)
    sys.exit(bool(wrong))


INSTALL = (
    "pip install -e '.[aot]' has the compilers; for GPUs it also takes ptxas, of a CUDA toolkit or"
    " of pip install nvidia-cuda-nvcc nvidia-nvvm"
)


def needed(targets: list[str]) -> list[str]:
    """Modules and programs that these targets take."""
    gpus = any(target not in vliw.TPUS for target in targets)
    tpus = any(target in vliw.TPUS for target in targets)
    return ["libtpu"] * tpus + ["jax_cuda13_plugin", "ptxas", "nvdisasm"] * gpus


def found(name: str) -> bool:
    return bool(sass.find(name) if name in ("ptxas", "nvdisasm") else find_spec(name))


def compilers() -> dict[str, str]:
    names = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvdisasm")
    made = versions(*names)
    if sass.find("ptxas"):
        made["ptxas"] = sass.run("ptxas", "--version").stdout.split(" V")[1].split()[0]
    return made


def name_of(row: dict) -> str:
    """Target, kernel and case in words."""
    words = [row["target"], row["kernel"]]
    if row.get("implementation") == MOSAIC_GPU:
        words.append(MOSAIC_GPU)
    if "mesh" in row:
        words.append(f"4 chips, {row['mesh']} axes")
    elif "dtype" in row:
        words += [shape(row), row["dtype"], *["resets"] * row["resets"]]
        words += [row["level"]] * (row["level"] != "UNKNOWN")
    return ", ".join(words)


def shape(row: dict) -> str:
    return f"{row['batch']} x {row['tokens']} x {row['heads']} x {row['size']}"


COMPILERS = {"scheduled": ("jaxlib", "libtpu"), "issue": ("jaxlib", "ptxas")}
"""What makes the numbers of TPUs, which have this field, and of GPUs."""
MEASURES = {
    "scheduled": "cycles a token and head",
    "issue": "cycles to begin the instructions of a chunk",
    "spilled_bytes": "bytes of spilled registers",
}
"""What must not grow."""


def slower(rows: list[dict], results: dict) -> list[str]:
    """What grew over the results, in words; cycles that shrank as much, too: the results are of
    other code then, and would hide what grows next."""
    made, here, wrong = results["versions"]["ours"], compilers(), []
    known = {name_of(row): row for row in results["rows"]}
    for field, names in COMPILERS.items():
        mine = [row for row in rows if field in row and row["implementation"] != MOSAIC_GPU]
        of = [" ".join(f"{x} {found.get(x)}" for x in names) for found in (made, here)]
        if mine and of[0] != of[1]:
            harness.console.print(f"not compared: the results are of {of[0]}, this is {of[1]}")
            continue
        for row in mine:
            old = known.get(name_of(row), {})
            if field not in old:
                wrong.append(f"{name_of(row)}: not in the results")
                continue
            for measure in MEASURES.keys() & row:
                new, was = row[measure], old[measure]
                if new > MORE * was or (measure == "scheduled" and MORE * new < was):
                    numbers = f"{new:,.2f} {MEASURES[measure]}, {was:,.2f} in the results"
                    wrong.append(f"{name_of(row)}: {numbers}")
    return [*wrong, *["python -m benchmarks.schedule makes new results"] * bool(wrong)]


def show(rows: list[dict], before: list[dict]) -> None:
    """Print the counts; the shares of units, and instructions by kind, are in the results."""
    compared = ("scheduled", "seconds")
    old = {
        name_of(row): [f"{row[x]:.2f}" for x in compared] for row in before if "scheduled" in row
    }
    lines = []
    for row in rows:
        if "scheduled" not in row:
            continue
        lines.append([name_of(row)])
        lines[-1] += [f"{row[x]:.2f}" for x in ("scheduled", "issued", "hbm", "mxu", "spills")]
        lines[-1] += [f"{row['vmem_bytes'] / 2**20:.1f}", f"{row['milliseconds']:.3f}"]
        lines[-1].append(f"{row['seconds']:.1f}")
        if before:
            lines[-1] += old.get(name_of(row), [""] * len(compared))
    if lines:
        columns = ["", "scheduled", "issued", "HBM", "MXU", "spills", "VMEM, MiB", "ms"]
        columns += ["compiling, s", *["before", "before, s"] * bool(before)]
        harness.table("TPUs: cycles a token and head", columns, lines)
    lines = [
        [name_of(row), *(f"{row[x]:,}" for x in ("registers", "spilled_bytes", "shared_bytes"))]
        + [f"{x:,}" for x in (row["programs"], sum(row["instructions"].values()), row["issue"])]
        for row in rows
        if "registers" in row
    ]
    if lines:
        columns = ["", "registers", "spilled, B", "shared, B", "programs", "instructions", "issue"]
        harness.table("GPUs: a chunk", columns, lines)
    for row in rows:
        if "mesh" in row and "seconds" in row:
            harness.console.print(f"{name_of(row)}: compiled in {row['seconds']} CPU s")


if __name__ == "__main__":
    main()
