"""`diff`: two files of weights, tensor by tensor."""

import argparse
from dataclasses import dataclass
from functools import partial
from typing import Any

from rwkv_jax.cli.command import command, run, spoken, width

ABOUT = """
Compare two files of weights of any format tensor by tensor, the largest difference first.

  {prog} rwkv-init.pth runs/demo
  {prog} model.pth model.safetensors --all

The difference is RMS(B - A) / RMS(A). Tensors that version 7 does not use in its first layer may be
missing in one of them. The exit code is 0 if all tensors hold the same numbers, else 1.
"""

FEW = 20


@dataclass(frozen=True)
class Row:
    """The comparison of one tensor."""

    name: str
    shape: str
    relative: float
    """RMS of the difference divided by that of A; infinite if only one file has the tensor."""
    largest: float
    note: str = ""


def main(arguments: list[str], prog: str = "python -m rwkv_jax diff") -> int:
    """Runs the command line; returns the exit code: 0 for the same numbers, 1 for others, 2 for bad
    input."""
    parser = command(prog, "A B [--all]", ABOUT)
    for name in ("A", "B"):
        parser.add_argument(
            name, help=".pth, .safetensors, Hugging Face folder, or folder of a run"
        )
    parser.add_argument(
        "--all", action="store_true", help=f"all tensors, not only the {FEW} that differ most"
    )
    differing: list[Row] = []
    code = run(spoken(prog), partial(_diff, parser.parse_args(arguments), differing))
    return code or int(bool(differing))


def _diff(args: argparse.Namespace, differing: list[Row]) -> None:
    # Here, so that --help answers at once.
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track
    from rich.table import Table

    from rwkv_jax.checkpoint.keymaps import optional
    from rwkv_jax.checkpoint.weights import read

    console = Console(width=width())
    first, second = (read(path).tensors for path in (args.A, args.B))
    in_both = first.keys() & second.keys()
    union = dict.fromkeys([*first, *second])
    names: Any = [name for name in union if name in in_both or not optional(name)]
    if console.is_terminal:
        names = track(names, "comparing", console=console, transient=True)
    rows = [_compare(name, first.get(name), second.get(name)) for name in names]
    rows.sort(key=lambda row: -row.relative)
    differing += [row for row in rows if row.relative or row.note]
    shown = rows if args.all else differing[:FEW]
    if shown:
        table = Table(title=escape(f"A: {args.A}   B: {args.B}"), title_justify="left")
        table.add_column("tensor", overflow="fold")
        for name in ("shape", "difference", "largest", ""):
            table.add_column(name, justify="right")
        for row in shown:
            numbers = ["", ""] if row.note else [f"{row.relative:.3g}", f"{row.largest:.3g}"]
            table.add_row(escape(row.name), row.shape, *numbers, row.note)
        console.print(table)
    same, left = len(rows) - len(differing), len(differing) - len(shown)
    more = f"; {left:,} more differ (--all shows them)" if left > 0 else ""
    console.print(f"{same:,} of {len(rows):,} tensors hold the same numbers{more}", highlight=False)


def _compare(name: str, first: Any, second: Any) -> Row:
    import numpy as np

    from rwkv_jax.checkpoint.keymaps import sizes

    shape = " x ".join(map(str, (second if first is None else first).shape))
    if first is None or second is None:
        return Row(name, shape, np.inf, np.inf, f"only in {'B' if first is None else 'A'}")
    if sizes(first) != sizes(second):
        other = " x ".join(map(str, second.shape))
        return Row(name, shape, np.inf, np.inf, f"{other} in B")
    a, b = (np.asarray(x).astype(np.float64).reshape(sizes(x)) for x in (first, second))
    if np.array_equal(a, b, equal_nan=True):
        return Row(name, shape, 0.0, 0.0)
    size, error = np.sqrt(np.mean(a**2)), np.sqrt(np.mean((b - a) ** 2))
    relative = float(error / size) if size else np.inf
    return Row(name, shape, relative if np.isfinite(relative) else np.inf, float(abs(b - a).max()))
