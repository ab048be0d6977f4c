"""All measurements that need a GPU, in one command of less than ten minutes.

    python -m benchmarks.gpu_suite [--seconds 540] [--peer-python PATH]

The parts run in this order while time is left, and results are written after each:

1. the device's rates: bytes/s of a copy, FLOP/s of a bfloat16 matrix product;
2. errors of `mosaic_gpu`, which no device has run yet, in a process that is killed if it hangs;
3. errors of every other implementation on this device against `lax.scan` in float64, with
   gradients, in at most half of the time;
4. the operators in bfloat16, forward and with gradients, beside flash-linear-attention, ejkernel
   and rwkv-ops where they are installed (benchmarks/requirements-gpu.txt), each in its own process,
   which is killed if it fails or takes too long;
5. training steps of version 7 at 0.1B and 0.4B: tokens/s, and model FLOP/s relative to part 1;
6. decoding at batch 1, 32 and 256.

Writes benchmarks/results/gpu_NAME.json and docs/gpu_NAME.png, where NAME is the device's. `--tiny`
runs everything with small shapes on any device, as a smoke test.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from functools import partial

# The packages compared share the device's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from benchmarks.harness import RESULTS, ROOT, Worker, console, spread
from benchmarks.worker import versions
from rwkv_jax import testing as cases
from rwkv_jax.wkv import IMPLEMENTATIONS, KERNELS, Wkv4State, wkv4, wkv6, wkv7
from rwkv_jax.wkv.operator import HOPPER

SHAPES = [(8, 4096, 64, 64), (8, 1024, 12, 64), (1, 32768, 32, 64)]
"""(B, T, H, N) of the operators."""
CONTESTANTS = {
    "rwkv_jax": {"package": "rwkv_jax", "implementation": None},
    HOPPER: {"package": "rwkv_jax", "implementation": HOPPER},
    "chunked": {"package": "rwkv_jax", "implementation": "chunked"},
    "fla, chunk": {"package": "fla", "implementation": "chunk"},
    "fla, bounded": {"package": "fla", "implementation": "chunk, bounded decay"},
    "fla, recurrent": {"package": "fla", "implementation": "fused_recurrent"},
    "ejkernel": {"package": "ejkernel", "implementation": None},
    "rwkv-ops": {"package": "rwkv-ops", "implementation": None},
}
MODELS = {"0.1B": (12, 768, 16), "0.4B": (24, 1024, 8)}
"""(layers, width, rows of 4,096 tokens)."""
OPERATORS = {
    "4": (wkv4, cases.wkv4_inputs),
    "6": (wkv6, cases.wkv6_inputs),
    "7": (wkv7, cases.wkv7_inputs),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--first-run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.first_run:
        run_hopper(args.tiny)
        return
    if not args.tiny and jax.default_backend() != "gpu":
        parser.error(f"no GPU here, only {jax.devices()[0].device_kind}; --tiny runs on any device")
    suite = Suite(args.seconds, args.tiny)
    suite.add("device_gives", device_rates, args.tiny)
    suite.add(HOPPER, first_run, suite)
    suite.add("errors", errors, suite)
    suite.add("operators", operators, suite, args.peer_python)
    suite.add("training", training, suite)
    suite.add("decoding", decoding, suite)
    suite.show()


class Suite:
    """The results, saved after each part, and the time left."""

    def __init__(self, seconds: float, tiny: bool):
        self.seconds, self.tiny = seconds, tiny
        self.ends = time.monotonic() + seconds
        device = jax.devices()[0]
        name = "tiny" if tiny else re.sub(r"\W+", "_", device.device_kind).strip("_").lower()
        self.name = f"gpu_{name}"
        self.results = {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": {"kind": device.device_kind, "driver": driver(), **harness.device()},
            "versions": {"ours": versions("jax", "jaxlib", "numpy")},
            "skipped": [],
        }

    def left(self) -> float:
        return self.ends - time.monotonic()

    def add(self, part: str, run, *arguments) -> None:
        if self.left() < 20:
            self.results["skipped"].append(part)
            console.print(f"[yellow]no time left for: {part}[/]")
            return
        start = time.monotonic()
        console.print(f"[bold]{part}[/], {self.left():.0f} s left")
        try:
            self.results[part] = run(*arguments)
        except Exception as error:  # the other parts are still worth running
            self.results[part] = {"failed": f"{type(error).__name__}: {error}"[:500]}
            console.print(f"[red]{part}: {self.results[part]['failed']}[/]")
        console.print(f"[dim]{part} took {time.monotonic() - start:.0f} s[/]")
        self.save()

    def save(self, **part: dict) -> None:
        """Write the results so far, so that an interrupted run loses nothing."""
        self.results |= part
        if not self.tiny:
            self.path.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")

    @property
    def path(self):
        return RESULTS / f"{self.name}.json"

    def show(self) -> None:
        """Print the tables, and save the figure."""
        show_errors(self.results.get(HOPPER, {}) | self.results.get("errors", {}))
        show_operators(self.results.get("operators", {}))
        for part in ("training", "decoding"):
            rows = [
                [name, *(f"{value:,.3g}" for value in cell.values())]
                for name, cell in self.results.get(part, {}).items()
                if isinstance(cell, dict)
            ]
            if rows:
                cells = next(x for x in self.results[part].values() if isinstance(x, dict))
                harness.table(part, ["", *cells], rows)
        rates = self.results.get("device_gives", {})
        shown = (f"{x:,.3g} {name}" if isinstance(x, float) else x for name, x in rates.items())
        device = self.results["device"]
        console.print(f"\n{device['kind']}, driver {device['driver']}: {', '.join(shown)}")
        if self.results["skipped"]:
            console.print(f"no time was left for: {', '.join(self.results['skipped'])}")
        if not self.tiny:
            plot(self.results, self.name)
            console.print(f"written: {self.path.relative_to(ROOT)}, docs/{self.name}.png")


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "none"
    return run.stdout.strip().splitlines()[0]


def first_run(suite: Suite) -> dict:
    """Errors of the kernel for Hopper GPUs, by length; what it found before it had to be killed."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_suite",
        "--first-run",
        *["--tiny"] * suite.tiny,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        clock = threading.Timer(90, process.kill)
        clock.start()
        output, _ = process.communicate()
        clock.cancel()
    found = {}
    for line in output.splitlines():
        found |= json.loads(line)
    if process.returncode:
        found["the rest"] = {"failed": f"ended with {process.returncode}, or took more than 90 s"}
    return found


