"""Does a step wait for its data, and does memory grow with the number of steps?

    python -m benchmarks.feeding PAIR [--part alone] [--processes 4] [--steps 100] [--rounds 7]

PAIR is a binidx pair of the World vocabulary, of any size (`python -m rwkv_jax tokenize`). First,
in one process, steps that read their batches from it, as a run does, alternate with steps that are
given the same batch every time. Then several processes, with one device each, train together as
`train.py` does: each reads its own rows of every batch, and reports its private memory (`RssAnon`:
without the mapped pages of the pair, which the system may drop).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

BATCH, CONTEXT = 8, 512
PACKINGS = {"windows": {}, "packed documents": {"packing": "documents"}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pair", type=Path)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100, help="of the processes")
    parser.add_argument("--rounds", type=int, default=7)
    parts = ["alone", "together"]
    parser.add_argument("--part", nargs="*", choices=parts, default=parts, help="or one of both")
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=29_517)
    args = parser.parse_args()
    if args.process is not None:
        run_process(args)
        return

    from benchmarks import harness
    from benchmarks.harness import console
    from benchmarks.worker import versions

    path = harness.RESULTS / "feeding.json"
    last = json.loads(path.read_text()) if path.exists() else {}
    result = {name: last[name] for name in ("alone", "together") if name in last}
    result |= {"versions": {"ours": versions("jax", "jaxlib", "numpy")}}
    result["pair_bytes"] = Path(f"{args.pair}.bin").stat().st_size
    if "alone" in args.part:
        result["alone"] = alone(args)
    if "together" in args.part:
        console.print(f"\n[dim]{args.processes} processes[/]")
        result["together"] = lines = run_together(args)
        memory = [[f"{x['process']}", *(f"{m:,.0f}" for m in x["memory_mib"])] for x in lines]
        marks = [f"step {step}" for step in lines[0]["steps"]]
        harness.table("MiB of a process' own", ["process", *marks], memory)
        console.print(f"the pair: {result['pair_bytes'] / 2**30:.2f} GiB; loss")
        console.print(f"{lines[0]['losses'][0]:.3f} to {lines[0]['losses'][-1]:.3f} in all of them")
    harness.report("feeding", result)


def alone(args: argparse.Namespace) -> dict:
    """Steps that read their batch beside steps that are given one, in one process."""
    from benchmarks import harness
    from benchmarks.harness import shown, spread

    rows, found = [], {}
    for name, settings in PACKINGS.items():
        fed, given = side_by_side(args.pair, settings, args.rounds)
        ratios = [a / b for a, b in zip(fed, given, strict=True)]
        found[name] = {"fed": spread(fed), "given": spread(given), "ratio": spread(ratios)}
        milliseconds = [shown([1000 * t for t in times]) for times in (fed, given)]
        rows.append([name, *milliseconds, shown(ratios, 3)])
    columns = ["", "ms a step, read", "ms, one batch", "read is x times"]
    harness.table(f"A step of {BATCH} x {CONTEXT} tokens", columns, rows)
    return found


def opened(pair: Path, settings: dict):
    """A small config, its loader, and a step."""
    from rwkv_jax.config import Config, DataConfig, ModelConfig, TrainConfig
    from rwkv_jax.data.loader import Batching, open_loader
    from rwkv_jax.data.sources import open_data

    data = DataConfig(source=str(pair), tokenizer="world", heldout=0.0, **settings)
    model = ModelConfig(layers=2, width=128, vocab_size=65536)
    train = TrainConfig(batch=BATCH, context=CONTEXT)
    loader = open_loader(
        open_data(data, progress=False).streams,
        Batching(0, BATCH, CONTEXT, model.vocab_size, packing=data.packing),
    )
    return Config(model=model, data=data, train=train), loader


def side_by_side(pair: Path, settings: dict, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds a step: reading its batches, and with one batch; by round."""
    from rwkv_jax.data.loader import prefetched
    from rwkv_jax.training.state import init_train_state
    from rwkv_jax.training.step import make_train_step

    cfg, loader = opened(pair, settings)
    train_step = make_train_step(cfg)
    state, _ = train_step(init_train_state(cfg), loader.read(0))
    one, count, step = loader.read(1), 5, 0
    fed, given = [], []

    def timed(batches) -> float:
        nonlocal state
        begin = time.perf_counter()
        for batch in batches:
            state, metrics = train_step(state, batch)
        float(metrics.loss)
        return (time.perf_counter() - begin) / count

    for index in range(rounds):
        turns = [
            (fed, prefetched(loader.read, range(step, step + count))),
            (given, iter([one] * count)),
        ]
        step += count
        for times, batches in turns if index % 2 else reversed(turns):
            times.append(timed(batches))
    return fed, given


def run_together(args: argparse.Namespace) -> list[dict]:
    command = [sys.executable, "-m", "benchmarks.feeding", str(args.pair), f"--port={args.port}"]
    command += [f"--processes={args.processes}", f"--steps={args.steps}"]
    running = [
        subprocess.Popen([*command, f"--process={i}"], stdout=subprocess.PIPE, text=True)
        for i in range(args.processes)
    ]
    found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
    assert all(x["losses"] == found[0]["losses"] for x in found)
    return found


def run_process(args: argparse.Namespace) -> None:
    """One of the processes: prints its memory and losses."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{args.port}",
        "JAX_NUM_PROCESSES": str(args.processes),
        "JAX_PROCESS_ID": str(args.process),
    }
    import jax

    from rwkv_jax import sharding
    from rwkv_jax.data.loader import prefetched
    from rwkv_jax.training import hosts
    from rwkv_jax.training.mesh import LocalRows, make_mesh
    from rwkv_jax.training.state import init_train_state
    from rwkv_jax.training.step import make_train_step

    hosts.join()
    cfg, loader = opened(args.pair, PACKINGS["packed documents"])
    mesh = make_mesh(cfg)
    assert mesh is not None and mesh.size == args.processes
    state = init_train_state(cfg, mesh=mesh)
    train_step = make_train_step(cfg)
    memory, losses, marks = [], [], []
    for step, batch in enumerate(prefetched(LocalRows(loader, mesh).read, range(args.steps)), 1):
        with sharding.use_mesh(mesh):
            state, metrics = train_step(state, batch)
        losses.append(float(metrics.loss))
        if step in (5, args.steps // 4, args.steps // 2, args.steps):
            marks.append(step)
            memory.append(anonymous_mib())
    line = {"process": args.process, "steps": marks, "memory_mib": memory, "losses": losses}
    print(json.dumps(line), flush=True)
    jax.distributed.shutdown()


def anonymous_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status does not say RssAnon")


if __name__ == "__main__":
    main()
