"""Training tokens/s side by side: rwkv_jax, plain PyTorch RWKV, `transformers` GPT-2.

    python -m benchmarks.train_step [--version 4|7] [--peer-python PATH] [--peers ...] [--check]

All do the same step in float32: forward, backward, gradient clipping at norm 1, AdamW, on the same
tokens. Contestants are processes that alternate; the start-up time of each is measured while the
others are idle. Ours runs with the malloc settings that train.py sets for itself.
"""

import argparse
import tempfile
from functools import partial

from benchmarks import harness
from benchmarks.harness import GIB, Worker, console, shown, spread
from benchmarks.worker import versions
from rwkv_jax.malloc import SETTINGS as MALLOC

SHAPE = {"layers": 6, "width": 512, "head_size": 64, "vocab": 512, "batch": 4, "context": 512}
SHAPE |= {"rank_w": 64, "rank_a": 64, "rank_v": 32, "rank_g": 128}
GPT2_WIDENED = {"7": 2336, "4": 2304}
"""Inner width at which GPT-2 has as many parameters as RWKV (its own 4 x 512 has 9 % fewer)."""

PEERS = {
    "7": {
        "PyTorch, steps": "rwkv7-steps",
        "PyTorch, chunks of 16": "rwkv7-chunks",
    },
    "4": {
        "PyTorch, steps": "rwkv4-steps",
        "transformers RWKV-4": "transformers-rwkv4",
    },
}
GPT2 = {"GPT-2, sdpa": "gpt2-sdpa", "GPT-2, eager": "gpt2-eager"}
OURS = "rwkv_jax"


def matrix_flops(version: str) -> int:
    """FLOPs of one step in matrix products: 6 x (matrix parameters but the embedding) x tokens."""
    c, layers = SHAPE["width"], SHAPE["layers"]
    if version == "7":
        ranks = [SHAPE[f"rank_{name}"] for name in "wavg"]
        parameters = (
            layers * (12 * c * c + 2 * c * sum(ranks)) - 2 * c * SHAPE["rank_v"]
        )  # layer 0 has no v ranks
    else:
        parameters = layers * 13 * c * c
    return 6 * (parameters + c * SHAPE["vocab"]) * SHAPE["batch"] * SHAPE["context"]


def wkv_flops(version: str) -> int:
    """FLOPs of the WKV recurrences in one step, by definition; backward counts as twice forward.

    Version 7, per token and head of N channels: S a, (S a) b^T, v k^T and S r are 2 N^2 each, the
    decay is N^2: 9 N^2.
    Version 4, per token and channel: about 14.
    """
    tokens = SHAPE["batch"] * SHAPE["context"]
    per_channel = 9 * SHAPE["head_size"] if version == "7" else 14
    return 3 * per_channel * SHAPE["width"] * SHAPE["layers"] * tokens


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", choices=("4", "7"), default="7")
    parser.add_argument(
        "--peer-python",
        default=None,
        help="interpreter with benchmarks/requirements.txt (default: this)",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=3, help="steps per turn, after one that is not timed"
    )
    parser.add_argument("--threads", type=int, default=harness.device()["cores"])
    parser.add_argument(
        "--implementation", default=None, help="WKV form of ours: scan, chunked, associative"
    )
    parser.add_argument("--remat", default="dots", help="remat of ours")
    parser.add_argument(
        "--peer-malloc",
        action="store_true",
        help="start the peers with the malloc settings of train.py, too",
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        default=None,
        help="only those whose name in the table contains one of these",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare the plain PyTorch peers with rwkv7-hf and transformers",
    )
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    worker = Worker("check_torch.py", {"threads": args.threads}, **args.peer)
    worker.close()
    rows = [
        [name, f"{e['logits']:.1e}", f"{e['gradients']:.1e}"]
        for name, e in worker.about["errors"].items()
    ]
    harness.table(
        "Plain PyTorch peers against packages, relative RMS, float64 (but the packages' states)",
        ["", "logits", "worst gradient"],
        rows,
    )


def makers(args: argparse.Namespace, cache: str) -> dict:
    """How to start each contestant; ours starts twice, the second time with its cache."""
    base = {"threads": args.threads}
    ours = {
        **base,
        "shape": SHAPE,
        "version": args.version,
        "cache": cache,
        "implementation": args.implementation,
        "remat": args.remat,
    }
    malloc = {"env": {"GLIBC_TUNABLES": MALLOC}}
    every = {OURS: partial(Worker, "train_ours.py", ours, **malloc)}
    peer = args.peer | (malloc if args.peer_malloc else {})
    shape = {**SHAPE, "gpt2_inner": None}
    for name, kind in (PEERS[args.version] | GPT2).items():
        every[name] = partial(
            Worker, "train_torch.py", {**base, "shape": shape, "kind": kind}, **peer
        )
    widened = {**shape, "gpt2_inner": GPT2_WIDENED[args.version]}
    every["GPT-2, sdpa, widened"] = partial(
        Worker, "train_torch.py", {**base, "shape": widened, "kind": "gpt2-sdpa"}, **peer
    )
    wanted = [part.lower() for part in args.peers] if args.peers is not None else [""]
    chosen = {
        name: make
        for name, make in every.items()
        if name == OURS or any(p in name.lower() for p in wanted)
    }
    rate = {
        **base,
        "rows": SHAPE["batch"] * SHAPE["context"],
        "width": SHAPE["width"],
        "ffn": 4 * SHAPE["width"],
    }
    return chosen | {
        "matrix rate, jax": partial(Worker, "matrix_rate.py", {**rate, "library": "jax"}, **malloc),
        "matrix rate, torch": partial(
            Worker, "matrix_rate.py", {**rate, "library": "torch"}, **args.peer
        ),
    }


