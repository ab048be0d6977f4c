"""Every version trained for 200 steps of the demo: loss curves in one picture, docs/family.png.

    python -m benchmarks.family [--steps 200] [--versions 4 7] [--folder runs/family]

Text, tokenizer, batches, schedule, depth and width are those of configs/demo.toml with a schedule
of so many steps; only `model.version` differs. So short a run shows that a version trains as it
should, not which is best. A run that already exists is used as it is.
"""

import argparse
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks import harness
from benchmarks.worker import versions
from rwkv_jax import params
from rwkv_jax.checkpoint.store import read_config
from rwkv_jax.checkpoint.weights import load_run
from rwkv_jax.models import VERSIONS, specs
from rwkv_jax.sampling import Generator, Sampling
from rwkv_jax.sampling.decode import BLOCK
from rwkv_jax.training.metrics import read_metrics
from rwkv_jax.training.plot import smooth

PROMPT = """
def read(path):
    with open(path) as file:
        lines = file.read().splitlines()
    return [line for line in lines if line]


def write("""
PICTURE = harness.ROOT / "docs" / "family.png"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--versions", nargs="*", choices=tuple(VERSIONS), default=list(VERSIONS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("runs/family"))
    args = parser.parse_args()
    results = {}
    for version in args.versions:
        folder = args.folder / f"rwkv{version}"
        if not (folder / "loss.png").exists():
            train(version, args.steps, folder)
        check_prefill(folder)
        results[version] = summary(folder)
    draw(results, args.steps)
    harness.table(
        f"{args.steps} steps of configs/demo.toml",
        ["version", "parameters", "training, bits per byte", "held out"],
        [
            [
                version,
                f"{x['parameters'] / 1e6:.2f} M",
                f"{x['training']:.3f}",
                f"{x['heldout']:.3f}",
            ]
            for version, x in results.items()
        ],
    )
    for x in results.values():
        del x["curve"]
    harness.report(
        "family",
        {"steps": args.steps, "runs": results, "versions": {"ours": versions("jax", "jaxlib")}},
    )


def train(version: str, steps: int, folder: Path) -> None:
    settings = {
        "model.version": f'"{version}"',
        "train.steps": steps,
        "train.output": folder,
        "train.log_every": 5,
        "train.eval_every": 0,
        "train.checkpoint_every": steps,
    }
    command = [sys.executable, "train.py", *(f"{key}={x}" for key, x in settings.items())]
    subprocess.run(command, cwd=harness.ROOT, check=True, stdout=subprocess.DEVNULL)


def check_prefill(folder: Path) -> None:
    """Raises SystemExit if the text depends on how the prompt was cut into pieces."""
    generator = Generator(*load_run(folder))
    prompt = generator.tokenizer.encode(PROMPT)
    greedy = Sampling(temperature=0, presence_penalty=0, frequency_penalty=0).batched(1)
    texts = set()
    for cuts in ([], [7, 8, 30], range(1, len(prompt))):
        pieces = [prompt[a:b] for a, b in pairwise([0, *cuts, len(prompt)])]
        decoding = generator.prefill(pieces[:1], [0])
        for piece in pieces[1:]:
            decoding = generator.extend(decoding, piece)
        written, _ = generator.decode(decoding, greedy, BLOCK)
        texts.add(generator.tokenizer.decode_bytes(written[0]))
    if len(texts) != 1:
        raise SystemExit(f"{folder}: the text depends on how the prompt is cut: {texts}")


def summary(folder: Path) -> dict:
    lines = read_metrics(folder / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    table = specs(read_config(folder).model)
    return {
        "parameters": params.count(table),
        "training": float(np.mean([line["bpb"] for line in steps[-8:]])),
        "heldout": lines[-1]["heldout_bpb"],
        "curve": [(line["step"], line["bpb"]) for line in steps],
    }


def draw(results: dict[str, dict], steps: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    title = f"The family on the demo's text: {steps} steps, 2 layers of width 256"
    axes = figure.add_subplot(xlabel="step", ylabel="training, bits per byte", title=title)
    for version, x in results.items():
        step, bpb = np.array(x["curve"]).T
        axes.plot(step, smooth(bpb), label=f"RWKV-{version}  {x['training']:.3f}", linewidth=1.4)
    high = max(np.quantile([y for _, y in x["curve"]], 0.9) for x in results.values())
    axes.set_ylim(top=high)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE)
    harness.console.print(f"written: {PICTURE.relative_to(harness.ROOT)}")


if __name__ == "__main__":
    main()
