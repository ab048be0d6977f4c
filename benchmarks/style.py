"""What tuning does to a small model: a style learnt from few examples, and what it costs elsewhere.

    python -m benchmarks.style [--folder runs/style] [--steps 200] [--base-steps 1900]

The demo's model is trained on the Python standard library without its tests; then it is tuned to
its tests, each function a document, by full fine-tuning, LoRA and state tuning, each with several
learning rates and the same batches. Bits per byte are those of functions that were held out, and of
other modules that no run has seen. Writes docs/style.png. Runs that exist already are used as they
are.
"""

import argparse
import ast
import json
import shutil
import sys
import sysconfig
import zlib
from pathlib import Path

from benchmarks import harness
from benchmarks.worker import versions
from rwkv_jax import params
from rwkv_jax.checkpoint.store import read_config
from rwkv_jax.training.metrics import read_metrics
from rwkv_jax.training.trainable import trained_by

PICTURE = harness.ROOT / "docs" / "style.png"
RATES = {
    "full": (3e-4, 1e-3),
    "lora": (3e-3, 1e-2),
    "state": (1e-2, 3e-2, 1e-1),
}
NAMES = {"full": "full fine-tuning", "lora": "LoRA, rank 8", "state": "state tuning"}
SIZES = {"tests": 1_000_000, "unseen": 120_000}
"""Bytes that are taken of the tests, and of other modules."""
LENGTHS = range(200, 1500)
"""Characters of a test that is taken."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/style"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--base-steps", type=int, default=1900)
    args = parser.parse_args()
    texts, runs = args.folder.absolute() / "texts", args.folder.absolute()
    if not texts.exists():
        collect(texts)
    base = runs / "base"
    train(base, {"data.source": texts / "rest", "train.steps": args.base_steps})
    found = {}
    for method, rates in RATES.items():
        for rate in rates:
            folder = runs / f"{method}-{rate:g}"
            cost = train(folder, settings(method, rate, base, texts, args.steps))
            found[f"{method}, {rate:g}"] = summary(folder) | cost | {"method": method, "rate": rate}
    draw(found)
    harness.table(
        f"{args.steps} steps on tests of the standard library",
        ["", "rate", "trained", "tests", "other modules", "seconds", "peak, MiB"],
        [
            [
                NAMES[x["method"]],
                f"{x['rate']:g}",
                f"{x['trained']:,}",
                f"{x['before']['style']:.3f} -> {x['after']['style']:.3f}",
                f"{x['before']['unseen']:.3f} -> {x['after']['unseen']:.3f}",
                f"{x['seconds']:.0f}",
                f"{x['anonymous'] / 2**20:,.0f}",
            ]
            for x in found.values()
        ],
    )
    made = {"steps": args.steps, "base_steps": args.base_steps, "runs": found}
    harness.report("style", made | {"versions": {"ours": versions("jax", "jaxlib")}})


def settings(method: str, rate: float, base: Path, texts: Path, steps: int) -> dict:
    return {
        "train.init": base,
        "data.source": texts / "tests.jsonl",
        "data.packing": "documents",
        "data.heldout": 0.08,
        "eval.texts": f'{{unseen = "{texts / "unseen"}"}}',
        "train.steps": steps,
        "train.eval_every": max(1, steps // 4),
        "train.eval_tokens": 100_000,
        "optimizer.peak_lr": rate,
        "optimizer.final_lr": rate / 10,
        "optimizer.warmup_steps": 10,
        "optimizer.weight_decay": 0.0,
        "tune.method": method,
        **({"tune.rank": 8, "tune.alpha": 16.0} if method == "lora" else {}),
    }


def collect(folder: Path) -> None:
    """Of the standard library: copies of its modules, `rest` and `unseen`, and `tests.jsonl`."""
    root, left, tests = Path(sysconfig.get_path("stdlib")), dict(SIZES), []
    for path in sorted(root.rglob("*.py"), key=lambda x: zlib.crc32(x.name.encode())):
        parts = path.relative_to(root).parts
        if {"site-packages", "dist-packages"} & {*parts} or path.stat().st_size > 200_000:
            continue
        if {"test", "tests", "idle_test"} & {*parts} or path.name.startswith("test_"):
            if left["tests"] > 0:
                tests += (found := functions(path))
                left["tests"] -= sum(map(len, found))
            continue
        kind = "unseen" if left["unseen"] > 0 else "rest"
        left["unseen"] -= path.stat().st_size
        target = folder / kind / "-".join(parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    lines = (json.dumps({"text": text}) for text in tests)
    (folder / "tests.jsonl").write_text("\n".join(lines) + "\n")


def functions(path: Path) -> list[str]:
    """The tests of a module."""
    try:
        text = path.read_text(encoding="utf-8")
        nodes = ast.walk(ast.parse(text))
    except (SyntaxError, UnicodeDecodeError, ValueError):  # files that are tests of a parser
        return []
    names = (x for x in nodes if isinstance(x, ast.FunctionDef) and x.name.startswith("test"))
    found = (ast.get_source_segment(text, x, padded=True) or "" for x in names)
    return [x + "\n" for x in found if len(x) in LENGTHS]


def train(folder: Path, stated: dict) -> dict:
    """A run of configs/demo.toml with these settings, and what it took."""
    took = folder.with_name(f"{folder.name}.json")
    if took.exists():
        return json.loads(took.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    harness.console.print(f"[dim]training {folder.name}[/]")
    all_stated = stated | {"train.output": folder, "sample.tokens": 0}
    command = [sys.executable, "train.py", "configs/demo.toml"]
    cost = harness.run_alone([*command, *(f"{name}={x}" for name, x in all_stated.items())])
    took.write_text(json.dumps(cost))
    return cost


def summary(folder: Path) -> dict:
    lines = [x for x in read_metrics(folder / "metrics.jsonl") if "heldout_bpb" in x]
    curve = [(x["step"], x["heldout_bpb"], x["eval_unseen_bpb"]) for x in lines]
    first, last = ({"style": x[1], "unseen": x[2]} for x in (curve[0], curve[-1]))
    trained = params.count(trained_by(read_config(folder)).specs)
    return {"before": first, "after": last, "curve": curve, "trained": trained}


def draw(found: dict[str, dict]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for (method, name), color in zip(NAMES.items(), ("C0", "C1", "C2"), strict=True):
        for x in (x for x in found.values() if x["method"] == method):
            line = [(a, b) for _, a, b in x["curve"]]
            axes.plot(*zip(*line, strict=True), "-", color=color, alpha=0.35, lw=1)
            axes.plot(*line[-1], "o", color=color)
            axes.annotate(f"{x['rate']:g}", line[-1], xytext=(5, 3), textcoords="offset points")
        axes.plot([], [], "o-", color=color, label=name)
    start = next(iter(found.values()))["before"]
    axes.plot(start["style"], start["unseen"], "k*", ms=12, label="before")
    axes.set_xlabel("bits per byte of held-out tests (the style)")
    axes.set_ylabel("bits per byte of other modules")
    axes.set_title("Tuned to tests of the standard library: each path is a learning rate")
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_png(PICTURE)


if __name__ == "__main__":
    main()
