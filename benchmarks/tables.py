"""Writes the tables in docs/ from benchmarks/results/*.json.

    python -m benchmarks.tables [--check]

A page marks a table with the line `<!-- table: NAME -->`. The table below it, down to the next
empty line, is replaced by the result of the function NAME of this module. `--check` writes nothing:
it names the pages whose tables differ from the results, and fails if there are any.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable

from benchmarks.harness import RESULTS, ROOT

MIB = 2**20
MARK = re.compile(r"(?m)^<!-- table: (\w+) -->\n((?:\|.*\n)*)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = []
    for page in sorted((ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if rewritten(text) != text:
            stale.append(f"{page.relative_to(ROOT)} differs from benchmarks/results/")
            if not check:
                page.write_text(rewritten(text), encoding="utf-8")
    if check and stale:
        sys.exit("\n".join([*stale, "python -m benchmarks.tables rewrites it"]))


def rewritten(page: str) -> str:
    """The page with its tables made from the results."""
    return MARK.sub(lambda mark: f"<!-- table: {mark[1]} -->\n{TABLES[mark[1]]()}", page)


def peers_forward() -> str:
    return peers("forward")


def peers_both() -> str:
    return peers("forward + backward")


def peers(kind: str) -> str:
    """Time relative to rwkv_jax, and memory, of each package at each version and length."""
    found = results("wkv")["results"]
    own = ("rwkv_jax", "rwkv_jax, chunked", "rwkv_jax, associative")
    packages = [name for name in next(iter(found.values()))[kind] if name not in own]
    rows = []
    for shape, kinds in found.items():
        ours = kinds[kind]["rwkv_jax"]
        rows.append([shape, f"{milliseconds(ours['seconds'])}, {mib(ours)} MiB"])
        for name in packages:
            cell = kinds[kind][name]
            if "times_ours" in cell:
                rows[-1].append(f"{spread(cell['times_ours'])}, {mib(cell)}")
            else:
                rows[-1].append(cell["absent"])
    return table(["", "rwkv_jax", *packages], rows)


def forms() -> str:
    """Median milliseconds of each form by length and head size."""
    rows = []
    for row in results("forms_cpu")["rows"]:
        medians = {name: cell["median"] * 1e3 for name, cell in row["seconds"].items()}
        rows.append(
            [
                row["version"],
                row["kind"],
                f"{row['batch']} x {row['heads']} x {row['size']}",
                f"{row['tokens']:,}",
                *(f"{medians[name]:.3g}" if name in medians else "" for name in FORMS),
            ]
        )
    return table(["version", "", "B x H x N", "T", *FORMS], rows)


FORMS = ["default", "scan", "chunked", "associative"]


def lengths() -> str:
    """Milliseconds and MiB of forward and backward by length."""
    found = results("lengths")["results"]
    tokens = next(iter(found.values()))["default"]
    heads = [""]
    for version in found:
        heads += [f"version {version}", "`lax.scan`"]
    rows = []
    for count in tokens:
        rows.append([f"{int(count):,}"])
        for cells in found.values():
            for form in ("default", "lax.scan"):
                cell = cells[form][count]
                time = milliseconds(cell["seconds"]) if "seconds" in cell else "not run"
                rows[-1].append(f"{time}, {mib(cell)} MiB")
    return table(heads, rows)


def errors() -> str:
    """The largest errors over the tests' cases, in float32, bfloat16 and float64."""
    found = results("accuracy")["tested"]
    rows = []
    for form in found["float32"]:
        rows.append([name_of(form)])
        for dtype in ("float32", "bfloat16", "float64"):
            cells = found[dtype].get(form, {})
            rows[-1] += [f"{cells[what][0]:.0e}" if what in cells else "" for what in KINDS]
    return table(
        ["", *(f"{d} {k}" for d in ("float32", "bfloat16", "float64") for k in SHORT)], rows
    )


