"""Where a training step's time is spent, by the named scopes of the code.

    python -m benchmarks.profile [--version 4 6 7] [--layers 6] [--width 512]

The step is that of `benchmarks.train_step`, with the malloc settings that train.py sets for itself.
XLA's CPU runtime reports every operation that it runs; each is counted under its innermost
`jax.named_scope`, as forward, as recomputed for the gradient (`train.remat`), or as gradient.
`products` is the part spent in matrix products. Compile times are reported for the program as it
is, and for one of four times the layers.
"""

import argparse
import re
import tempfile
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np

from benchmarks import harness
from benchmarks.harness import console
from benchmarks.worker import versions
from rwkv_jax import malloc
from rwkv_jax.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from rwkv_jax.data.loader import Batch
from rwkv_jax.training.state import init_train_state
from rwkv_jax.training.step import make_train_step

PHASES = ("forward", "again", "gradient")
SCOPES = (
    "embed",
    "token_shift",
    "projections",
    "keys",
    "wkv",
    "output",
    "time_mix",
    "channel_mix",
    "loss",
    "optimizer",
)
"""From the innermost to the outermost, where they are nested."""
SHOWN = {"time_mix": "time mix, the rest", "output": "group norm, gate, output"}
CONTROL = re.compile(r" (while|call|conditional)\(")
STEPS = 5


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", nargs="*", default=["4", "6", "7"])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    return parser.parse_args()


def main() -> None:
    args = parse()
    results = {version: profile(version, args) for version in args.version}
    for version, result in results.items():
        show(version, result)
    settings = {name: x for name, x in vars(args).items() if name != "version"}
    found = {"ours": versions("jax", "jaxlib", "numpy")}
    harness.report("profile", {"shape": settings, "versions": found, "results": results})


def problem(version: str, args: argparse.Namespace, layers: int):
    """The step, its state and a batch."""
    model = ModelConfig(version=version, layers=layers, width=args.width, vocab_size=args.vocab)
    cfg = Config(
        model=model,
        optimizer=OptimizerConfig(peak_lr=1e-4, final_lr=1e-4, eps=1e-8),
        train=TrainConfig(batch=args.batch, context=args.context, l2wrap=0.0),
    )
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, args.vocab, (args.batch, args.context + 1), np.int32)
    reset = np.zeros((args.batch, args.context), bool)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], reset)
    return make_train_step(cfg), init_train_state(cfg), batch


def compiled(version: str, args: argparse.Namespace, layers: int):
    step, state, batch = problem(version, args, layers)
    lowered = step.lower(state, batch)
    began = time.perf_counter()
    program = lowered.compile()
    return program, state, batch, time.perf_counter() - began


def profile(version: str, args: argparse.Namespace) -> dict:
    console.print(f"[dim]version {version}[/]")
    program, state, batch, seconds = compiled(version, args, args.layers)
    *_, deeper = compiled(version, args, 4 * args.layers)

    def run(state):
        began = time.perf_counter()
        state, metrics = program(state, batch)
        jax.block_until_ready((state, metrics))
        return state, time.perf_counter() - began

    state, _ = run(state)
    times = []
    for _ in range(STEPS):
        state, took = run(state)
        times.append(took)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(STEPS):
                state, _ = run(state)
        operations = measured(Path(folder))
    spent, products = by_scope(program.as_text(), operations)
    return {
        "step_seconds": harness.spread(times),
        "compile_seconds": seconds,
        "compile_seconds_of_four_times_the_layers": deeper,
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "seconds": {f"{scope}, {phase}": s for (scope, phase), s in spent.items()},
        "seconds_in_products": {f"{scope}, {phase}": s for (scope, phase), s in products.items()},
    }


def measured(folder: Path) -> Counter:
    """Seconds a step that the runtime spent in each operation of the program."""
    data = jax.profiler.ProfileData.from_file(str(next(folder.rglob("*.xplane.pb"))))
    total: Counter = Counter()
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                total[event.name] += event.duration_ns / 1e9 / STEPS
    return total


def by_scope(program: str, operations: Counter) -> tuple[Counter, Counter]:
    """Seconds by (scope, phase): of all operations, and of matrix products."""
    spent: Counter = Counter()
    products: Counter = Counter()
    bodies = dict(re.findall(r"\n%?([\w.\-]+) \([^\n]*\{\n(.*?)\n\}", program, re.DOTALL))
    for line in program.splitlines():
        found = re.match(r" *(?:ROOT )?%([\w.\-]+) = ", line)
        if not found or found[1] not in operations or CONTROL.search(line):
            continue
        called = re.search(r"calls=%([\w.\-]+)", line)
        body = bodies.get(called[1], "") if called else ""
        name = re.search(r'op_name="([^"]*)"', line) or re.search(r'op_name="([^"]*)"', body)
        place = where(name[1] if name else "")
        spent[place] += operations[found[1]]
        if re.search(r" (dot|convolution)\(", line + body):
            products[place] += operations[found[1]]
    return spent, products


def where(name: str) -> tuple[str, str]:
    """The scope and the phase of an operation, from the path that JAX gives it."""
    parts = re.split(r"[/()]", name)
    scope = next((scope for scope in SCOPES if scope in parts), "other")
    if "rematted_computation" in parts:
        return scope, "again"
    return scope, "gradient" if "transpose" in parts else "forward"


def show(version: str, result: dict) -> None:
    seconds, products = result["seconds"], result["seconds_in_products"]
    total = sum(seconds.values())
    rows = []
    for scope in (*SCOPES, "other"):
        mine = [seconds.get(f"{scope}, {phase}", 0) for phase in PHASES]
        inside = sum(products.get(f"{scope}, {phase}", 0) for phase in PHASES)
        if not sum(mine):
            continue
        cells = [f"{1e3 * x:,.0f}" for x in (*mine, sum(mine), inside)]
        share = f"{100 * sum(mine) / total:.0f}"
        rows.append([SHOWN.get(scope, scope.replace("_", " ")), *cells, share])
    inside = sum(products.values())
    rows.append(["all", *[""] * 3, f"{1e3 * total:,.0f}", f"{1e3 * inside:,.0f}", "100"])
    step = harness.shown(1e3 * s for s in result["step_seconds"].values())
    title = (
        f"Version {version}: ms of a step; without the profiler {step};"
        f" compiled in {result['compile_seconds']:.1f} s,"
        f" with four times the layers in {result['compile_seconds_of_four_times_the_layers']:.1f} s"
    )
    harness.table(title, ["", *PHASES, "all", "products", "%"], rows)


if __name__ == "__main__":
    malloc.set_up()
    main()
