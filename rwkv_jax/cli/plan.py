"""`plan`: what a run needs, on hardware that need not be present."""

import argparse
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from rwkv_jax.cli.command import command, import_jax, run, spoken, width
from rwkv_jax.config import Config, ConfigError, DataConfig
from rwkv_jax.console import header
from rwkv_jax.hardware import Topology, TopologyError, open_topology
from rwkv_jax.toml import load_config

if TYPE_CHECKING:
    from rwkv_jax.planning.plan import Plan

HELP = """
Compile a run's training step for hardware that need not be present, and report memory per device
and whether it fits, FLOPs, traffic between devices, and bounds on the time of a step.

  {prog} configs/rwkv7-7.2b.toml --topology v5e:16x16
      for a slice of 256 TPU v5e; also v4, v5p, v6e (v5p:4x4x4) and a100, h100 (h100:8 is a machine
      of eight, h100:4x8 four of them)
  {prog} configs/rwkv7-0.4b.toml --topology h100:8 train.batch=64 mesh.tensor=2
      any setting, as in training
  {prog} configs/rwkv7-1.5b.toml --topology v5e:4x4 --fit
      search for the fastest settings that fit: mesh.fsdp and mesh.tensor (mesh.sequence stays),
      train.accumulate, and train.remat none, dots or block
  {prog} configs/demo.toml --topology here
      for the devices of this machine

Only the config is read, and its tokenizer if model.vocab_size is 0; if train.steps is 0, it is
taken as 1. Compilers for devices that are not present come with pip install 'rwkv_jax[aot]'.
"""