def long_errors() -> str:
    """The largest errors at 4,096 tokens in float32, and the inputs that cause them."""
    rows = []
    for form, cells in results("accuracy")["long"].items():
        rows.append([name_of(form)])
        for what in KINDS:
            rows[-1].append(f"{cells[what][0]:.0e} ({cells[what][1]})" if what in cells else "")
    return table(["", *SHORT], rows)


KINDS = ["y", "final state", "gradients"]
SHORT = ["y", "state", "gradients"]


def name_of(form: str) -> str:
    version, implementation = form.split(", ")
    return f"{version}, " + ("default" if implementation == "None" else f"`{implementation}`")


def sequence() -> str:
    """KiB that a device receives and MiB that it allocates, by length."""
    found = results("sequence")["operators"]
    rows = []
    for version, cells in found.items():
        rows.append([f"version {version}"])
        for cell in cells.values():
            rows[-1].append(
                f"{cell['received'] / 1024:,.0f} KiB, {cell['allocated'] / MIB:,.0f} MiB"
            )
    return table(["", *(f"{int(tokens):,}" for tokens in next(iter(found.values())))], rows)


def profile() -> str:
    """Share of a training step by scope: forward, gradient and what is computed again."""
    found = results("profile")["results"]
    names = list(
        dict.fromkeys(key.split(", ")[0] for cells in found.values() for key in cells["seconds"])
    )
    totals = {version: sum(cells["seconds"].values()) for version, cells in found.items()}
    share = {
        (name, version): sum(
            seconds for key, seconds in cells["seconds"].items() if key.split(", ")[0] == name
        )
        / totals[version]
        for version, cells in found.items()
        for name in names
    }
    names.sort(key=lambda name: -sum(share[name, version] for version in found))
    rows = [[name.replace("_", " "), *(f"{share[name, v]:.0%}" for v in found)] for name in names]
    rows.append(
        [
            "in matrix products",
            *(
                f"{sum(c['seconds_in_products'].values()) / totals[v]:.0%}"
                for v, c in found.items()
            ),
        ]
    )
    rows.append(["step", *(f"{c['step_seconds']['median'] * 1e3:,.0f} ms" for c in found.values())])
    rows.append(
        [
            "compile, 6 and 24 layers",
            *(
                f"{c['compile_seconds']:.1f}, {c['compile_seconds_of_four_times_the_layers']:.1f} s"
                for c in found.values()
            ),
        ]
    )
    return table(["", *(f"version {version}" for version in found)], rows)


def schedule() -> str:
    """Cycles a token and head, scheduled and issued, of each kernel on each TPU."""
    return by_target("scheduled", lambda row: f"{row['scheduled']:.1f} ({row['issued']:.1f})")


def schedule_gpus() -> str:
    """Registers, spilled bytes, programs a multiprocessor and cycles of issue, on each GPU."""

    def cell(row: dict) -> str:
        return " / ".join(
            f"{row[x]:,}" for x in ("registers", "spilled_bytes", "programs", "issue")
        )

    return by_target("registers", cell)


def by_target(field: str, cell: Callable[[dict], str]) -> str:
    """A row for each kernel and a column for each target whose rows have that field."""
    found = [row for row in scheduled() if field in row]
    cells: dict[str, dict[str, str]] = {}
    for row in found:
        cells.setdefault(kernel_of(row), {})[row["target"]] = cell(row)
    targets = list(dict.fromkeys(row["target"] for row in found))
    rows = [[name, *(cells[name].get(target, "") for target in targets)] for name in cells]
    return table(["", *targets], rows)


def scheduled() -> list[dict]:
    """The rows of kernels of several heads of 64, which are compiled for every target."""
    many = ((2, 32), (32, 32), (1, 12))
    return [
        row
        for row in results("schedule")["rows"]
        if (row.get("batch"), row.get("heads")) in many and row["size"] == 64 and "error" not in row
    ]


def kernel_of(row: dict) -> str:
    words = [f"`{row['kernel']}`", row["dtype"], *["resets"] * row["resets"]]
    words += [row["level"]] * (row["level"] != "UNKNOWN")
    return ", ".join([*words, *["12 heads"] * (row["heads"] == 12)])


