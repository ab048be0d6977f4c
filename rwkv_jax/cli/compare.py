"""`compare`: the curves of several runs in one picture, and their numbers in one table."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from rwkv_jax.cli.command import command, run, spoken, width
from rwkv_jax.console import numbers
from rwkv_jax.errors import UserError

ABOUT = """
Compare runs of train.py: a table of where they are, and their curves in one picture.

  {prog} runs/demo runs/lower-rate
  {prog} runs/* --plot sweep.png

Bits per byte; of runs that train a part of their text (data.train_on), nats per token of that part.
Runs on other text, or with another tokenizer, have other held-out text: the table says which
settings differ.
"""

SHOWN = 6
"""Settings that differ and are listed; the others are counted."""


def main(arguments: list[str], prog: str = "python -m rwkv_jax compare") -> int:
    """Runs the command line; returns the exit code: 2 for bad input."""
    parser = command(prog, "RUN... [--plot FILE]", ABOUT)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run")
    add, what = parser.add_argument, "the picture (default: compare.png)"
    add("--plot", metavar="FILE", type=Path, default=Path("compare.png"), help=what)
    return run(spoken(prog), partial(_compare, parser.parse_args(arguments)))


def _compare(args: argparse.Namespace) -> None:
    # Here, so that --help answers at once.
    from rwkv_jax.training.metrics import read_metrics
    from rwkv_jax.training.plot import measure_of, plot_runs, with_trained_loss

    if args.plot.is_dir() or not args.plot.parent.is_dir():
        raise UserError(f"--plot {args.plot}: cannot be a file; name one in an existing folder")
    runs = {name: read_metrics(_folder(name) / "metrics.jsonl") for name in args.runs}
    if empty := [name for name, lines in runs.items() if not lines]:
        raise UserError(f"{empty[0]}: has no metrics yet; wait for its first line, or leave it out")
    measure, console = measure_of(*runs.values()), Console(width=width())
    rows = [[name, *_cells(with_trained_loss(lines), measure)] for name, lines in runs.items()]
    titles = ["run", "step", "tokens", "training", "held out", "best", "at step"]
    numbers(console, titles, rows, title=measure.name, title_justify="left")
    for line in _differences(args.runs):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    plot_runs(runs, args.plot)
    console.print(f"{args.plot}", markup=False, highlight=False)


def _folder(name: str) -> Path:
    from rwkv_jax.checkpoint.store import find_run

    if not (found := find_run(name)):
        raise UserError(f"{name}: not the folder of a run; name what train.output was")
    return found.folder


def _cells(lines: list[dict[str, Any]], measure: Any) -> list[str]:
    """Where a run is, its last numbers, and its best evaluation."""
    train = [line for line in lines if measure.train in line]
    heldout = [line for line in lines if measure.heldout in line]
    last = max(lines, key=lambda line: line["step"])
    cells = [f"{last['step']:,}", f"{last.get('tokens', 0):,}"]
    cells.append(f"{train[-1][measure.train]:.3f}" if train else "")
    if not heldout:
        return [*cells, "", "", ""]
    best = min(heldout, key=lambda line: line[measure.heldout])
    numbers = (heldout[-1][measure.heldout], best[measure.heldout])
    return [*cells, *(f"{x:.3f}" for x in numbers), f"{best['step']:,}"]


def _differences(names: list[str]) -> list[str]:
    """The settings in which the runs differ, a line each."""
    from rwkv_jax.checkpoint.store import read_config
    from rwkv_jax.config import literal
    from rwkv_jax.training.folder import settings

    configs = [read_config(_folder(name)) for name in names]
    found = [settings(cfg) for cfg in configs]
    same = {"train.output", *(f"model.{x}" for x in vars(configs[0].model))}
    if any(cfg.model != configs[0].model for cfg in configs):  # 0 may stand for a rule
        same = {"train.output"}
    values = {key: [literal(one[key]) for one in found] for key in found[0] if key not in same}
    differing = {key: some for key, some in values.items() if len(set(some)) > 1}
    lines = [f"{key}: {', '.join(some)}" for key, some in [*differing.items()][:SHOWN]]
    more = len(differing) - SHOWN
    return [*lines, f"and {more} more settings differ"] if more > 0 else lines
