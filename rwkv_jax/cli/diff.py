"""`diff`: two files of weights, tensor by tensor."""

import argparse
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console
from rich.markup import escape

from rwkv_jax.cli.command import add_model, command, import_jax, run, spoken, width
from rwkv_jax.console import numbers, tracked

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
    """The comparison of one tensor.

    `relative` is the RMS of the difference divided by that of A, `largest` the largest difference;
    both are infinite where `note` says why the tensors cannot be compared.
    """

    name: str
    shape: str
    relative: float
    largest: float
    note: str = ""

    def cells(self) -> list[str]:
        """The row as text."""
        sizes = ["", ""] if self.note else [f"{self.relative:.3g}", f"{self.largest:.3g}"]
        return [self.name, self.shape, *sizes, self.note]


def main(arguments: list[str], prog: str = "python -m rwkv_jax diff") -> int:
    """Runs the command line; returns the exit code: 0 for the same numbers, 1 for others, 2 for bad
    input."""
    parser = command(prog, "A B [--all]", ABOUT)
    for name in ("A", "B"):
        add_model(parser, name)
    few = f"all tensors, not only the {FEW} that differ most"
    parser.add_argument("--all", action="store_true", help=few)
    differing: list[Row] = []
    code = run(spoken(prog), partial(_diff, parser.parse_args(arguments), differing))
    return code or int(bool(differing))


def _diff(args: argparse.Namespace, differing: list[Row]) -> None:
    # Here, so that --help answers at once.
    import_jax()
    from rwkv_jax.checkpoint.keymaps import optional
    from rwkv_jax.checkpoint.weights import read

    console = Console(width=width())
    first, second = (read(path).tensors for path in (args.A, args.B))
    in_both = first.keys() & second.keys()
    union = dict.fromkeys([*first, *second])
    names = [name for name in union if name in in_both or not optional(name)]
    compared = tracked(console, names, "comparing")
    rows = [_compare(name, first.get(name), second.get(name)) for name in compared]
    rows.sort(key=lambda row: -row.relative)
    differing += [row for row in rows if row.relative or row.note]
    shown = rows if args.all else differing[:FEW]
    if shown:
        titles = ("tensor", "shape", "difference", "largest", "")
        title = escape(f"A: {args.A}   B: {args.B}")
        numbers(console, titles, map(Row.cells, shown), title=title, title_justify="left")
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
