"""Time and memory of the operators' gradient by length: linear in T, one state a chunk.

    python -m benchmarks.lengths [--version 4 6 7] [--tokens 1024 2048 ... 65536]

B=1, H=12, N=64 (version 4: 768 channels), float32, forward and backward, for the default form and
for `lax.scan`, as long as that takes less than `--gib`. Memory is what XLA allocates besides
arguments and results. Writes docs/lengths.png.
"""

import argparse
import time

import jax

from benchmarks import harness
from benchmarks.harness import GIB, ROOT, console
from benchmarks.worker import versions
from rwkv_jax import malloc
from rwkv_jax.testing import Shape, wkv4_inputs, wkv6_inputs, wkv7_inputs
from rwkv_jax.wkv import wkv4, wkv6, wkv7

OPERATORS = {"4": (wkv4, wkv4_inputs), "6": (wkv6, wkv6_inputs), "7": (wkv7, wkv7_inputs)}
FORMS = {"default": None, "lax.scan": "scan"}
MIB = 2**20


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", nargs="*", choices=OPERATORS, default=[*OPERATORS])
    parser.add_argument("--tokens", nargs="*", type=int, default=[1024 * 2**i for i in range(7)])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--gib", type=float, default=6, help="larger programs are not run (default: 6)"
    )
    return parser.parse_args()


def main() -> None:
    args = parse()
    results = {}
    for version in args.version:
        cells = results[version] = {}
        for tokens in args.tokens:
            for form, name in FORMS.items():
                console.print(f"[dim]version {version}, {tokens} tokens, {form}[/]")
                cell = measure(version, tokens, name, args)
                cells.setdefault(form, {})[str(tokens)] = cell
        show(version, cells)
    plot(results)
    found = {"ours": versions("jax", "jaxlib", "numpy")}
    settings = {"shape": {"batch": 1, "heads": 12, "size": 64}, "rounds": args.rounds}
    harness.report("lengths", {**settings, "versions": found, "results": results})


def measure(version: str, tokens: int, implementation: str | None, args) -> dict:
    operator, inputs = OPERATORS[version]
    x = inputs("typical", Shape(1, tokens, 12, 64))

    def both(x, dy):
        y, pull_back = jax.vjp(lambda x: operator(**x, implementation=implementation)[0], x)
        return y, pull_back(dy)[0]

    program = jax.jit(both).lower(x, x["v"]).compile()
    memory = program.memory_analysis().temp_size_in_bytes
    cell = {"temporary_bytes": memory, "program_bytes": len(program.as_text())}
    if memory > args.gib * GIB:
        return cell
    given = jax.device_put((x, x["v"]))
    jax.block_until_ready(program(*given))
    times = []
    for _ in range(args.rounds):
        began = time.perf_counter()
        jax.block_until_ready(program(*given))
        times.append(time.perf_counter() - began)
    return cell | {"seconds": harness.spread(times)}


def show(version: str, cells: dict) -> None:
    rows = []
    for tokens, ours in cells["default"].items():
        row = [f"{int(tokens):,}"]
        for cell in (ours, cells["lax.scan"][tokens]):
            seconds = cell.get("seconds")
            row += [
                harness.shown(1e3 * s for s in seconds.values()) if seconds else "not run",
                f"{1e6 * seconds['median'] / int(tokens):,.1f}" if seconds else "",
                f"{cell['temporary_bytes'] / MIB:,.0f}",
            ]
        rows.append(row)
    columns = ["tokens", "ms", "us a token", "MiB", "scan: ms", "us a token", "MiB"]
    harness.table(f"Version {version}, forward and backward", columns, rows)


def plot(results: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), constrained_layout=True)
    for colour, (version, cells) in zip(("C0", "C1", "C2"), results.items(), strict=False):
        for form, style in (("default", "o-"), ("lax.scan", "x:")):
            timed = {
                int(t): c["seconds"]["median"] for t, c in cells[form].items() if "seconds" in c
            }
            memory = {int(t): c["temporary_bytes"] / MIB for t, c in cells[form].items()}
            label = f"version {version}, {form}"
            left.plot(list(timed), list(timed.values()), style, color=colour, label=label)
            right.plot(list(memory), list(memory.values()), style, color=colour)
    for axis, title in ((left, "seconds"), (right, "MiB of temporaries")):
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=title)
        axis.set_xticks([1024 * 2**i for i in range(7)], [f"{2**i}k" for i in range(7)])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.suptitle("Forward and backward, B=1, H=12, N=64, float32, two CPU cores", fontsize=10)
    path = ROOT / "docs" / "lengths.png"
    figure.savefig(path, dpi=110)
    console.print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    malloc.set_up()
    main()
