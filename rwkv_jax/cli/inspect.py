"""`inspect`: what a file of weights holds."""

import argparse
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rwkv_jax.cli.command import command, run, spoken, width
from rwkv_jax.errors import UserError

ABOUT = """
What a file of weights holds: version, sizes, tokenizer, parameters by group, decays by layer, and
what is wrong with it (missing, extra or misshapen tensors, NaN and infinity).

  {prog} RWKV-x070-World-0.1B-v2.8.pth
  {prog} runs/demo
      the newest checkpoint of a run
  {prog} model.safetensors --tensors
      every tensor: shape, type, RMS, least and largest value

The exit code is 1 if something is wrong. Nothing in a file is run, and one tensor at a time is in
memory.
"""

GROUPS = {
    "embedding": ("emb.",),
    "head": ("head.",),
    "norms": ("ln",),
    "time mix": ("att.",),
    "DeepEmbed": ("ffn.s_emb",),
    "channel mix": ("ffn.",),
}
"""Group -> how the name of a tensor begins, without its layer; the first one that fits."""


@dataclass
class Statistics:
    """Of the numbers of one tensor or of many."""

    count: int = 0
    squares: float = 0.0
    least: float = math.inf
    largest: float = -math.inf
    odd: int = 0
    """NaN and infinite ones, which are left out of the rest."""
    tensors: int = 0
    kinds: set[str] = field(default_factory=set)

    def include(self, other: "Statistics") -> None:
        """Counts those numbers in as well."""
        self.count, self.squares = self.count + other.count, self.squares + other.squares
        self.least, self.largest = min(self.least, other.least), max(self.largest, other.largest)
        self.odd, self.tensors = self.odd + other.odd, self.tensors + other.tensors
        self.kinds |= other.kinds

    def cells(self) -> list[str]:
        """RMS, least, largest, odd ones."""
        sound = self.count - self.odd
        rms = math.sqrt(self.squares / sound) if sound else math.nan
        return [f"{rms:.3g}", f"{self.least:.3g}", f"{self.largest:.3g}", f"{self.odd or ''}"]


def statistics_of(array: Any) -> Statistics:
    """Of one tensor."""
    import numpy as np

    name, values = np.dtype(array.dtype).name, np.asarray(array)
    values = values.astype(np.float32, copy=False)  # bfloat16 is slow to look at
    finite = np.isfinite(values)
    sound = values if finite.all() else values[finite]
    return Statistics(
        count=values.size,
        squares=float(np.sum(np.square(sound, dtype=np.float64))),
        least=float(sound.min(initial=math.inf)),
        largest=float(sound.max(initial=-math.inf)),
        odd=int(values.size - sound.size),
        tensors=1,
        kinds={name.replace("bfloat", "bf").replace("float", "f")},
    )


def main(arguments: list[str], prog: str = "python -m rwkv_jax inspect") -> int:
    """Runs the command line; returns the exit code: 1 if something is wrong with the weights, 2 for
    bad input."""
    parser = command(prog, "MODEL [--tensors]", ABOUT)
    parser.add_argument(
        "model", metavar="MODEL", help=".pth, .safetensors, Hugging Face folder, or a run's"
    )
    parser.add_argument("--tensors", action="store_true", help="every tensor, not only groups")
    args = parser.parse_args(arguments)
    wrong: list[str] = []
    code = run(spoken(prog), partial(_inspect, args, wrong))
    return code or int(bool(wrong))


def _inspect(args: argparse.Namespace, wrong: list[str]) -> None:
    # Here, so that --help answers at once.
    from rich.console import Console
    from rich.markup import escape

    from rwkv_jax.checkpoint.keymaps import config_of, faults
    from rwkv_jax.checkpoint.weights import naming, read

    console = Console(width=width())
    weights = read(args.model)
    tensors = weights.tensors
    with naming(weights.path):
        cfg = config_of(tensors)
    wrong += [fault for fault, _ in faults(tensors, cfg)]

    _header(console, weights, cfg, tensors)
    groups, each = _count(tensors, console)
    _groups(console, groups)
    _layers(console, cfg, tensors, each)
    if args.tensors:
        _tensors(console, tensors, each)
    wrong += [f"{name} has {x.odd:,} NaN or infinite values" for name, x in each.items() if x.odd]
    console.print()
    for fault in wrong:
        console.print(f"[bold red]wrong:[/] {escape(fault)}", highlight=False, soft_wrap=True)
    if not wrong:
        console.print("whole, and all numbers finite", style="green")