def main() -> None:
    args = parse()
    args.peer = {"python": args.peer_python} if args.peer_python else {}
    if args.check:
        return check(args)
    with tempfile.TemporaryDirectory() as cache:
        todo = makers(args, cache)
        console.print(f"[dim]starting {OURS} with an empty compilation cache[/]")
        cold = todo[OURS]()
        cold_start = cold.about["first_step_at"] - cold.started
        cold.close()
        workers = harness.start_all(todo)
        answers = harness.interleave(workers, args.rounds, {"steps": args.steps})
        memory = {name: worker.close() for name, worker in workers.items()}
    summarise(args, workers, answers, memory, cold_start)


def summarise(args, workers: dict, answers: dict, memory: dict, cold_start: float) -> None:
    tokens = SHAPE["batch"] * SHAPE["context"]
    rates = {name: a for name, a in answers.items() if name.startswith("matrix")}
    speeds = {
        name: [tokens * len(r["seconds"]) / sum(r["seconds"]) for r in a]
        for name, a in answers.items()
        if name not in rates
    }
    rows, contestants = [], {}
    for name, speed in speeds.items():
        about = workers[name].about
        ratio = [x / y for x, y in zip(speeds[OURS], speed, strict=True)]
        contestants[name] = {
            "parameters": about["parameters"],
            "tokens_per_s": spread(speed),
            "ours_times_as_fast": spread(ratio),
            "peak_rss_bytes": memory[name],
            "first_step_s": about["first_step_at"] - workers[name].started,
            "every_round_tokens_per_s": speed,
        }
        first = f"{contestants[name]['first_step_s']:.1f}"
        if name == OURS:
            contestants[name]["first_step_cold_s"] = cold_start
            first = f"{cold_start:.1f}, cached {first}"
        rows.append(
            [
                name,
                f"{about['parameters'] / 1e6:.1f} M",
                shown(speed),
                shown(ratio, 2),
                f"{memory[name] / GIB:.2f}",
                first,
            ]
        )
    title = (
        f"Training step, version {args.version}: {SHAPE['layers']} layers, {SHAPE['width']} wide, "
        f"vocabulary {SHAPE['vocab']}, batch {SHAPE['batch']} x {SHAPE['context']}, float32, "
        f"{args.threads} threads: median [min..max] of {args.rounds} rounds of {args.steps} steps"
    )
    columns = [
        "",
        "parameters",
        "tokens/s",
        "ours is x times",
        "peak GiB",
        "start to first step, s",
    ]
    harness.table(title, columns, rows)

    kinds = {
        (name, case): [r["gflops"][case] for r in a]
        for name, a in rates.items()
        for case in a[0]["gflops"]
    }
    harness.table(
        "Matrix products, float32 GFLOP/s: best of a round",
        ["", "product", "GFLOP/s"],
        [[name.split(", ")[1], case, shown(rate)] for (name, case), rate in kinds.items()],
    )
    matrix, wkv = matrix_flops(args.version), wkv_flops(args.version)
    used = [(matrix + wkv) / tokens * speed / 1e9 for speed in speeds[OURS]]
    # The best product of each round: one that other load on the machine slowed down is no limit.
    reached = [max(rate[index] for rate in kinds.values()) for index in range(len(used))]
    fractions = [x / y for x, y in zip(used, reached, strict=True)]
    allowed = spread(reached)["median"] * 1e9 * tokens / (matrix + wkv)
    console.print(
        f"\nFLOPs a step: 6 x matrix parameters x tokens = {matrix / 1e9:.0f} G, "
        f"WKV by its definition = {wkv / 1e9:.1f} G."
        f"\nOurs: {shown(used)} GFLOP/s, {shown([100 * f for f in fractions])} % of the matrix "
        f"rate of the same round, {shown(reached)} GFLOP/s, which allows {allowed:,.0f} tokens/s."
    )
    found = {"ours": versions("jax", "jaxlib", "optax", "numpy")}
    theirs = next(
        (w.about.get("versions") for w in workers.values() if w.about.get("versions")), None
    )
    found |= {"peers": theirs} if theirs else {}
    result = {
        "shape": SHAPE,
        "version": args.version,
        "threads": args.threads,
        "contestants": contestants,
        "matrix_gflops": {f"{name}, {case}": spread(rate) for (name, case), rate in kinds.items()},
        "flops_per_step": {"matrix": matrix, "wkv": wkv},
        "fraction_of_matrix_rate": spread(fractions),
        "versions": found,
    }
    harness.report(f"train_step_v{args.version}", result)


if __name__ == "__main__":
    main()