def run_hopper(tiny: bool) -> None:
    """One chunk, two, and a part of one more; a line for each."""
    for tokens in (64,) if tiny else (64, 128, 165):
        shape = cases.Shape(1, tokens, 1, 64) if tiny else cases.Shape(2, tokens, 4, 64)
        inputs = {x: typed("7", x, "bfloat16", shape) for x in ("typical", "repeated key")}
        try:
            cell = error("7", HOPPER, inputs, reference("7", inputs, shape), shape)
        except Exception as failure:
            cell = {"failed": " ".join(str(failure).split())[:200]}
        print(json.dumps({f"7, bfloat16, {HOPPER}, {tokens} tokens": cell}), flush=True)


def errors(suite: Suite) -> dict:
    """Relative RMS errors of y, the final state and all gradients, in some hard regimes."""
    shape = cases.Shape(1, 37, 2, 16) if suite.tiny else cases.Shape(2, 165, 4, 64)
    names = (None, *IMPLEMENTATIONS, *device_kernels())
    found: dict = {}
    regimes = {
        "4": ("typical", "large keys and extreme decays"),
        "6": ("typical", "toggling decay", "repeated key"),
        "7": ("typical", "minimal decay", "repeated key", "alternating sign"),
    }
    for version in "7" if suite.tiny else "764":
        for dtype in ("bfloat16", "float32")[: 1 if suite.tiny else None]:
            chosen = regimes[version][: 1 if suite.tiny else None]
            inputs = {regime: typed(version, regime, dtype, shape) for regime in chosen}
            exact = reference(version, inputs, shape)
            for name in names:
                if suite.left() < suite.seconds / 2:
                    return found | {"the rest": {"failed": "half of the time was over"}}
                key = f"{version}, {dtype}, {name or 'default'}"
                try:
                    found[key] = error(version, name, inputs, exact, shape)
                except Exception as failure:
                    found[key] = {"failed": " ".join(str(failure).split())[:200]}
                suite.save(errors=found)
    return found


