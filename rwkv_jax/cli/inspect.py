"""`inspect`: what a weight file, or an adapter, holds."""

import argparse
import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape

from rwkv_jax.cli.adapters import ALPHA, Changes, load_all, show_info
from rwkv_jax.cli.command import add_model, command, import_jax, run, spoken, width
from rwkv_jax.console import header, numbers, tracked
from rwkv_jax.errors import UserError

ABOUT = """
What a weight file holds: version, sizes, tokenizer, parameters by group, decays by layer, and what
is wrong with it (missing, extra or misshapen tensors, NaN and infinity).

  {prog} RWKV-x070-World-0.1B-v2.8.pth
  {prog} runs/demo
      the newest checkpoint of a run
  {prog} model.safetensors --tensors
      every tensor: shape, type, RMS, minimum and maximum
  {prog} runs/lora --base rwkv7-g1-0.4b.pth
      an adapter (of a run, of peft, of RWKV-PEFT): method, rank, targets, and how much it changes

The exit code is 1 if something is wrong. No code in a file is run, and one tensor at a time is in
memory.
"""

GROUPS = {
    "embedding": ("emb.",),
    "head": ("head.",),
    "norms": ("ln",),
    "time mix": ("att.",),
    "DeepEmbed": ("ffn.s_emb",),
    "channel mix": ("ffn.",),
    "other": ("",),
}
"""Group -> prefixes of a tensor's name within its layer; the first that fits counts."""

NUMBERS = ("RMS", "min", "max", "NaN")
"""Titles of `Statistics.cells`."""


@dataclass
class Statistics:
    """Statistics of the numbers in one tensor, or in several. `nonfinite` counts NaN and infinite
    numbers, which `squares`, `minimum` and `maximum` leave out."""

    count: int = 0
    squares: float = 0.0
    minimum: float = math.inf
    maximum: float = -math.inf
    nonfinite: int = 0
    tensors: int = 0
    dtypes: set[str] = field(default_factory=set)

    def include(self, other: "Statistics") -> None:
        """Adds the numbers of `other`."""
        self.count, self.squares = self.count + other.count, self.squares + other.squares
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)
        self.nonfinite += other.nonfinite
        self.tensors += other.tensors
        self.dtypes |= other.dtypes

    def cells(self) -> list[str]:
        """RMS, minimum, maximum, and the count of non-finite numbers."""
        finite = self.count - self.nonfinite
        rms = math.sqrt(self.squares / finite) if finite else math.nan
        numbers = (rms, self.minimum, self.maximum)
        return [*(f"{x:.3g}" for x in numbers), f"{self.nonfinite or ''}"]


def statistics_of(array: Any) -> Statistics:
    """The statistics of one tensor."""
    dtype, values = np.dtype(array.dtype).name, np.asarray(array)
    values = values.astype(np.float32, copy=False)  # numpy is slow with bfloat16
    mask = np.isfinite(values)
    finite = values if mask.all() else values[mask]
    return Statistics(
        count=values.size,
        squares=float(np.sum(np.square(finite, dtype=np.float64))),
        minimum=float(finite.min(initial=math.inf)),
        maximum=float(finite.max(initial=-math.inf)),
        nonfinite=int(values.size - finite.size),
        tensors=1,
        dtypes={dtype.replace("bfloat", "bf").replace("float", "f")},
    )


def main(arguments: list[str], prog: str = "python -m rwkv_jax inspect") -> int:
    """Runs the command line; returns the exit code: 1 if something is wrong with the weights, 2 for
    bad input."""
    parser = command(prog, "MODEL [options]", ABOUT)
    add_model(parser)
    parser.add_argument("--base", metavar="MODEL", help="of an adapter: the model that it changes")
    parser.add_argument("--alpha", type=float, metavar="X", help=ALPHA)
    parser.add_argument("--tensors", action="store_true", help="every tensor, not only groups")
    args = parser.parse_args(arguments)
    wrong: list[str] = []
    code = run(spoken(prog), partial(_inspect, args, wrong))
    return code or int(bool(wrong))


def _inspect(args: argparse.Namespace, wrong: list[str]) -> None:
    # Here, so that --help does not wait for JAX.
    import_jax()
    from rwkv_jax.checkpoint.adapters import is_adapter
    from rwkv_jax.checkpoint.keymaps import config_of, problems
    from rwkv_jax.checkpoint.pth import broken_entry
    from rwkv_jax.checkpoint.shards import files_of
    from rwkv_jax.checkpoint.weights import naming, read

    console = Console(width=width())
    if is_adapter(args.model):
        _inspect_adapter(console, args)
        return
    weights = read(args.model)
    for option, given in ("--base", args.base), ("--alpha", args.alpha):
        if given is not None:
            raise UserError(f"{args.model}: is no adapter; leave out {option}")
    tensors = weights.tensors
    with naming(weights.path):
        cfg = config_of(tensors)
    wrong += [problem for problem, _ in problems(tensors, cfg)]

    _print_header(console, weights, cfg)
    names = tracked(console, tensors, "reading")
    statistics = {name: statistics_of(tensors[name]) for name in names}
    _print_groups(console, statistics)
    _print_layers(console, cfg, tensors, statistics)
    if args.tensors:
        rows = (
            (name, " x ".join(map(str, tensors[name].shape)), *x.dtypes, *x.cells())
            for name, x in statistics.items()
        )
        _print_table(console, "tensors", ("name", "shape", "type", *NUMBERS), rows)
    for name, x in statistics.items():
        if x.nonfinite:
            wrong.append(f"{name} has {x.nonfinite:,} NaN or infinite values")
    for file in files_of(weights.path):
        if entry := broken_entry(file):
            wrong.append(
                f"{file.name}: the checksum of {entry!r} does not match: it is damaged, or was"
                " written without checksums; download or save it again"
            )
    console.print()
    for fault in wrong:
        console.print(f"[bold red]wrong:[/] {escape(fault)}", highlight=False, soft_wrap=True)
    if not wrong:
        console.print("complete, and all numbers finite", style="green")


