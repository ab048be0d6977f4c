"""Held-out bits per byte of a finished run, next to gzip and xz on the same text.

    python -m benchmarks.compression [runs/demo]

The numbers are those of the run's last evaluation: the model read all held-out tokens, the
compressors the same documents, concatenated, as bytes.
"""

import argparse
from pathlib import Path

from benchmarks import harness
from benchmarks.worker import versions
from rwkv_jax.checkpoint.store import read_config
from rwkv_jax.errors import UserError
from rwkv_jax.training.metrics import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/demo"))
    args = parser.parse_args()
    try:
        compare(args.run)
    except UserError as error:
        raise SystemExit(str(error)) from None


def compare(folder: Path) -> None:
    cfg = read_config(folder)
    evaluations = [
        line
        for line in read_metrics(folder / "metrics.jsonl")
        if "heldout_bpb" in line and "final" in line
    ]
    if not evaluations:
        raise UserError(
            f"{folder}: no final evaluation in metrics.jsonl; let the run finish (python train.py)"
        )
    last = evaluations[-1]
    bits = {
        f"rwkv_jax, version {cfg.model.version}, step {last['step']:,}": last["heldout_bpb"],
        **last["compressors"],
    }
    harness.table(
        f"Held-out text of {folder}: {last['heldout_tokens']:,} tokens",
        ["", "bits per byte", "of xz"],
        [[name, f"{value:.3f}", f"{value / bits['xz -9']:.1%}"] for name, value in bits.items()],
    )
    found = {"ours": versions("jax", "numpy", "tokenizers")}
    result = {
        "run": folder.resolve().name,
        "heldout_tokens": last["heldout_tokens"],
        "bits_per_byte": bits,
        "versions": found,
    }
    harness.report(f"compression_v{cfg.model.version}", result)


if __name__ == "__main__":
    main()
