"""Reading and decoding at the 0.1B shape: batches, next to the model's products and PyPI `rwkv`.

    python -m benchmarks.decode [--peer-python PATH] [--rounds 5] [--tokens 16] [--before CHECKOUT]
        [--check]

All contestants load the same random float32 weights (12 layers, width 768, vocabulary 65,536), and
their logits after a prompt are compared; `jaxrwkv` makes weights of its own, and is greedy.

A decode step of B rows is compared with the model's matrix products alone for B rows, each waiting
for the one before it: a lower bound for any decoder that multiplies by these matrices. One row is
also compared with one matrix-vector product over as many bytes. `--before` has another checkout of
the project read and decode one row too. All run with the malloc settings of sample.py.

`--check` exits with 1 if a step of any batch takes more than 1.25 times its products, or one row
decodes at less than 0.95 of the speed of `--before`.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import GIB, Worker, console, shown, spread
from benchmarks.worker import versions
from rwkv_jax.malloc import SETTINGS as MALLOC

SHAPE = {"layers": 12, "width": 768, "head_size": 64, "vocab": 65536}
SHAPE |= {"rank_w": 64, "rank_a": 64, "rank_v": 32, "rank_g": 128}
PROMPT = [6699, 304, 25740, 109, 39990, 4600, 4596, 22590]
ROWS = (1, 2, 4, 8, 32)
READS = (512, 2048)
OURS, PRODUCTS, BEFORE = "rwkv_jax", "the products alone", "rwkv_jax before"
JAXRWKV = "jaxrwkv, scan"
PEERS = {
    "PyPI rwkv, fp32": ("decode_rwkv.py", {"strategy": "cpu fp32"}),
    "PyPI rwkv, bf16": ("decode_rwkv.py", {"strategy": "cpu bf16"}),
    JAXRWKV: ("decode_jaxrwkv.py", {"kind": "ScanRWKV"}),
}
NO_OPENBLAS_SETTINGS = {"OPENBLAS_CORETYPE": None, "OPENBLAS_L2_SIZE": None}
MOST, LEAST = 1.25, 0.95
"""The bounds of `--check`: a step over its products, one row over its speed before."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", help="interpreter with benchmarks/requirements.txt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16, help="steps per contestant and turn")
    parser.add_argument("--threads", type=int, default=harness.device()["cores"])
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="older code, one row")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is missed")
    return parser.parse_args()


def main() -> int:
    args = parse()
    malloc = {"GLIBC_TUNABLES": MALLOC}
    peer = {"python": args.peer_python} if args.peer_python else {}
    base = {"threads": args.threads, "shape": SHAPE, "prompt": PROMPT, "rows": ROWS, "reads": READS}
    makers = {OURS: partial(Worker, "decode_ours.py", base, env=malloc)}
    if args.before:
        path = str(args.before.resolve())
        script = f"{path}/benchmarks/peers/decode_ours.py"
        makers[BEFORE] = partial(Worker, script, base, env=malloc | {"PYTHONPATH": path})
    for name, (script, options) in PEERS.items():
        makers[name] = partial(Worker, script, {**base, **options}, env=malloc, **peer)
    writers = harness.start_all(makers)
    about = writers[OURS].about
    shapes = {"threads": args.threads, "rows": ROWS, "shapes": about["products"]}
    products = Worker("products.py", shapes, env=malloc)
    readers = bandwidth_workers(args.threads, about["weight_bytes"], malloc, peer)

    steps, reads, rates = [], [], []
    for index in range(args.rounds):
        console.print(f"[dim]round {index + 1} of {args.rounds}[/]")
        steps.append(step_times(writers, products, args.tokens, index))
        reads.append(
            {length: harness.in_turn(writers, {"read": length}, index) for length in READS}
        )
        rates.append(harness.in_turn(readers, {"repeats": args.tokens}, index))
    for worker in (products, *readers.values()):
        worker.close()
    memory = {name: worker.close() for name, worker in writers.items()}
    return summarise(args, writers, memory, steps, reads, rates)


def bandwidth_workers(threads: int, size: int, malloc: dict, peer: dict) -> dict[str, Worker]:
    make = {
        library: partial(
            Worker,
            "matvec_rate.py",
            {"threads": threads, "bytes": size, "library": library},
            env=malloc | (NO_OPENBLAS_SETTINGS if library == "numpy" else {}),
            **(peer if library == "torch" else {}),
        )
        for library in ("numpy", "jax", "torch")
    }
    return harness.start_all(make)


def step_times(writers: dict, products: Worker, tokens: int, index: int) -> dict:
    """Seconds a step: {rows: {contestant: seconds}}; of one row also with `, greedy`."""
    found = {}
    for rows in ROWS:
        names = list(writers) if rows == 1 else [OURS]
        turn = {name: writers[name] for name in names}
        found[rows] = {}
        for greedy in (False, True):
            request = {"rows": rows, "tokens": tokens, "greedy": greedy}
            able = {name: w for name, w in turn.items() if greedy or name != JAXRWKV}
            for name, answer in harness.in_turn(able, request, index).items():
                found[rows][name + ", greedy" * greedy] = answer["seconds"] / tokens
        found[rows][PRODUCTS] = products.ask({"rows": rows, "repeats": tokens})["seconds"]
    return found