def main(arguments: list[str], prog: str = "python -m rwkv_jax plan") -> int:
    """Runs the command line; returns the exit code: 2 for bad input, 130 when interrupted."""
    parser = command(prog, "CONFIG --topology NAME [--fit] [section.key=value ...]", HELP)
    parser.add_argument("config", type=Path, help="a TOML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="TOML values")
    parser.add_argument("--topology", required=True, help="v5e:16x16, v5p:4x4x4, h100:8, here ...")
    parser.add_argument("--fit", action="store_true", help="search for the fastest that fits")
    parser.add_argument("--tries", type=int, default=8, help="steps compiled by --fit (default: 8)")
    return run(spoken(prog), partial(_plan, parser.parse_intermixed_args(arguments)))


def _plan(args: argparse.Namespace) -> None:
    if args.topology != "here":
        # Compiling needs no device, and those that are present would only be in the way.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import_jax()
    from rwkv_jax.planning.plan import make_plan

    cfg = load_config(args.config, args.overrides)
    if args.tries < 1:
        raise ConfigError(f"--tries {args.tries}: at least 1")
    if cfg.train.init:
        raise ConfigError("train.init: plan reads no weights; give the model's sizes instead")
    model = replace(cfg.model, vocab_size=cfg.model.vocab_size or _vocab_size(cfg.data))
    cfg = replace(cfg, model=model, train=replace(cfg.train, steps=cfg.train.steps or 1))
    topology, console = open_topology(args.topology), Console(width=width())
    if args.fit:
        _fit(console, cfg, topology, args)
        return
    with console.status(f"compiling for {len(topology.devices)} devices"):
        plan = make_plan(cfg, topology)
    _show(console, plan)


def _vocab_size(data: DataConfig) -> int:
    """The vocabulary size that training would choose; a BPE tokenizer is not trained yet."""
    from rwkv_jax.data.tokenizers import open_tokenizer

    if data.tokenizer == "bpe":
        return data.bpe_vocab_size
    return open_tokenizer(data.tokenizer).vocab_size


def _fit(console: Console, cfg: Config, topology: Topology, args: argparse.Namespace) -> None:
    """Prints each plan that is tried, then the one with the fastest step of those that fit."""
    from rwkv_jax.planning.plan import Plan, fit

    if topology.chip is None:
        raise TopologyError("--fit: the memory of the devices here is not known; name a topology")
    fitting: list[Plan] = []
    with console.status("compiling"):
        for tried, plan in fit(cfg, topology, args.tries):
            result = str(plan)
            if isinstance(plan, Plan):
                fits = "fits" if plan.fits else "does not fit"
                best, worst = plan.seconds
                result = f"{plan.memory / 2**30:.1f} GiB {fits}, step {best:.3g} to {worst:.3g} s"
                fitting += [plan] if plan.fits else []
            mesh, train = tried.mesh, tried.train
            parts = f"{train.accumulate} parts of a batch"
            line = f"tensor {mesh.tensor}, remat {train.remat}, {parts}: {result}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not fitting:
        raise TopologyError(f"--fit: nothing that was tried fits {args.topology}; use more devices")
    best = min(fitting, key=lambda plan: plan.seconds[1])
    _show(console, best)
    mesh, train = best.cfg.mesh, best.cfg.train
    console.print(
        f"\n  train.accumulate={train.accumulate} train.remat={train.remat}"
        f" mesh.data=1 mesh.fsdp=-1 mesh.tensor={mesh.tensor} mesh.sequence={mesh.sequence}",
        soft_wrap=True,
    )


def _show(console: Console, plan: "Plan") -> None:
    sections = [_run(plan), _memory(plan), _flops(plan), _traffic(plan), _time(plan)]
    header(console, "plan", *sections)


def _run(plan: "Plan") -> dict[str, str]:
    from rwkv_jax import models
    from rwkv_jax.params import count

    model, train, topology = plan.cfg.model, plan.cfg.train, plan.topology
    axes = " x ".join(f"{name} {size}" for name, size in plan.mesh.items()) or "one device"
    chip = topology.chip.name if topology.chip else topology.platform
    hosts = f"{topology.hosts} hosts" if topology.hosts > 1 else "one host"
    parts = f" in {train.accumulate} parts" if train.accumulate > 1 else ""
    return {
        "model": f"RWKV-{model.version}, {count(models.specs(model)):,} parameters, vocabulary"
        f" {model.vocab_size:,}, context {train.context:,}",
        "devices": f"{plan.devices} x {chip} ({axes}), {hosts}",
        "step": f"{train.batch} rows{parts}, {plan.tokens:,} tokens; remat {train.remat},"
        f" {train.dtype}; recurrence by {'kernels' if plan.kernel else 'XLA'}",
    }


def _memory(plan: "Plan") -> dict[str, str]:
    sizes = {
        ("trained parameters" if plan.frozen else "parameters"): plan.parameters,
        **({"frozen weights": plan.frozen} if plan.frozen else {}),
        "optimizer": plan.optimizer,
        "gradients": plan.gradients,
        "batch and carried state": plan.carried,
        "activations, temporaries": plan.rest,
        "total": plan.memory,
    }
    rows = {name: f"{size / 2**30:8.3f} GiB per device" for name, size in sizes.items()}
    if chip := plan.topology.chip:
        rows["total"] += f", of {chip.memory / 2**30:.0f}: "
        rows["total"] += "fits" if plan.fits else "DOES NOT FIT"
    return rows


def _flops(plan: "Plan") -> dict[str, str]:
    program = plan.program_flops / plan.tokens
    return {
        "needed by the model": f"{plan.needed_flops / plan.tokens:.3e} FLOP per token",
        "made by the program": f"{program:.3e} FLOP per token, in matrix products",
    }


def _traffic(plan: "Plan") -> dict[str, str]:
    rows = {}
    for axes, kinds in sorted(plan.traffic.items()):
        sizes = ", ".join(f"{kind} {size / 2**20:,.0f}" for kind, size in sorted(kinds.items()))
        rows[f"over {' and '.join(axes)}"] = f"{sizes} MiB per device and step"
    return rows


def _time(plan: "Plan") -> dict[str, str]:
    rows, chip = {}, plan.topology.chip
    if chip:
        (best, worst), (high, low) = plan.seconds, plan.mfu
        compute, traffic = plan.compute_seconds, plan.traffic_seconds
        rows = {
            "compute": f"{compute:.3g} s at {chip.flops / 1e12:,.0f} TFLOP/s, the peak in bfloat16",
            "traffic": f"{traffic:.3g} s at {plan.link_rate / 1e9:,.0f} GB/s",
            "step, at best": f"{best:.3g} s with full overlap, {worst:.3g} s with none:"
            f" {plan.tokens / best:,.0f} to {plan.tokens / worst:,.0f} tokens/s",
            "MFU, at most": f"{high:.0%} to {low:.0%}",
        }
    return rows | {"compiled in": f"{plan.seconds_to_compile:.0f} s"}