def device_kernels() -> tuple[str, ...]:
    """The kernels for this device; on a CPU both, interpreted."""
    platform = jax.default_backend()
    return {"gpu": KERNELS[:1], "tpu": KERNELS[1:]}.get(platform, KERNELS)


def typed(version: str, regime: str, dtype: str, shape: cases.Shape) -> dict:
    return {
        letter: np.asarray(jnp.asarray(z, "float32" if letter in ("log_w", "u") else dtype))
        for letter, z in OPERATORS[version][1](regime, shape).items()
    }


def program(version: str, name: str | None, shape: cases.Shape):
    """x -> y, the final state, all gradients; one program for all regimes."""
    operator, _ = OPERATORS[version]
    reset = cases.reset_pattern("random", shape, seed=1)

    def run(x):
        y, pull_back, state = jax.vjp(
            lambda x: operator(**x, reset=reset, implementation=name), x, has_aux=True
        )
        state = (state.num / state.den) if isinstance(state, Wkv4State) else state
        return y, state, pull_back(jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype))[0]

    return jax.jit(run)


def reference(version: str, inputs: dict, shape: cases.Shape) -> dict:
    with jax.enable_x64(True):
        run = program(version, "scan", shape)
        return {
            regime: jax.device_get(run({k: np.asarray(z, np.float64) for k, z in x.items()}))
            for regime, x in inputs.items()
        }