def _inspect_adapter(console: Console, args: argparse.Namespace) -> None:
    from rwkv_jax.checkpoint.adapters import describe
    from rwkv_jax.checkpoint.fingerprint import fingerprint_of
    from rwkv_jax.checkpoint.keymaps import check
    from rwkv_jax.checkpoint.merging import merged
    from rwkv_jax.checkpoint.weights import naming, read

    if args.base is None:
        if args.alpha is not None:
            raise UserError("--alpha is of a change's size: add --base, or leave it out")
        show_info(console, describe(args.model))
        return
    weights = read(args.base)
    with naming(weights.path):
        cfg = check(weights.tensors)
    ((adapter, _, info),) = load_all([args.model], args.alpha, cfg, fingerprint_of(weights.tensors))
    show_info(console, info)
    changes = Changes()
    tensors = merged(weights.tensors, cfg, [(adapter, 1.0)], measure=changes)
    changed = [name for name, x in tensors.items() if x is not weights.tensors.get(name)]
    for name in tracked(console, changed, "reading"):
        np.asarray(tensors[name])
    changes.show(console, lost=False)


def _print_header(console: Console, weights: Any, cfg: Any) -> None:
    from rwkv_jax.checkpoint.fingerprint import fingerprint_of
    from rwkv_jax.checkpoint.weights import find_tokenizer

    ranks = {key.name: getattr(cfg, key.name) for key in fields(cfg) if "rank_" in key.name}
    try:
        tokenizer = find_tokenizer(weights, cfg.vocab_size).identity()
    except UserError as error:
        tokenizer = f"unknown: {error}"
    count = "1 head" if cfg.heads == 1 else f"{cfg.heads} heads"
    heads = f", {count} of {cfg.head_size}" if cfg.heads < cfg.width else ""
    rows = {
        "file": f"{weights.path} ({weights.format})",
        "model": f"RWKV-{cfg.version}, {cfg.layers} layers of width {cfg.width}{heads}",
        "channel mix": f"{cfg.ffn} wide",
        "ranks": ", ".join(f"{name[5:]} {rank}" for name, rank in ranks.items() if rank),
        "embedding": "" if cfg.ln0 else "normalised already (no ln0)",
        "state": "documents start from a learnt one" if cfg.state_tuned else "",
        "vocabulary": f"{cfg.vocab_size:,}",
        "tokenizer": tokenizer,
        "parameters": f"{sum(math.prod(x.shape) for x in weights.tensors.values()):,}",
    }
    with contextlib.suppress(UserError):  # of an incomplete model there is none
        rows["fingerprint"] = fingerprint_of(weights.tensors)
    header(console, "", rows)


def _print_groups(console: Console, statistics: Mapping[str, Statistics]) -> None:
    groups = {group: Statistics() for group in GROUPS}
    for name, x in statistics.items():
        inner = name.split(".", 2)[2] if name.startswith("blocks.") else name
        groups[next(g for g, prefixes in GROUPS.items() if inner.startswith(prefixes))].include(x)
    total = sum(x.count for x in groups.values()) or 1
    rows = []
    for name, x in groups.items():
        if x.tensors:
            share, dtypes = f"{100 * x.count / total:.1f} %", " ".join(sorted(x.dtypes))
            rows.append((name, f"{x.tensors:,}", f"{x.count:,}", share, dtypes, *x.cells()))
    titles = ("group", "tensors", "parameters", "share", "type", *NUMBERS)
    _print_table(console, "parameters by group", titles, rows)


def _print_layers(
    console: Console, cfg: Any, tensors: Mapping[str, Any], statistics: Mapping[str, Statistics]
) -> None:
    """Decays without their token-dependent part, and the size of the layer's output matrices."""
    from rwkv_jax.models import VERSIONS

    version, rows = VERSIONS[cfg.version], []
    for layer in range(cfg.layers):
        block = f"blocks.{layer}."
        decay, source = np.array([math.nan]), tensors.get(f"{block}att.{version.decay_name}")
        if source is not None:
            decay = version.decay(np.nan_to_num(np.asarray(source).astype(np.float64)))
        half_lives = math.log(0.5) / np.log(np.clip(decay, 1e-38, 1 - 1e-12))
        decays = (f"{x:.4f}" for x in (decay.min(), np.median(decay), decay.max()))
        lives = (np.median(half_lives), half_lives.max())
        lives = (f"{x:,.1f}" if x < 1e5 else f"{x:.2e}" for x in lives)
        matrices = (statistics.get(f"{block}{name}.weight") for name in ("att.output", "ffn.value"))
        sizes = ("" if x is None else x.cells()[0] for x in matrices)
        rows.append((str(layer), *decays, *lives, *sizes))
    title = "layers: decay per token, its median and longest half-life in tokens, RMS"
    titles = ("layer", "fastest", "median", "slowest", "half-life", "longest")
    _print_table(console, title, (*titles, "att.output", "ffn.value"), rows)


def _print_table(console: Console, title: str, titles: Sequence[str], rows: Iterable) -> None:
    """Without rules between columns, so that it fits a terminal of 80."""
    console.print(f"\n[italic]{title}[/]\n", highlight=False)
    style = {"padding": (0, 1, 0, 0), "pad_edge": False, "show_edge": False}
    numbers(console, titles, rows, box=box.SIMPLE_HEAD, **style)