def summarise(args, writers: dict, memory: dict, steps: list, reads: list, rates: list) -> int:
    """Prints the tables, writes the results; the exit code."""
    batches = batch_table(args, steps)
    taken = max(rates[0], key=lambda name: spread(r[name]["gb_per_s"] for r in rates)["median"])
    one_row = one_row_table(writers, memory, steps, [r[taken]["gb_per_s"] for r in rates], taken)
    reading = reading_table(reads)
    missed = [
        f"{rows} rows: a step takes {x:.2f} times its products, at most {MOST}"
        for rows in ROWS
        if (x := batches[rows]["over_products"]["median"]) > MOST
    ]
    if BEFORE in writers and (x := one_row[BEFORE]["ours_times_as_fast"]["median"]) < LEAST:
        missed.append(f"one row: {x:.2f} of the speed before, at least {LEAST}")
    for line in missed:
        console.print(f"[red]missed: {line}[/]")
    peers = {}
    for worker in writers.values():
        peers |= worker.about.get("versions", {})
    found = {"ours": versions("jax", "jaxlib", "numpy")} | ({"peers": peers} if peers else {})
    result = {"rows": batches, "one_row": one_row, "reading": reading, "matvec_taken": taken}
    about = {"shape": SHAPE, "threads": args.threads, "missed": missed, "versions": found}
    size = {"weight_bytes_per_token": writers[OURS].about["weight_bytes"]}
    harness.report("decode", about | size | result)
    return int(args.check and bool(missed))


def batch_table(args, steps: list) -> dict:
    over = {rows: [r[rows][OURS] / r[rows][PRODUCTS] for r in steps] for rows in ROWS}
    speeds = {rows: [rows / r[rows][OURS] for r in steps] for rows in ROWS}
    of_one = {rows: [rows * r[1][OURS] / r[rows][OURS] for r in steps] for rows in ROWS}
    harness.table(
        f"Decoding batches, version 7 of 0.1B, float32, {args.threads} threads: median [min..max]"
        f" of {args.rounds} rounds of {args.tokens} steps, sampled with top-p 0.85",
        ["rows", "tokens/s", "a step over its products", "rows of one in the same time"],
        [
            [str(rows), shown(speeds[rows], 1), shown(over[rows], 2), shown(of_one[rows], 1)]
            for rows in ROWS
        ],
    )
    return {
        rows: {"tokens_per_s": spread(speeds[rows]), "over_products": spread(over[rows])}
        for rows in ROWS
    }


def one_row_table(writers: dict, memory: dict, steps: list, gb_per_s: list, by: str) -> dict:
    """All contestants; `gb_per_s` is the bandwidth of each round, measured `by` a library."""
    size = writers[OURS].about["weight_bytes"]
    found, rows = {}, []
    for name in steps[0][1]:
        if name == PRODUCTS:
            continue
        who = name.removesuffix(", greedy")
        suffix = name.removeprefix(who)
        speed = [1 / r[1][name] for r in steps]
        ratio = [r[1][name] / r[1][OURS + suffix] for r in steps]
        float32 = "bf16" not in name
        percent = [100e-9 * size * s / rate for s, rate in zip(speed, gb_per_s, strict=True)]
        logits = (writers[x].about.get("logits", ()) for x in (who, OURS))
        apart = max((abs(x - y) for x, y in zip(*logits, strict=False)), default=None)
        found[name] = {
            "tokens_per_s": spread(speed),
            "ours_times_as_fast": spread(ratio),
            "percent_of_bandwidth": spread(percent) if float32 else None,
            "peak_rss_bytes": memory[who],
            "largest_logit_difference": apart,
        }
        share, error = shown(percent) if float32 else "", "" if apart is None else f"{apart:.0e}"
        gib = f"{memory[who] / GIB:.2f}"
        rows.append([name, shown(speed, 1), shown(ratio, 2), share, gib, error])
    harness.table(
        f"One row; bandwidth is one product over {size / 1e6:,.0f} MB by {by}",
        ["", "tokens/s", "our speed-up", "% of bandwidth", "peak GiB", "logit difference"],
        rows,
    )
    return found


def reading_table(reads: list) -> dict:
    def times(length: int, name: str) -> list[float]:
        return [r[length][name]["seconds"] for r in reads]

    found = {
        length: {
            name: {
                "tokens_per_s": [length / t for t in times(length, name)],
                "ours_times_as_fast": [
                    t / own for t, own in zip(times(length, name), times(length, OURS), strict=True)
                ],
            }
            for name in reads[0][length]
        }
        for length in READS
    }

    def cell(length: int, name: str) -> str:
        one = found[length][name]
        return f"{shown(one['tokens_per_s'])}  {shown(one['ours_times_as_fast'], 2)}"

    harness.table(
        "Reading a prompt",
        ["", *(f"{length:,} tokens: tokens/s, our speed-up" for length in READS)],
        [[name, *(cell(length, name) for length in READS)] for name in reads[0][READS[0]]],
    )
    return {
        length: {
            name: {key: spread(values) for key, values in one.items()} for name, one in row.items()
        }
        for length, row in found.items()
    }


if __name__ == "__main__":
    sys.exit(main())
