"""The WKV operators beside those of JAX packages on PyPI: time and memory.

    python -m benchmarks.wkv [--version 4 6 7] [--tokens 256 1024 4096] [--peer-python PATH]

B=2, H=8, N=64 (version 4: 512 channels), float32, on the CPU. `forward` is output and final state;
`forward + backward` adds the gradients of all inputs, for random cotangents of both. `rwkv_jax` is
`implementation=None`; the rows below it are the implementations by name. Memory is what XLA
allocates for the compiled program besides its arguments and results. `apart` is the relative
difference of the results from ours, over a sample of all of them.
"""

import argparse
from functools import partial
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks import harness
from benchmarks.harness import GIB, Worker, console, shown, spread
from rwkv_jax.testing import Shape, wkv4_inputs, wkv6_inputs, wkv7_inputs
from rwkv_jax.wkv import IMPLEMENTATIONS

SHAPE = {"batch": 2, "heads": 8, "size": 64}
INPUTS = {"4": wkv4_inputs, "6": wkv6_inputs, "7": wkv7_inputs}
OURS = "rwkv_jax"
PEERS = {
    "ejkernel, xla": {"package": "ejkernel"},
    "rwkv-ops, native": {"package": "rwkv-ops"},
    "jaxrwkv, scan": {"package": "jaxrwkv", "implementation": "ScanRWKV"},
    "jaxrwkv, associative scan": {"package": "jaxrwkv", "implementation": "AssociativeScanRWKV"},
}
KINDS = {"forward": False, "forward + backward": True}
MIB = 2**20


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", nargs="*", choices=("4", "6", "7"), default=["4", "6", "7"])
    parser.add_argument("--tokens", nargs="*", type=int, default=[256, 1024, 4096])
    parser.add_argument(
        "--peer-python",
        default=None,
        help="interpreter with benchmarks/requirements-wkv.txt (default: this)",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=harness.device()["cores"])
    parser.add_argument(
        "--gib", type=float, default=8, help="programs that take more are not run (default: 8)"
    )
    return parser.parse_args()


def main() -> None:
    args = parse()
    peer = {"python": args.peer_python} if args.peer_python else {}
    base = {"threads": args.threads, "largest": int(args.gib * GIB)}
    makers = {}
    for name in (None, *IMPLEMENTATIONS):
        options = {**base, "package": "rwkv_jax", "implementation": name}
        makers[f"{OURS}, {name}" if name else OURS] = partial(Worker, "operators.py", options)
    for name, which in PEERS.items():
        makers[name] = partial(Worker, "operators.py", {**base, **which}, **peer)
    workers = harness.start_all(makers)
    results = {}
    for version in args.version:
        for tokens in args.tokens:
            cells = {
                kind: measure(workers, version, tokens, gradients, args.rounds)
                for kind, gradients in KINDS.items()
            }
            show(version, tokens, args.rounds, cells)
            results[f"version {version}, T={tokens}"] = cells
    found = {name: worker.about["versions"] for name, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    found = {name: x for name, x in found.items() if not name.startswith(f"{OURS},")}
    settings = {"shape": SHAPE, "threads": args.threads, "rounds": args.rounds}
    harness.report("wkv", {**settings, "versions": found, "results": results})


def measure(workers: dict, version: str, tokens: int, gradients: bool, rounds: int) -> dict:
    """Time and memory of every package for one program; ratios are to ours, of the same round."""
    what = "forward and backward" if gradients else "forward"
    console.print(f"[dim]version {version}, {tokens} tokens, {what}[/]")
    with TemporaryDirectory() as folder:
        path = f"{folder}/inputs.npz"
        np.savez(path, **INPUTS[version]("typical", Shape(time=tokens, **SHAPE)))
        request = {"version": version, "gradients": gradients, "inputs": path}
        about = {name: worker.ask(request) for name, worker in workers.items()}
    able = {name: worker for name, worker in workers.items() if "absent" not in about[name]}
    for worker in able.values():  # the first turn warms up
        worker.ask({})
    turns = [harness.in_turn(able, {}, index) for index in range(rounds)]
    samples = {name: about[name].pop("samples") for name in able}
    for name in able:
        seconds = [turn[name]["seconds"] for turn in turns]
        ratios = [turn[name]["seconds"] / turn[OURS]["seconds"] for turn in turns]
        about[name] |= {
            "seconds": spread(seconds),
            "times_ours": spread(ratios),
            "memory_times_ours": ratio(about[name], about[OURS]),
            "apart": apart(samples[name], samples[OURS]),
        }
    return about


def ratio(theirs: dict, ours: dict) -> float:
    return theirs["temporary_bytes"] / max(ours["temporary_bytes"], 1)


def apart(theirs: list, ours: list) -> float:
    """The largest relative RMS difference over the results."""
    pairs = [(np.array(x), np.array(y)) for x, y in zip(theirs, ours, strict=True)]
    return max(float(np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2))) for x, y in pairs)


def show(version: str, tokens: int, rounds: int, cells: dict) -> None:
    rows = []
    for name in next(iter(cells.values())):
        row = [name]
        for cell in (found[name] for found in cells.values()):
            if "seconds" in cell:
                row.append(f"{1e3 * cell['seconds']['median']:,.1f}")
                row.append(shown(cell["times_ours"].values(), 2))
            else:
                row += [cell["absent"], ""]
            row.append(f"{cell['temporary_bytes'] / MIB:,.1f}" if "temporary_bytes" in cell else "")
        errors = [found[name]["apart"] for found in cells.values() if "apart" in found[name]]
        rows.append([*row, f"{max(errors):.0e}" if errors else ""])
    columns = ["", *["ms", "times ours", "MiB"] * 2, "apart"]
    title = f"WKV of version {version}, T={tokens}: forward, then forward + backward"
    harness.table(f"{title}; median [min..max] of {rounds} rounds", columns, rows)


if __name__ == "__main__":
    main()
