"""`plan`: what a run needs and takes on hardware that need not be there."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rwkv_jax.cli.command import command, run, spoken, width

if TYPE_CHECKING:
    from rwkv_jax.config import DataConfig
    from rwkv_jax.planning.plan import Plan

HELP = """
Compile a run's training step for hardware that need not be there, and say what decides the run:
memory of a device and whether it fits, operations, traffic, and the time of a step at best.

  {prog} configs/rwkv7-7.2b.toml --topology v5e:16x16
      for a slice of 256 TPU v5e; also v4, v5p, v6e (v5p:4x4x4) and a100, h100 (h100:8 is a machine
      of eight, h100:4x8 four of them)
  {prog} configs/rwkv7-0.4b.toml --topology h100:8 train.batch=64 mesh.tensor=2
      any setting, as in training
  {prog} configs/rwkv7-1.5b.toml --topology v5e:4x4 --fit
      look for what is fastest and fits: fsdp and tensor (the config's sequence), the parts of a
      batch, and remat none, dots or block
  {prog} configs/demo.toml --topology here
      for the devices of this machine

Nothing is read but the config, and its tokenizer where model.vocab_size is open; an open
train.steps is taken as 1. The compilers for devices that are not there come with
pip install 'rwkv_jax[aot]'.
"""


def main(arguments: list[str], prog: str = "python -m rwkv_jax plan") -> int:
    """Runs the command line; returns the exit code: 2 for bad input, 130 when interrupted."""
    parser = command(prog, "CONFIG --topology NAME [--fit] [section.key=value ...]", HELP)
    parser.add_argument("config", help="a TOML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="TOML values")
    parser.add_argument("--topology", required=True, help="v5e:16x16, v5p:4x4x4, h100:8, here ...")
    parser.add_argument("--fit", action="store_true", help="search for the fastest that fits")
    parser.add_argument("--tries", type=int, default=8, help="steps compiled by --fit (default: 8)")
    parsed = parser.parse_intermixed_args(arguments)
    work = partial(
        _plan, Path(parsed.config), parsed.overrides, parsed.topology, parsed.fit, parsed.tries
    )
    return run(spoken(prog), work)


def _plan(config: Path, overrides: list[str], topology: str, fits: bool, tries: int) -> None:
    import os

    # Devices that are not there are compiled for; those that are would only be in the way.
    if topology != "here":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from dataclasses import replace

    from rich.console import Console

    from rwkv_jax.config import ConfigError
    from rwkv_jax.hardware import TopologyError, open_topology
    from rwkv_jax.planning.plan import Plan, fit, make_plan
    from rwkv_jax.toml import load_config

    cfg = load_config(config, overrides)
    if tries < 1:
        raise ConfigError(f"--tries {tries}: at least 1")
    if cfg.train.init:
        raise ConfigError("train.init: no weights are read here; state the model's sizes instead")
    model = replace(cfg.model, vocab_size=cfg.model.vocab_size or _vocabulary(cfg.data))
    cfg = replace(cfg, model=model, train=replace(cfg.train, steps=cfg.train.steps or 1))
    there, console = open_topology(topology), Console(width=width())
    if not fits:
        with console.status(f"compiling for {len(there.devices)} devices"):
            plan = make_plan(cfg, there)
        _show(console, plan)
        return
    if there.chip is None:
        raise TopologyError("--fit: the memory of the devices here is not known; name a topology")
    found: list[Plan] = []
    with console.status("compiling"):
        for one in fit(cfg, there, tries):
            _show_try(console, one)
            if isinstance(one, Plan) and one.fits:
                found.append(one)
    if not found:
        raise TopologyError(f"--fit: nothing that was tried fits {topology}; give more devices")
    best = min(found, key=lambda plan: plan.seconds[1])
    _show(console, best)
    mesh, train = best.cfg.mesh, best.cfg.train
    console.print(
        f"\n  train.accumulate={train.accumulate} train.remat={train.remat}"
        f" mesh.data=1 mesh.fsdp=-1 mesh.tensor={mesh.tensor} mesh.sequence={mesh.sequence}",
        soft_wrap=True,
    )


def _vocabulary(data: "DataConfig") -> int:
    """What a run's model will have where its config leaves it open; a BPE tokenizer is yet to be
    trained."""
    from rwkv_jax.data.tokenizers import open_tokenizer

    if data.tokenizer == "bpe":
        return data.bpe_vocab_size
    return open_tokenizer(data.tokenizer).vocab_size


def _show_try(console, one) -> None:
    from rwkv_jax.planning.plan import Plan

    cfg = one.cfg if isinstance(one, Plan) else one[0]
    parts = f"{cfg.train.accumulate} parts of a batch"
    setting = f"tensor {cfg.mesh.tensor}, remat {cfg.train.remat}, {parts}"
    if not isinstance(one, Plan):
        console.print(f"{setting}: {one[1]}", markup=False, highlight=False, soft_wrap=True)
        return
    fits = "fits" if one.fits else "does not fit"
    console.print(
        f"{setting}: {one.memory / 2**30:.1f} GiB {fits}, step {one.seconds[0]:.3g} to"
        f" {one.seconds[1]:.3g} s",
        highlight=False,
        soft_wrap=True,
    )


def _show(console, plan: "Plan") -> None:
    from rich.table import Table

    from rwkv_jax import models
    from rwkv_jax import params as tables

    cfg, chip, gib = plan.cfg, plan.topology.chip, 2**30
    axes = " x ".join(f"{name} {size}" for name, size in plan.mesh.items()) or "one device"
    count = tables.count(models.specs(cfg.model))
    table = Table(title="plan", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row(
        "model",
        f"RWKV-{cfg.model.version}, {count:,} parameters, vocabulary {cfg.model.vocab_size:,},"
        f" context {cfg.train.context:,}",
    )
    name = chip.name if chip else plan.topology.platform
    parts = f" in {cfg.train.accumulate} parts" if cfg.train.accumulate > 1 else ""
    hosts = f"{plan.topology.hosts} hosts" if plan.topology.hosts > 1 else "one host"
    table.add_row("devices", f"{plan.devices} x {name} ({axes}), {hosts}")
    table.add_row(
        "step",
        f"{cfg.train.batch} rows{parts}, {plan.tokens:,} tokens;"
        f" remat {cfg.train.remat}, {cfg.train.dtype};"
        f" recurrence by {'kernels' if plan.kernel else 'XLA'}",
    )
    table.add_section()
    for what, size in (
        ("parameters", plan.parameters),
        ("optimizer", plan.optimizer),
        ("gradients", plan.gradients),
        ("batch and carried", plan.carried),
        ("activations, temporaries", plan.rest),
    ):
        table.add_row(what, f"{size / gib:8.3f} GiB a device")
    told = ""
    if chip:
        told = f" of {chip.memory / gib:.0f}: {'fits' if plan.fits else 'DOES NOT FIT'}"
    table.add_row("together", f"{plan.memory / gib:8.3f} GiB{told}")
    table.add_section()
    per_token = plan.program_flops / plan.tokens
    table.add_row("the model needs", f"{plan.needed_flops / plan.tokens:.3e} FLOP a token")
    table.add_row("the program makes", f"{per_token:.3e} FLOP a token, in matrix products")
    table.add_section()
    for along, kinds in sorted(plan.traffic.items()):
        each = ", ".join(f"{kind} {size / 2**20:,.0f}" for kind, size in sorted(kinds.items()))
        table.add_row(f"over {' and '.join(along)}", f"{each} MiB a device and step")
    if chip:
        best, worst = plan.seconds
        table.add_section()
        table.add_row(
            "products",
            f"{plan.computing:.3g} s at {chip.flops / 1e12:,.0f} TFLOP/s, the peak in bfloat16",
        )
        table.add_row("traffic", f"{plan.telling:.3g} s at {plan.link_rate / 1e9:,.0f} GB/s")
        table.add_row(
            "step, at best",
            f"{best:.3g} s if all overlaps, {worst:.3g} s if nothing does:"
            f" {plan.tokens / best:,.0f} to {plan.tokens / worst:,.0f} tokens/s",
        )
        flops = plan.needed_flops / plan.devices / chip.flops
        table.add_row("MFU, at most", f"{flops / best:.0%} to {flops / worst:.0%}")
    table.add_row("compiled in", f"{plan.seconds_to_compile:.0f} s")
    console.print(table)
