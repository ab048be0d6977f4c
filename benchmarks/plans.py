"""Plans of every published size of version 7, each for a slice of TPUs that would train it.

    python -m benchmarks.plans [--config rwkv7-0.1b ...]

The step is compiled, not run: memory, FLOPs and traffic are read from the program, times follow
from peak rates (`rwkv_jax.planning`). Also meshes of 0.1B, next to what docs/scaling.md derives for
them. Needs `pip install -e '.[aot]'`. Configs that are not named keep their last result.
"""

import argparse
import json
import os
from dataclasses import replace

from benchmarks import harness
from benchmarks.harness import RESULTS, ROOT, console

SLICES = {
    "rwkv7-0.1b": "v5e:2x4",
    "rwkv7-0.4b": "v5e:4x4",
    "rwkv7-1.5b": "v5e:8x8",
    "rwkv7-2.9b": "v5e:8x8",
    "rwkv7-7.2b": "v5e:16x16",
    "rwkv7-13.3b": "v5p:8x8x4",
}
MESHES = {
    "0.1b data 8": {"data": 8, "fsdp": 1},
    "0.1b fsdp 8": {},
    "0.1b data 4 x tensor 2": {"data": 4, "fsdp": 1, "tensor": 2},
    "0.1b data 2 x sequence 4": {"data": 2, "fsdp": 1, "sequence": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = [*SLICES, *MESHES]
    parser.add_argument("--config", nargs="*", default=every, choices=every)
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    path = RESULTS / "plans.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    for name in args.config:
        console.print(f"[dim]{name}[/]")
        rows[name] = plan_row(name)
        rows = {key: rows[key] for key in every if key in rows}
        harness.report("plans", {"versions": {"ours": versions()}, "rows": rows})
    columns = [
        "",
        "devices",
        "GiB",
        "of",
        "FLOP per token: model",
        "program",
        "step, s",
        "traffic, MiB",
    ]
    harness.table("Plans", columns, [cells(name, row) for name, row in rows.items()])


def plan_row(name: str) -> dict:
    from rwkv_jax.config import MeshConfig
    from rwkv_jax.hardware import open_topology
    from rwkv_jax.planning.plan import make_plan
    from rwkv_jax.toml import load_config

    config = name if name in SLICES else "rwkv7-0.1b"
    cfg = load_config(ROOT / "configs" / f"{config}.toml")
    if name in MESHES:
        cfg = replace(cfg, mesh=MeshConfig(**MESHES[name]))
    cfg = replace(cfg, train=replace(cfg.train, steps=cfg.train.steps or 1))
    topology = open_topology(SLICES[config])
    plan = make_plan(cfg, topology)
    assert topology.chip
    best, worst = plan.seconds
    return {
        "topology": SLICES[config],
        "chip_gib": topology.chip.memory / 2**30,
        "mesh": plan.mesh,
        "devices": plan.devices,
        "batch": cfg.train.batch,
        "context": cfg.train.context,
        "remat": cfg.train.remat,
        "kernel": plan.kernel,
        "gib": {
            kind: getattr(plan, kind) / 2**30
            for kind in ("parameters", "optimizer", "gradients", "rest", "memory")
        },
        "fits": plan.fits,
        "needed_flops_per_token": plan.needed_flops / plan.tokens,
        "program_flops_per_token": plan.program_flops / plan.tokens,
        "traffic_mib": {
            " ".join(axes): {kind: size / 2**20 for kind, size in kinds.items()}
            for axes, kinds in plan.traffic.items()
        },
        "seconds": {"overlapped": best, "not": worst},
        "mfu": plan.mfu,
        "seconds_to_compile": plan.seconds_to_compile,
    }


def versions() -> dict:
    from benchmarks.worker import versions

    return versions("jax", "jaxlib", "libtpu")


def cells(name: str, row: dict) -> list[str]:
    traffic = {axes: sum(kinds.values()) for axes, kinds in row["traffic_mib"].items()}
    return [
        name,
        f"{row['topology']}",
        f"{row['gib']['memory']:.2f}",
        f"{row['chip_gib']:.0f}",
        f"{row['needed_flops_per_token']:.2e}",
        f"{row['program_flops_per_token']:.2e}",
        f"{row['seconds']['overlapped']:.3g} to {row['seconds']['not']:.3g}",
        ", ".join(f"{axes} {size:,.0f}" for axes, size in traffic.items()),
    ]


if __name__ == "__main__":
    main()
