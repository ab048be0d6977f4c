"""From the start of the program to the first token of a 0.1B file: CPU seconds and memory.

    python -m benchmarks.start [--peer-python PATH] [--rounds 5] [--check]

`sample.py` is run before it is measured, so that its compiled programs are cached. The file is
bfloat16, as official ones are, and both contestants compute in float32. Memory is what a process
has beyond one that samples from a model of the same layers and vocabulary and a twelfth of the
width, divided by the float32 parameters. Linux only.

`--check` exits with 1 if `sample.py` takes more CPU time than PyPI `rwkv`, or more memory than 1.15
times the parameters.
"""

import argparse
import random
import sys
from pathlib import Path

import ml_dtypes

from benchmarks import harness
from benchmarks.decode import SHAPE
from benchmarks.harness import GIB, console, run_alone, shown, spread
from benchmarks.peers.official_weights import random_rwkv7
from benchmarks.worker import versions
from rwkv_jax.checkpoint import weights

PROMPT = "The Eiffel tower is in"
OURS, PEER = "rwkv_jax, sample.py", "PyPI rwkv, fp32"
MOST = 1.15
"""Memory of `--check`, in float32 parameters."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", help="interpreter with benchmarks/requirements.txt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/start"))
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is missed")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    large, small = args.folder / "large.pth", args.folder / "small.pth"
    size = written(large, SHAPE)
    written(small, SHAPE | {"width": 64})

    def sample(model: Path) -> list[str]:
        return [sys.executable, "sample.py", str(model), PROMPT, "--tokens", "1", "--seed", "1"]

    commands = {OURS: sample(large)}
    if args.peer_python:
        script = str(harness.ROOT / "benchmarks" / "peers" / "first_token_rwkv.py")
        threads = str(harness.device()["cores"])
        commands[PEER] = [args.peer_python, script, str(large), PROMPT, threads]
    for command in (*commands.values(), sample(small), sample(large)):
        run_alone(command)  # compiles, and has the files in the page cache
    rounds = []
    for index in range(args.rounds):
        console.print(f"[dim]round {index + 1} of {args.rounds}[/]")
        names = list(commands)
        random.Random(index).shuffle(names)
        rounds.append({name: run_alone(commands[name]) for name in names})
        rounds[-1]["small"] = run_alone(sample(small))
    for path in (large, small):
        path.unlink()

    ratios = {name: [r[name]["cpu"] / r[OURS]["cpu"] for r in rounds] for name in commands}
    memory = [(r[OURS]["anonymous"] - r["small"]["anonymous"]) / size for r in rounds]
    harness.table(
        f"From start to first token, 0.1B: median [min..max] of {args.rounds} rounds",
        ["", "CPU seconds", "times ours", "seconds", "peak anonymous GiB"],
        [
            [
                name,
                shown([r[name]["cpu"] for r in rounds], 1),
                shown(ratios[name], 2),
                shown([r[name]["seconds"] for r in rounds], 1),
                shown([r[name]["anonymous"] / GIB for r in rounds], 2),
            ]
            for name in commands
        ],
    )
    console.print(f"\nmemory beyond a small model's, in float32 parameters: {shown(memory, 2)}")
    missed = []
    if spread(memory)["median"] > MOST:
        missed.append(f"{spread(memory)['median']:.2f} times the parameters, at most {MOST}")
    if PEER in ratios and spread(ratios[PEER])["median"] < 1:
        missed.append("more CPU time than PyPI rwkv")
    for line in missed:
        console.print(f"[red]missed: {line}[/]")
    result = {
        name: {
            "cpu_seconds": spread([r[name]["cpu"] for r in rounds]),
            "times_ours": spread(ratios[name]),
            "peak_anonymous_bytes": spread([r[name]["anonymous"] for r in rounds]),
        }
        for name in commands
    }
    result |= {"memory_in_parameters": spread(memory), "missed": missed}
    harness.report("start", result | {"versions": {"ours": versions("jax", "jaxlib", "numpy")}})
    return int(args.check and bool(missed))


def written(path: Path, shape: dict) -> int:
    """Writes a model of random weights; returns the bytes of its parameters in float32."""
    tensors = random_rwkv7(shape)
    weights.write(path, {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()})
    return 4 * sum(x.size for x in tensors.values())


if __name__ == "__main__":
    sys.exit(main())