def _header(console: Any, weights: Any, cfg: Any, tensors: Mapping[str, Any]) -> None:
    import dataclasses

    from rwkv_jax.checkpoint.weights import find_tokenizer
    from rwkv_jax.console import header

    ranks = {
        key.name.removeprefix("rank_"): getattr(cfg, key.name)
        for key in dataclasses.fields(cfg)
        if key.name.startswith("rank_") and getattr(cfg, key.name)
    }
    try:
        tokenizer = find_tokenizer(weights, cfg.vocab_size).identity()
    except UserError as error:
        tokenizer = f"unknown: {error}"
    heads = f", {cfg.heads} heads of {cfg.head_size}" if cfg.version != "4" else ""
    rows = {
        "file": f"{weights.path} ({weights.format})",
        "model": f"RWKV-{cfg.version}, {cfg.layers} layers of width {cfg.width}{heads}",
        "channel mix": f"{cfg.ffn} wide",
        "ranks": ", ".join(f"{name} {rank}" for name, rank in ranks.items()),
        "state": "documents start from a learnt one" if cfg.state_tuned else "",
        "vocabulary": f"{cfg.vocab_size:,}",
        "tokenizer": tokenizer,
        "parameters": f"{sum(math.prod(x.shape) for x in tensors.values()):,}",
    }
    header(console, "", {name: text for name, text in rows.items() if text})


def _count(tensors: Mapping[str, Any], console: Any) -> tuple[dict[str, Statistics], dict]:
    """Statistics by group and by tensor."""
    from rich.progress import track

    groups, each = {}, {}
    names = track(tensors, "reading", console=console, transient=True)
    for name in names if console.is_terminal else tensors:
        each[name] = statistics_of(tensors[name])
        inner = name.split(".", 2)[2] if name.startswith("blocks.") else name
        group = next((g for g, starts in GROUPS.items() if inner.startswith(starts)), "other")
        groups.setdefault(group, Statistics()).include(each[name])
    return groups, each


def _table(console: Any, title: str, first: str, others: Iterable[str], rows: Iterable) -> None:
    """Without lines between columns, so that it fits a terminal of 80; a narrower one breaks lines,
    but no number is cut."""
    from rich import box
    from rich.markup import escape
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    for name, *numbers in rows:
        table.add_row(escape(name), *numbers)
    needed = Measurement.get(console, console.options.update(max_width=1000), table).minimum
    console.print(f"\n[italic]{title}[/]\n", highlight=False)
    console.width = max(console.width, needed)  # a terminal breaks lines where rich would cut them
    console.print(table)


def _groups(console: Any, groups: dict[str, Statistics]) -> None:
    whole = sum(x.count for x in groups.values()) or 1
    names = ("tensors", "parameters", "share", "type", "RMS", "least", "largest", "NaN")
    rows = []
    for name in [*GROUPS, "other"]:
        if x := groups.get(name):
            share, kinds = f"{100 * x.count / whole:.1f} %", " ".join(sorted(x.kinds))
            rows.append((name, f"{x.tensors:,}", f"{x.count:,}", share, kinds, *x.cells()))
    _table(console, "parameters by group", "group", names, rows)


def _layers(
    console: Any, cfg: Any, tensors: Mapping[str, Any], each: dict[str, Statistics]
) -> None:
    """Decays before what depends on the token, and the size of the layer's last matrices."""
    import numpy as np

    names = ("fastest", "median", "slowest", "half-life", "longest", "att.output", "ffn.value")
    title = "layers: decay a token, half-life of the median and the longest in tokens, RMS"
    rows = []
    for layer in range(cfg.layers):
        block = f"blocks.{layer}."
        source = tensors.get(f"{block}att.{'w0' if cfg.version[0] == '7' else 'time_decay'}")
        decay = np.array([math.nan]) if source is None else _decay(cfg.version, np.asarray(source))
        lives = math.log(0.5) / np.log(np.clip(decay, 1e-38, 1 - 1e-12))
        matrices = [each.get(f"{block}{name}.weight") for name in ("att.output", "ffn.value")]
        row = (
            str(layer),
            *(f"{x:.4f}" for x in (decay.min(), np.median(decay), decay.max())),
            *(f"{x:,.1f}" if x < 1e5 else f"{x:.2e}" for x in (np.median(lives), lives.max())),
            *("" if x is None else x.cells()[0] for x in matrices),
        )
        rows.append(row)
    _table(console, title, "layer", names, rows)


def _decay(version: str, raw: Any) -> Any:
    """The factor per token that a parameter stands for."""
    import numpy as np

    raw = np.nan_to_num(raw.astype(np.float64).reshape(-1))
    if version[0] == "7":
        return np.exp(-math.exp(-0.5) / (1 + np.exp(-raw)))
    return np.exp(-np.exp(raw))


def _tensors(console: Any, tensors: Mapping[str, Any], each: dict[str, Statistics]) -> None:
    names = ("shape", "type", "RMS", "least", "largest", "NaN")
    rows = (
        (name, " x ".join(map(str, tensors[name].shape)), *x.kinds, *x.cells())
        for name, x in each.items()
    )
    _table(console, "tensors", "name", names, rows)
