"""Decoding at batch 1 and the 0.1B shape, next to PyPI `rwkv` and the matrix-vector bandwidth.

    python -m benchmarks.decode [--peer-python PATH] [--rounds 5] [--tokens 32]

All contestants load the same random float32 weights (12 layers, width 768, vocabulary 65,536), and
their logits after a prompt are compared. Decoding one token reads every weight once except the
embedding table. These bytes divided by the time per token are compared with the bandwidth of one
matrix-vector product over as many bytes; both are means over a turn. The products with the model's
own large matrices, each depending on a sum over the one before, are timed as well: they are an
upper bound for any decoder that multiplies by these matrices in this order. All run with the malloc
settings of sample.py.
"""

import argparse
from functools import partial

from benchmarks import harness
from benchmarks.harness import GIB, Worker, console, shown, spread
from benchmarks.worker import versions
from rwkv_jax.malloc import SETTINGS as MALLOC

SHAPE = {"layers": 12, "width": 768, "head_size": 64, "vocab": 65536}
SHAPE |= {"rank_w": 64, "rank_a": 64, "rank_v": 32, "rank_g": 128}
PROMPT = [6699, 304, 25740, 109, 39990, 4600, 4596, 22590]
OURS = "rwkv_jax"
CHAIN = "jax, the model's matrices in turn"
STRATEGIES = {"PyPI rwkv, fp32": "cpu fp32", "PyPI rwkv, bf16": "cpu bf16"}
NO_OPENBLAS_SETTINGS = {"OPENBLAS_CORETYPE": None, "OPENBLAS_L2_SIZE": None}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--peer-python",
        default=None,
        help="interpreter with benchmarks/requirements.txt (default: this)",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="tokens per contestant and turn")
    parser.add_argument("--threads", type=int, default=harness.device()["cores"])
    return parser.parse_args()


def main() -> None:
    args = parse()
    peer = {"python": args.peer_python} if args.peer_python else {}
    base = {"threads": args.threads, "shape": SHAPE, "prompt": PROMPT}
    malloc = {"GLIBC_TUNABLES": MALLOC}
    makers = {OURS: partial(Worker, "decode_ours.py", base, env=malloc)}
    for name, strategy in STRATEGIES.items():
        makers[name] = partial(
            Worker, "decode_rwkv.py", {**base, "strategy": strategy}, env=malloc, **peer
        )
    writers = harness.start_all(makers)
    size = writers[OURS].about["weight_bytes"]
    rate = {"threads": args.threads, "bytes": size}
    readers = harness.start_all(
        {
            "numpy": partial(
                Worker,
                "matvec_rate.py",
                {**rate, "library": "numpy"},
                env=NO_OPENBLAS_SETTINGS | malloc,
            ),
            "jax": partial(Worker, "matvec_rate.py", {**rate, "library": "jax"}, env=malloc),
            "torch": partial(
                Worker, "matvec_rate.py", {**rate, "library": "torch"}, env=malloc, **peer
            ),
            CHAIN: partial(
                Worker,
                "matvec_rate.py",
                {**rate, "library": "jax", "shapes": writers[OURS].about["products"]},
                env=malloc,
            ),
        }
    )
    sampled, greedy, bandwidth = [], [], []
    for index in range(args.rounds):
        console.print(f"[dim]round {index + 1} of {args.rounds}[/]")
        read = harness.in_turn(readers, {"repeats": args.tokens}, index)
        bandwidth.append({name: answer["gb_per_s"] for name, answer in read.items()})
        for answers, is_greedy in ((sampled, False), (greedy, True)):
            request = {"tokens": args.tokens, "greedy": is_greedy}
            seconds = harness.in_turn(writers, request, index)
            answers.append({name: args.tokens / s["seconds"] for name, s in seconds.items()})
    memory = {name: worker.close() for name, worker in writers.items()}
    for worker in readers.values():
        worker.close()
    summarise(args, writers, memory, {"sampled": sampled, "greedy": greedy}, bandwidth, size)


def summarise(args, writers: dict, memory: dict, speeds: dict, bandwidth: list, size: int) -> None:
    best = max(
        bandwidth[0].keys() - {CHAIN}, key=lambda name: spread(r[name] for r in bandwidth)["median"]
    )
    rows, contestants = [], {}
    for name, worker in writers.items():
        apart = max(
            abs(x - y)
            for x, y in zip(worker.about["logits"], writers[OURS].about["logits"], strict=True)
        )
        for kind, rounds in speeds.items():
            speed = [r[name] for r in rounds]
            ratio = [r[OURS] / r[name] for r in rounds]
            # bf16 weights have half as many bytes: only float32 is compared with its bandwidth.
            percent, of_chain = (
                [100 * s * size * 1e-9 / b[whose] for s, b in zip(speed, bandwidth, strict=True)]
                for whose in (best, CHAIN)
            )
            float32 = "bf16" not in name
            contestants[f"{name}, {kind}"] = {
                "tokens_per_s": spread(speed),
                "ours_times_as_fast": spread(ratio),
                "percent_of_bandwidth": spread(percent) if float32 else None,
                "percent_of_the_products_alone": spread(of_chain) if float32 else None,
                "peak_rss_bytes": memory[name],
                "largest_logit_difference": apart,
            }
            rows.append(
                [
                    f"{name}, {kind}",
                    shown(speed, 1),
                    shown(ratio, 2),
                    shown(percent) if float32 else "",
                    shown(of_chain) if float32 else "",
                    f"{memory[name] / GIB:.2f}",
                    f"{apart:.0e}",
                ]
            )
    harness.table(
        f"Decoding, batch 1, version 7 of 0.1B, {args.threads} threads: median [min..max] of "
        f"{args.rounds} rounds of {args.tokens} tokens; sampled: temperature 1, top-p 0.85",
        [
            "",
            "tokens/s",
            "our speed-up",
            "% of bandwidth",
            "% of its products",
            "peak GiB",
            "logit difference",
        ],
        rows,
    )
    harness.table(
        f"Matrix-vector product over the same {size / 1e6:,.0f} MB of float32, GB/s",
        ["", "GB/s"],
        [
            [name + (" (taken)" if name == best else ""), shown([r[name] for r in bandwidth], 1)]
            for name in sorted(bandwidth[0])
        ],
    )
    found = {"ours": versions("jax", "jaxlib", "numpy")}
    theirs = next((w.about["versions"] for w in writers.values() if "versions" in w.about), None)
    found |= {"peers": theirs} if theirs else {}
    result = {
        "shape": SHAPE,
        "threads": args.threads,
        "weight_bytes_per_token": size,
        "contestants": contestants,
        "matvec_taken": best,
        "matvec_gb_per_s": {name: spread(r[name] for r in bandwidth) for name in bandwidth[0]},
        "versions": found,
    }
    harness.report("decode", result)


if __name__ == "__main__":
    main()
