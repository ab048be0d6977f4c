"""The WKV operators' implementations against `scan`: time, compile time and temporary memory.

    python -m benchmarks.wkv [--version 4 6 7] [--rounds 7]

The shape is `benchmark` of rwkv_jax.wkv.cases (B=2, T=1024, H=8, N=64; version 4: its 512
channels), float32. Backward is the gradient of all inputs for random cotangents of output and
final state. Memory is what XLA allocates for the compiled program besides its arguments and
results.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from benchmarks.harness import console, shown, spread
from benchmarks.worker import versions
from rwkv_jax.wkv import IMPLEMENTATIONS, wkv4, wkv6, wkv7
from rwkv_jax.wkv.cases import SHAPES, wkv4_inputs, wkv6_inputs, wkv7_inputs

SHAPE = SHAPES["benchmark"]
OPERATORS = {"4": (wkv4, wkv4_inputs), "6": (wkv6, wkv6_inputs), "7": (wkv7, wkv7_inputs)}
MIB = 2**20


def programs(version: str, implementation: str) -> dict[str, tuple]:
    """Forward and forward+backward, compiled: (timed call, compile seconds, temporary bytes)."""
    operator, inputs = OPERATORS[version]
    arguments = {name: jnp.asarray(x) for name, x in inputs("typical", SHAPE).items()}

    def forward(arguments):
        return operator(**arguments, implementation=implementation)

    rng = np.random.default_rng(1)
    results = jax.eval_shape(forward, arguments)
    cotangents = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape, dtype=np.float32)), results
    )

    def both(arguments, cotangents):
        y, pull = jax.vjp(forward, arguments)
        return y, pull(cotangents)

    compiled = {}
    for name, function, given in (
        ("forward", forward, (arguments,)),
        ("both", both, (arguments, cotangents)),
    ):
        began = time.perf_counter()
        program = jax.jit(function).lower(*given).compile()
        seconds = time.perf_counter() - began
        analysis = program.memory_analysis()
        memory = analysis.temp_size_in_bytes if analysis else 0

        def call(program=program, given=given) -> float:
            began = time.perf_counter()
            jax.block_until_ready(program(*given))
            return time.perf_counter() - began

        call()
        compiled[name] = (call, seconds, memory)
    return compiled


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", nargs="*", choices=tuple(OPERATORS), default=list(OPERATORS))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    results = {version: measure(version, args.rounds) for version in args.version}
    found = {"ours": versions("jax", "jaxlib", "numpy")}
    harness.report(
        "wkv", {"shape": str(SHAPE), "rounds": args.rounds, "versions": found, "results": results}
    )


def measure(version: str, rounds: int) -> dict:
    compiled = {}
    for implementation in IMPLEMENTATIONS:
        console.print(f"[dim]version {version}: compiling {implementation}[/]")
        compiled[implementation] = programs(version, implementation)
    seconds = {(name, kind): [] for name in compiled for kind in ("forward", "both")}
    for _ in range(rounds):
        for name, kind in seconds:
            seconds[name, kind].append(compiled[name][kind][0]())
    rows, result = [], {}
    for kind, title in (("forward", "forward"), ("both", "forward + backward")):
        for name in compiled:
            times = seconds[name, kind]
            faster = [scan / mine for scan, mine in zip(seconds["scan", kind], times, strict=True)]
            _, compile_seconds, memory = compiled[name][kind]
            row = [f"{title}, {name}", shown([1e3 * t for t in times], 1), shown(faster, 2)]
            rows.append([*row, f"{memory / MIB:,.1f}", f"{compile_seconds:.1f}"])
            result.setdefault(name, {})[kind] = {
                "seconds": spread(times),
                "times_as_fast_as_scan": spread(faster),
                "temporary_bytes": memory,
                "share_of_scan_memory": memory / max(compiled["scan"][kind][2], 1),
                "compile_seconds": compile_seconds,
            }
    title = f"WKV of version {version}, {SHAPE}, float32: median [min..max] of {rounds} rounds"
    harness.table(title, ["", "ms", "x times as fast as scan", "temporary MiB", "compile s"], rows)
    return result


if __name__ == "__main__":
    main()
