"""The largest error of every implementation against float64, over all tested cases.

    python -m benchmarks.accuracy [--long 4096]

The cases are those of tests/wkv/test_accuracy.py: every version, implementation, dtype and length
around a chunk, all regimes of rwkv_jax/testing.py and all patterns of resets. Errors are relative
RMS. Then the same in float32 over `--long` tokens, without resets. Prints the tables of
docs/operators.md.
"""

import argparse
import sys
from collections import defaultdict

from benchmarks import harness
from benchmarks.harness import ROOT, console
from benchmarks.worker import versions
from rwkv_jax import testing

sys.path.insert(0, str(ROOT / "tests"))

from wkv import accuracy
from wkv.operators import VERSIONS

ARRAYS = ("y", "final state", "gradients")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--long", type=int, default=4096)
    args = parser.parse_args()
    tested = {
        dtype: {
            f"{name}, {form}": worst(VERSIONS[name], form, dtype)
            for name in VERSIONS
            for form in accuracy.FORMS
        }
        for dtype in accuracy.DTYPES
    }
    long = testing.Shape(1, args.long, 1, 64)
    over = {
        f"{name}, {form}": worst(VERSIONS[name], form, "float32", long)
        for name in VERSIONS
        for form in accuracy.FORMS
    }
    for dtype, rows in tested.items():
        show(f"{dtype}: the largest relative RMS error of all cases", rows)
    show(f"float32, {args.long} tokens, the largest of all regimes", over)
    found = {"ours": versions("jax", "jaxlib", "numpy")}
    harness.report("accuracy", {"versions": found, "tested": tested, "long": over})


def worst(version, form: str | None, dtype: str, shape: testing.Shape | None = None) -> dict:
    """(error, regime, resets) of the worst array of each kind."""
    console.print(f"[dim]version {version.name}, {form}, {dtype}[/]")
    shapes = [shape] if shape else [accuracy.shape_of(version, form, n) for n in accuracy.LENGTHS]
    patterns = ("none",) if shape else testing.RESETS
    largest: dict[str, list] = defaultdict(lambda: [0.0, "", ""])
    for each in shapes:
        for regime, resets, found in accuracy.errors(version, form, dtype, each, patterns=patterns):
            for name, (error, _) in found.items():
                kind = "gradients" if name.startswith("d ") else name
                kind = "final state" if name.startswith("final") else kind
                largest[kind] = max(largest[kind], [error, regime, resets])
    return dict(largest)


def show(title: str, rows: dict) -> None:
    columns = ["version, form", *ARRAYS, "where the worst is"]
    cells = []
    for name, found in rows.items():
        errors = [f"{found[kind][0]:.0e}" if kind in found else "" for kind in ARRAYS]
        _, regime, resets = max(found.values())
        cells.append([name, *errors, f"{regime}, resets {resets}"])
    harness.table(title, columns, cells)


if __name__ == "__main__":
    main()
