"""Time of every form by length, heads and head size: the basis of `implementation=None`.

    python -m benchmarks.forms [--version 4 6 7] [--tokens 8 64 512] [--rounds 5]

On the default device of this process, float32; forms take turns. `default` is
`implementation=None` (`rwkv_jax/wkv/default.py`); tests/wkv/test_default.py checks it against the
table written here.
"""

import argparse
import time

import jax

from benchmarks import harness
from benchmarks.harness import GIB, console
from benchmarks.worker import versions
from rwkv_jax import malloc
from rwkv_jax.testing import Shape, wkv4_inputs, wkv6_inputs, wkv7_inputs
from rwkv_jax.wkv import IMPLEMENTATIONS, wkv4, wkv6, wkv7

OPERATORS = {"4": (wkv4, wkv4_inputs), "6": (wkv6, wkv6_inputs), "7": (wkv7, wkv7_inputs)}
SHAPES = ((1, 12, 64), (4, 8, 64), (1, 16, 32), (1, 8, 128))
"""Batch, heads, head size; version 4 has as many channels as all heads together."""
KINDS = {"forward": False, "forward + backward": True}
CALLS, SECONDS = 3, 0.05
"""A turn has at least this many calls and takes at least this long; its fastest call counts."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", nargs="*", choices=OPERATORS, default=[*OPERATORS])
    parser.add_argument("--tokens", nargs="*", type=int, default=[8, 64, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--gib", type=float, default=4, help="larger programs are not run (default: 4)"
    )
    return parser.parse_args()


def main() -> None:
    args = parse()
    rows = []
    for version in args.version:
        for batch, heads, size in SHAPES:
            for tokens in args.tokens:
                shape = Shape(batch, tokens, heads, size)
                console.print(f"[dim]version {version}, {shape}[/]")
                for kind, gradients in KINDS.items():
                    seconds = measure(version, shape, gradients, args)
                    rows.append(
                        {"version": version, "kind": kind, "tokens": tokens}
                        | {"batch": batch, "heads": heads, "size": size, "seconds": seconds}
                    )
        show(version, [row for row in rows if row["version"] == version])
    platform = jax.default_backend()
    found = {"ours": versions("jax", "jaxlib", "numpy")}
    harness.report(f"forms_{platform}", {"versions": found, "rounds": args.rounds, "rows": rows})


def measure(version: str, shape: Shape, gradients: bool, args: argparse.Namespace) -> dict:
    """Minimum, median and maximum over the rounds, of each form that is run."""
    operator, inputs = OPERATORS[version]
    x = jax.device_put(inputs("typical", shape))
    dy = x["v"]
    programs = {}
    for name in (None, *IMPLEMENTATIONS):

        def forward(x, name=name):
            return operator(**x, implementation=name)[0]

        def both(x, dy, forward=forward):
            y, pull_back = jax.vjp(forward, x)
            return y, pull_back(dy)[0]

        given = (x, dy) if gradients else (x,)
        program = jax.jit(both if gradients else forward).lower(*given).compile()
        analysis = program.memory_analysis()
        if analysis is None or analysis.temp_size_in_bytes < args.gib * GIB:
            programs[name or "default"] = program, given
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(args.rounds + 1):
        for name, (program, given) in programs.items():
            fastest = best(program, given)
            if turn:  # the first warms up
                times[name].append(fastest)
    return {name: harness.spread(x) for name, x in times.items()}


def best(program, given) -> float:
    began, fastest, calls = time.perf_counter(), float("inf"), 0
    while calls < CALLS or time.perf_counter() - began < SECONDS:
        start = time.perf_counter()
        jax.block_until_ready(program(*given))
        fastest = min(fastest, time.perf_counter() - start)
        calls += 1
    return fastest


def show(version: str, rows: list[dict]) -> None:
    names = ("default", *IMPLEMENTATIONS)
    cells = []
    for row in rows:
        seconds = row["seconds"]
        least = min(s["median"] for s in seconds.values())
        cells.append(
            [f"{row['kind']}, B={row['batch']} H={row['heads']} N={row['size']}"]
            + [f"{row['tokens']:,}"]
            + [f"{1e3 * seconds[n]['median']:,.2f}" if n in seconds else "" for n in names]
            + [f"{seconds['default']['median'] / least:.2f}"]
        )
    title = f"Version {version}: ms, median of the rounds; the default over the fastest"
    harness.table(title, ["", "T", *names, "default/fastest"], cells)


if __name__ == "__main__":
    malloc.set_up()
    main()