def error(version: str, name: str | None, inputs: dict, exact: dict, shape: cases.Shape) -> dict:
    """The largest relative RMS errors over the regimes."""

    def relative_rms(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(np.sqrt(np.mean((a - b) ** 2)) / max(np.sqrt(np.mean(b**2)), 1e-30))

    run, worst = program(version, name, shape), {"y": 0.0, "state": 0.0, "gradients": 0.0}
    for regime, x in inputs.items():
        y, state, gradients = jax.device_get(run(x))
        found = {
            "y": relative_rms(y, exact[regime][0]),
            "state": relative_rms(state, exact[regime][1]),
            "gradients": max(relative_rms(gradients[k], exact[regime][2][k]) for k in x),
        }
        worst = {what: max(value, found[what]) for what, value in worst.items()}
    return worst


def device_rates(tiny: bool) -> dict:
    """Bytes/s of a copy (one read, one write), FLOP/s of a product of two matrices."""
    count = 2**20 if tiny else 2**29
    x = jnp.ones(count, jnp.bfloat16)
    copy = min_time(jax.jit(lambda x: -x), x)
    n = 256 if tiny else 8192
    a = jnp.ones((n, n), jnp.bfloat16)
    product = min_time(jax.jit(lambda a: a @ a), a)
    return {"GB/s": 2 * x.nbytes / copy / 1e9, "TFLOP/s in bfloat16": 2 * n**3 / product / 1e12}


def min_time(run, *args) -> float:
    jax.block_until_ready(run(*args))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        times.append(time.perf_counter() - start)
    return min(times)


def operators(suite: Suite, peer_python: str) -> dict:
    """Every contestant at each shape, forward and with gradients."""
    shapes = [(1, 64, 2, 64)] if suite.tiny else SHAPES
    makers = {
        name: partial(
            Worker,
            "gpu_operators.py",
            {**options, "threads": 0},
            python=sys.executable if options["package"] == "rwkv_jax" else peer_python,
        )
        for name, options in CONTESTANTS.items()
    }
    workers = {}
    for name, make in makers.items():
        try:
            workers |= harness.start_all({name: make})
        except (RuntimeError, ValueError, OSError) as failure:
            console.print(f"[red]{name}: {failure}[/]")
    found = {"versions": {name: worker.about["versions"] for name, worker in workers.items()}}
    for version in "7" if suite.tiny else "764":
        for shape in shapes:
            for gradients in (True, False):
                # The rest is for training and decoding.
                if suite.left() < 150 and not suite.tiny:
                    break
                what = "forward + backward" if gradients else "forward"
                request = {"version": version, "shape": shape, "gradients": gradients}
                cells = {}
                for name in [*workers]:
                    cells[name] = ask(workers, name, {**request, "seconds": 2})
                ours = cells.get("rwkv_jax", {}).get("samples")
                for cell in cells.values():
                    if "seconds" not in cell:
                        continue
                    cell["GB/s"] = (
                        traffic(version, shape, gradients) / cell["seconds"]["median"] / 1e9
                    )
                    cell["apart"] = difference(cell.pop("samples"), ours)
                found[f"version {version}, B T H N {shape}, {what}"] = cells
                suite.save(operators=found)
    for worker in workers.values():
        worker.close()
    return found


TIMEOUT = 45
"""Seconds a contestant may take for one row, compilation and tuning included."""


def ask(workers: dict, name: str, request: dict) -> dict:
    """A contestant's answer. One that dies or takes too long is dropped."""
    worker = workers[name]
    clock = threading.Timer(TIMEOUT, worker.process.kill)
    clock.start()
    try:
        return worker.ask(request)
    except (RuntimeError, OSError, ValueError) as failure:
        del workers[name]
        console.print(f"[red]{name}, {request}: {failure}[/]")
        return {"absent": f"ended, or took more than {TIMEOUT} s"}
    finally:
        clock.cancel()


def traffic(version: str, shape: tuple[int, ...], gradients: bool) -> int:
    """The fewest bytes to move: each input read and each result written once, in bfloat16 except
    the decays; with gradients also the inputs again, dy and each input's gradient."""
    b, t, h, n = shape
    tokens, decays = {"4": (2, 0), "6": (3, 1), "7": (5, 1)}[version]
    inputs = 2 * tokens + 4 * decays
    return b * t * h * n * (inputs + 2 if not gradients else inputs + 2 + inputs + 2 + inputs)


def difference(theirs: list, ours: list | None) -> float | None:
    """The largest relative RMS difference from ours, over samples of each result."""
    if ours is None:
        return None
    worst = 0.0
    for x, y in zip(theirs, ours, strict=False):
        x, y = np.array(x), np.array(y)
        if x.shape == y.shape:
            worst = max(worst, float(np.sqrt(np.mean((x - y) ** 2) / max(np.mean(y**2), 1e-30))))
    return worst


def training(suite: Suite) -> dict:
    """Tokens/s of whole steps, and model FLOP/s (`rwkv_jax.training.flops`)."""
    from rwkv_jax.config import Config, ModelConfig, OptimizerConfig, TrainConfig
    from rwkv_jax.data.loader import Batch
    from rwkv_jax.training.flops import model_flops
    from rwkv_jax.training.state import init_train_state
    from rwkv_jax.training.step import make_train_step

    found = {}
    for name, (layers, width, rows) in MODELS.items():
        context, vocab = 4096, 65536
        if suite.tiny:
            layers, width, rows, context, vocab = 1, 64, 1, 32, 256
        if suite.left() < 90 and not suite.tiny:
            break
        model = ModelConfig(version="7", layers=layers, width=width, vocab_size=vocab)
        cfg = Config(
            model=model,
            optimizer=OptimizerConfig(peak_lr=1e-4, final_lr=1e-4),
            train=TrainConfig(batch=rows, context=context, dtype="bfloat16"),
        )
        tokens = np.random.default_rng(0).integers(0, vocab, (rows, context + 1), np.int32)
        batch = Batch(tokens[:, :-1], tokens[:, 1:], np.zeros((rows, context), bool))
        step, state = make_train_step(cfg), init_train_state(cfg)
        parameters = sum(x.size for x in jax.tree.leaves(state.params)) - vocab * width
        times = []
        for _ in range(3 if suite.tiny else 12):
            start = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - start)
        seconds = spread(times[2:])["median"]
        flops = rows * context * model_flops(model)
        rate = suite.results.get("device_gives", {}).get("TFLOP/s in bfloat16", float("nan"))
        found[name] = {
            "million parameters": (parameters + vocab * width) / 1e6,
            "tokens/s": rows * context / seconds,
            "TFLOP/s": flops / seconds / 1e12,
            "% of a product's": 100 * flops / seconds / 1e12 / rate,
            "loss": float(metrics.loss),
        }
        del state, step
    return found