def schedule_v5e() -> str:
    """What the kernels take on v5e, and their floors."""
    rows = []
    for row in scheduled():
        if row["target"] != "v5e":
            continue
        used = row["used"]
        cycles = (f"{row[x]:.1f}" for x in ("scheduled", "issued", "hbm", "mxu"))
        floor = max(row["hbm"], row["mxu"])
        rows.append(
            [
                kernel_of(row),
                *cycles,
                f"{floor / row['scheduled']:.0%}",
                f"{row['spills']:.1f}",
                f"{row['vmem_bytes'] / MIB:.1f}",
                f"{row['milliseconds']:.2f}",
                *(f"{used[unit]:.0%}" for unit in UNITS),
            ]
        )
    columns = ["", "cycles", "issued", "HBM", "MXU", "floor / cycles"]
    columns += ["spills", "VMEM, MiB", "ms"]
    return table([*columns, *(f"{unit} used" for unit in UNITS)], rows)


UNITS = ["MXU", "XLU", "VALU", "EUP", "VLOAD", "VSTORE"]


def schedule_few() -> str:
    """Cycles a token and head on v5e by rows, heads and head size, bfloat16."""
    cells: dict[tuple, dict[str, str]] = {}
    for row in results("schedule")["rows"]:
        few = row["target"] == "v5e" and "scheduled" in row and row["tokens"] > 1
        plain = row.get("dtype") == "bfloat16" and not row["resets"] and row["level"] == "UNKNOWN"
        if few and row["version"] != "4" and plain:
            key = tuple(row[x] for x in ("batch", "heads", "size"))
            text = f"{row['scheduled']:.1f} ({row['issued']:.1f})"
            cells.setdefault(key, {})[row["kernel"]] = text
    names = list(dict.fromkeys(name for found in cells.values() for name in found))
    rows = [[*map(str, key), *(found[name] for name in names)] for key, found in cells.items()]
    return table(["rows", "heads", "channels a head", *(f"`{name}`" for name in names)], rows)


def schedule_h100() -> str:
    """Instructions that a warp executes a chunk on an H100, by kind."""
    return by_kind([row for row in scheduled() if row["target"] == "H100"])


def schedule_hopper() -> str:
    """The same of version 7's kernel in Mosaic GPU."""
    return by_kind(results("schedule_hopper")["rows"])


def by_kind(kernels: list[dict]) -> str:
    rows = [
        [
            kernel_of(row),
            f"{sum(row['instructions'].values()):,}",
            *(f"{count:,}" for count in row["instructions"].values()),
            f"{row['registers']}",
            f"{row['spilled_bytes']:,} B",
            f"{row['shared_bytes'] / 1024:.0f} KiB",
            f"{row['programs']}",
            f"{row['issue']:,}",
        ]
        for row in kernels
    ]
    columns = ["", "instructions", *kernels[0]["instructions"]]
    columns += ["registers", "spilled", "shared memory", "programs", "issue"]
    return table(columns, rows)


def style() -> str:
    """What tuning does to bits per byte, of the style and off it."""
    rows = [
        [
            {"full": "full fine-tuning", "lora": "LoRA, rank 8", "state": "state tuning"}[
                x["method"]
            ],
            f"{x['rate']:g}",
            f"{x['trained']:,}",
            *(f"{x['before'][of]:.3f} -> {x['after'][of]:.3f}" for of in ("style", "unseen")),
            f"{x['cpu']:.0f}",
            f"{x['anonymous'] / MIB:,.0f}",
        ]
        for x in results("style")["runs"].values()
    ]
    columns = ["", "rate", "trained", "tests", "other modules", "CPU seconds", "peak MiB"]
    return table(columns, rows)


def tuning() -> str:
    """Time and memory of a step that tunes, of a full step's."""
    rows = [
        [
            f"{shape}: {name}",
            f"{x['trained']:,}",
            spread(x["of_full"]),
            f"{x['bytes'] / MIB:,.0f}",
            f"{x['bytes_of_full']:.2f}",
        ]
        for shape, found in results("tuning")["found"].items()
        for name, x in found.items()
    ]
    return table(["", "trained", "time of a full step's", "MiB", "of a full step's"], rows)


