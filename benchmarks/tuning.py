"""A step of low-rank and of state tuning beside one of full training: time, memory, numbers.

    python -m benchmarks.tuning [--shape 0.1B demo] [--rounds 5]

Version 7, float32, the same rematerialisation for all. Contestants are processes that alternate.
Bytes are those of the compiled program (arguments, outputs and temporaries, what is donated once),
with the frozen weights in float32 or bfloat16.
"""

import argparse
import tempfile
from functools import partial

from benchmarks import harness
from benchmarks.harness import Worker, shown, spread
from benchmarks.worker import versions
from rwkv_jax.malloc import SETTINGS as MALLOC

RANKS = {"rank_w": 64, "rank_a": 64, "rank_v": 32, "rank_g": 128}
SHAPES = {
    "0.1B": {"layers": 12, "width": 768, "vocab": 65536, "batch": 1, "context": 512},
    "demo": {"layers": 2, "width": 256, "vocab": 4096, "batch": 4, "context": 256},
}
LORA = {"method": "lora", "rank": 16, "alpha": 32.0}
CONTESTANTS = {
    "full": {},
    "LoRA, weights in float32": LORA | {"base": "float32"},
    "LoRA, weights in bfloat16": LORA | {"base": "bfloat16"},
    "state, weights in float32": {"method": "state", "base": "float32"},
}
REMAT = "block"
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=[*SHAPES])
    parser.add_argument("--only", nargs="+", help="contestants with one of these in their names")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="a turn, after one that is not timed")
    args = parser.parse_args()
    found = {}
    for name in args.shape:
        with tempfile.TemporaryDirectory() as cache:
            found[name] = measured(SHAPES[name], args, cache)
        show(name, found[name], args)
    made = {"remat": REMAT, "rank": LORA["rank"], "shapes": SHAPES, "found": found}
    if args.shape == [*SHAPES] and not args.only:
        harness.report("tuning", made | {"versions": {"ours": versions("jax", "jaxlib", "optax")}})


def measured(shape: dict, args: argparse.Namespace, cache: str) -> dict:
    options = {
        "threads": harness.device()["cores"],
        "shape": shape | RANKS | {"head_size": 64},
        "version": "7",
        "cache": cache,
        "implementation": None,
        "remat": REMAT,
    }
    workers = harness.start_all(
        {
            name: partial(
                Worker, "train_ours.py", options | {"tune": tune}, env={"GLIBC_TUNABLES": MALLOC}
            )
            for name, tune in CONTESTANTS.items()
            if name == "full" or not args.only or any(x in name for x in args.only)
        }
    )
    answers = harness.interleave(workers, args.rounds, {"steps": args.steps})
    seconds = {name: [min(r["seconds"]) for r in found] for name, found in answers.items()}
    whole = workers["full"].about["bytes"]
    return {
        name: {
            "trained": worker.about["parameters"],
            "of_full": spread(x / y for x, y in zip(seconds[name], seconds["full"], strict=True)),
            "bytes": worker.about["bytes"],
            "bytes_of_full": worker.about["bytes"] / whole,
            "peak_rss_bytes": worker.close(),
        }
        for name, worker in workers.items()
    }


def show(name: str, found: dict, args: argparse.Namespace) -> None:
    shape = SHAPES[name]
    sizes = f"{shape['layers']} layers, {shape['width']} wide, vocabulary {shape['vocab']:,}"
    harness.table(
        f"{name}: {sizes}, batch {shape['batch']} x {shape['context']}: of {args.rounds} rounds",
        ["", "trained", "time of a full step's", "memory, MiB", "of a full step's"],
        [
            [
                contestant,
                f"{x['trained']:,}",
                shown(x["of_full"].values(), 2),
                f"{x['bytes'] / MIB:,.0f}",
                f"{x['bytes_of_full']:.2f}",
            ]
            for contestant, x in found.items()
        ],
    )


if __name__ == "__main__":
    main()