def decoding(suite: Suite) -> dict:
    """Tokens/s of all rows together, sampled with top-p 0.85, and bytes/s relative to a copy's."""
    from rwkv_jax import ModelConfig, init_params
    from rwkv_jax.sampling import Sampling
    from rwkv_jax.sampling.decode import decode, decoding_layout, prefill
    from rwkv_jax.sampling.transforms import Vocabulary

    layers, width, vocab = (1, 64, 256) if suite.tiny else (12, 768, 65536)
    cfg = ModelConfig(version="7", layers=layers, width=width, vocab_size=vocab)
    params = decoding_layout(init_params(cfg, jax.random.key(0)), cfg)
    size = sum(x.nbytes for x in jax.tree.leaves(params)) - params.emb.nbytes
    allowed = Vocabulary(allowed=np.ones(vocab, bool), increment=np.ones(vocab, np.float32))
    allowed = jax.device_put(allowed)
    found, count = {}, 8 if suite.tiny else 64
    for rows in (1, 2) if suite.tiny else (1, 32, 256):
        if suite.left() < 30 and not suite.tiny:
            break
        held = prefill(params, [[1, 2, 3]] * rows, list(range(rows)), cfg=cfg, end=-1)
        settings = Sampling(top_p=0.85).batched(rows)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            _, held = decode(params, held, settings, allowed, count, cfg=cfg, end=-1)
            jax.block_until_ready(held)
            times.append(time.perf_counter() - start)
        seconds = spread(times[1:])["median"] / count
        rate = suite.results.get("device_gives", {}).get("GB/s", float("nan"))
        state = 2 * rows * sum(x.nbytes for x in jax.tree.leaves(held.state)) / rows
        found[f"batch {rows}"] = {
            "tokens/s": rows / seconds,
            "% of a copy's bytes/s": 100 * (size + state) / seconds / 1e9 / rate,
        }
    return found


def show_errors(found: dict) -> None:
    rows = [
        [name, *(f"{x:.0e}" if isinstance(x, float) else x[:40] for x in cell.values())]
        for name, cell in found.items()
        if isinstance(cell, dict)
    ]
    rows = [row + [""] * (4 - len(row)) for row in rows]
    if rows:
        harness.table("Errors against float64", ["", "y", "state", "gradients"], rows)


def show_operators(found: dict) -> None:
    rows = []
    for what, cells in found.items():
        if what == "versions" or not isinstance(cells, dict):
            continue
        ours = cells.get("rwkv_jax", {}).get("seconds", {}).get("median")
        version, *shape, kind = re.findall(r"\d+|forward.*", what)
        row = [f"{version}: {' x '.join(shape)}, {'f+b' if 'back' in kind else 'f'}"]
        for name in CONTESTANTS:
            cell = cells.get(name, {"absent": "not installed"})
            if "seconds" in cell and ours:
                median = cell["seconds"]["median"]
                row.append(f"{1e3 * median:.3g} ({median / ours:.2f}x)")
            else:
                row.append(cell.get("absent", "")[:16])
        rows.append(row)
    if rows:
        title = "Operators, bfloat16: ms, and relative to ours; forward, and with gradients (f+b)"
        harness.table(title, ["version: B x T x H x N", *CONTESTANTS], rows)


def plot(found: dict, name: str) -> None:
    """Plot all contestants' times for version 7, forward and backward, by shape."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    chosen = {
        what: cells
        for what, cells in found.get("operators", {}).items()
        if what.startswith("version 7") and what.endswith("backward")
    }
    if not chosen:
        return
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    height = 0.8 / len(CONTESTANTS)
    for index, contestant in enumerate(CONTESTANTS):
        medians = [
            1e3 * cells.get(contestant, {}).get("seconds", {}).get("median", np.nan)
            for cells in chosen.values()
        ]
        axes.barh(np.arange(len(chosen)) + index * height, medians, height, label=contestant)
    labels = [what.split(", B T H N ")[1].rsplit(", ", 1)[0] for what in chosen]
    axes.set_yticks(np.arange(len(chosen)) + 0.4 - height / 2, labels)
    axes.set(xlabel="ms", xscale="log", ylabel="B, T, H, N")
    axes.set_title(f"wkv7, forward and backward, bfloat16, {found['device']['kind']}")
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(ROOT / "docs" / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