def tokenizing() -> str:
    """MB of text a second, of the command and of packages that only encode."""
    found = results("tokenize")
    rows = [
        [name, spread(rate), spread(found["mb_per_core_second"][name])]
        for name, rate in found["mb_per_s"].items()
    ]
    return table(["", "MB/s", "MB a core-second"], rows)


def feeding() -> str:
    """A step that reads its batch relative to one that is given it; memory of a process by step."""
    found = results("feeding")
    rows = [
        [f"{name}: seconds a step, read / given", spread(cell["ratio"])]
        for name, cell in found["alone"].items()
    ]
    lines = found["together"]
    for index, step in enumerate(lines[0]["steps"]):
        memory = [line["memory_mib"][index] for line in lines]
        name = f"MiB of each of {len(lines)} processes' own after step {step}"
        rows.append([name, f"{min(memory):,.0f} to {max(memory):,.0f}"])
    return table(["", ""], rows)


def plans() -> str:
    """Memory and least step time of each published size on its slice."""
    rows = []
    for name, row in results("plans")["rows"].items():
        if not name.startswith("rwkv7"):
            continue
        gib, seconds = row["gib"], row["seconds"]
        state = gib["parameters"] + gib["optimizer"] + gib["gradients"]
        needed, made = (row[f"{x}_flops_per_token"] / 1e9 for x in ("needed", "program"))
        traffic = sum(sum(kinds.values()) for kinds in row["traffic_mib"].values())
        rows.append(
            [
                name,
                row["topology"],
                f"{row['batch']} x {row['context']:,}",
                f"{state:.2f} + {gib['rest']:.2f} of {row['chip_gib']:.0f}",
                f"{needed:.2f}, {made:.2f}",
                f"{traffic:,.0f}",
                f"{seconds['overlapped']:.3g} to {seconds['not']:.3g}",
                f"{row['mfu'][0]:.0%} to {row['mfu'][1]:.0%}",
            ]
        )
    columns = ["config", "slice", "rows x tokens", "GiB a device: state + rest"]
    columns += ["GFLOP a token: needed, made", "MiB a device and step", "step, s", "MFU"]
    return table(columns, rows)


def meshes() -> str:
    """Bytes a device receives on each mesh of 0.1B, by kind of collective."""
    rows = []
    for name, row in results("plans")["rows"].items():
        if name.startswith("rwkv7"):
            continue
        for axes, kinds in row["traffic_mib"].items():
            sizes = ", ".join(f"{kind} {size:,.1f}" for kind, size in sorted(kinds.items()))
            rows.append([name.removeprefix("0.1b "), axes.replace(" ", ", "), sizes])
    return table(["mesh", "over", "MiB a device and step"], rows)


TABLES = {
    f.__name__: f
    for f in (
        peers_forward,
        peers_both,
        forms,
        lengths,
        errors,
        long_errors,
        sequence,
        profile,
        schedule,
        schedule_v5e,
        schedule_few,
        schedule_gpus,
        schedule_h100,
        schedule_hopper,
        style,
        tuning,
        tokenizing,
        feeding,
        plans,
        meshes,
    )
}


def results(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def spread(cell: dict) -> str:
    return f"{cell['median']:.2f} [{cell['min']:.2f}..{cell['max']:.2f}]"


def milliseconds(cell: dict) -> str:
    return f"{cell['median'] * 1e3:,.3g} ms" if cell["median"] < 1 else f"{cell['median']:,.1f} s"


def mib(cell: dict) -> str:
    value = cell["temporary_bytes"] / MIB
    return f"{value:,.1f}" if value < 10 else f"{value:,.0f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(3, *map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    padded = ([x.ljust(width) for x, width in zip(line, widths, strict=True)] for line in lines)
    return "".join("| " + " | ".join(cells) + " |\n" for cells in padded)


if __name__ == "__main__":
    main()
