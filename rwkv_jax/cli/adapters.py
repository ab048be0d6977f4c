"""Adapters on a command line: `ADAPTER:WEIGHT`, what one is, and how much it changes."""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_jax.errors import UserError, remark

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from rwkv_jax.checkpoint.adapters import AdapterInfo
    from rwkv_jax.config import ModelConfig
    from rwkv_jax.tuning import Adapter

ALPHA = "alpha of adapters that do not say theirs (.pth of RWKV-PEFT)"


def add_adapters(add: Callable[..., object]) -> None:
    """Adds the options --adapter and --alpha of a model."""
    what = "add an adapter's change, times a weight (1); may be repeated, and changes add up"
    add("--adapter", metavar="A[:WEIGHT]", action="append", default=[], help=what)
    add("--alpha", type=float, metavar="X", help=ALPHA)


def split(text: str) -> tuple[str, float]:
    """Path and weight of `ADAPTER:WEIGHT`; the weight is 1 where the text is a path that exists, or
    ends in no number."""
    path, colon, end = text.rpartition(":")
    if not colon or Path(text).expanduser().exists():
        return text, 1.0
    try:
        weight = float(end)
    except ValueError:
        return text, 1.0
    if not math.isfinite(weight):
        raise UserError(f"{text}: the weight {end} is not a finite number; give one like 0.8")
    return path, weight


def load_all(
    texts: Sequence[str], alpha: float | None, cfg: "ModelConfig", fingerprint: str
) -> list[tuple["Adapter", float, "AdapterInfo"]]:
    """The adapters, with their weights, for a model; warns if one was trained on other weights than
    those of the `fingerprint`."""
    from rwkv_jax.checkpoint.adapters import load, states_alpha

    named = [split(text) for text in texts]
    need = [path for path, _ in named if alpha is not None and not states_alpha(path)]
    if alpha is not None and not need:
        raise UserError(f"--alpha {alpha:g}: no adapter here needs it; leave it out")
    found = []
    for path, weight in named:
        adapter, info = load(path, cfg, alpha if path in need else None)
        if info.base and info.base != fingerprint:
            name = f" ({info.base_name})" if info.base_name else ""
            remark(
                f"{path}: was trained on other weights, {info.base}{name}, than the model's,"
                f" {fingerprint}: its change may not suit them"
            )
        found.append((adapter, weight, info))
    return found


def changing(args: argparse.Namespace) -> Callable[..., Mapping[str, Any]] | None:
    """What --adapter makes of a model's tensors, as `load_to_decode` takes it; None without one."""
    if not args.adapter:
        if args.alpha is not None:
            raise UserError("--alpha is of an adapter: add --adapter, or leave it out")
        return None

    def change(tensors: Mapping[str, Any], cfg: "ModelConfig") -> Mapping[str, Any]:
        from rwkv_jax.checkpoint.fingerprint import fingerprint_of
        from rwkv_jax.checkpoint.merging import merged

        found = load_all(args.adapter, args.alpha, cfg, fingerprint_of(tensors))
        return merged(tensors, cfg, [(x, weight) for x, weight, _ in found], "float32")

    return change


@dataclass
class Norms:
    """Squares of the norms of tensors, of their change, and of what rounding took of it."""

    before: float = 0.0
    change: float = 0.0
    lost: float = 0.0

    @property
    def relative(self) -> float:
        """The change's norm over that of the tensors."""
        return math.sqrt(self.change / self.before) if self.before else math.nan

    @property
    def share_lost(self) -> float:
        """The norm of what is lost over that of the change."""
        return math.sqrt(self.lost / self.change) if self.change else 0.0


@dataclass
class Changes:
    """How much adapters change each tensor: a `Measure` of `checkpoint.merging`."""

    tensors: dict[str, Norms] = field(default_factory=dict)

    def __call__(self, name: str, before: Any, after: Any, stored: Any) -> None:
        """Notes one tensor; again for one that is written twice."""
        lost = _square(stored - after)
        self.tensors[name] = Norms(_square(before), _square(after - before), lost)

    def total(self) -> Norms:
        """Of all tensors."""
        return _sum(self.tensors.values())

    def by_target(self) -> dict[str, list[Norms]]:
        """Those of each layer, by `att.key`."""
        found: dict[str, list[Norms]] = {}
        for name, norms in self.tensors.items():
            inner = name.split(".", 2)[2] if name.startswith("blocks.") else name
            found.setdefault(inner.removesuffix(".weight"), []).append(norms)
        return found

    def show(self, console: "Console", lost: bool) -> None:
        """A row for each target: its change over all layers, and in the layers where it is the
        least and the most; with what is `lost`, if asked."""
        from rich import box

        from rwkv_jax.console import numbers

        rows = []
        for target, norms in self.by_target().items():
            total, each = _sum(norms), [x.relative for x in norms]
            cells = [f"{x:.3g}" for x in (total.relative, min(each), max(each))]
            cells += [percent(total.share_lost)] if lost else []
            rows.append((target, f"{len(norms)}", *cells))
        titles = ("target", "tensors", "change", "least", "most", *(["lost"] if lost else []))
        console.print("\n[italic]norm of the change over that of the tensor[/]\n", highlight=False)
        style = {"padding": (0, 1, 0, 0), "pad_edge": False, "show_edge": False}
        numbers(console, titles, rows, box=box.SIMPLE_HEAD, **style)


def percent(share: float) -> str:
    """Whole numbers from 10 on."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _square(x: "np.ndarray") -> float:
    """The sum of squares, in float64 without a copy."""
    import numpy as np

    flat = x.reshape(-1)
    return float(np.einsum("i,i->", flat, flat, dtype=np.float64))


def _sum(norms: Any) -> Norms:
    total = Norms()
    for x in norms:
        total.before, total.change = total.before + x.before, total.change + x.change
        total.lost += x.lost
    return total


def show_info(console: "Console", info: "AdapterInfo") -> None:
    """What the file of an adapter says of it."""
    from rwkv_jax.console import header

    alpha = "" if info.alpha is None else f"{info.alpha:g}"
    if info.method == "lora" and info.rank and not alpha:
        alpha = "not in the file; --alpha says it"
    header(
        console,
        "",
        {
            "adapter": str(info.path),
            "method": info.method,
            "rank": f"{info.rank}" if info.rank else "",
            "alpha": alpha,
            "targets": ", ".join(info.targets),
            "layers": ", ".join(_ranges(info.layers)),
            "numbers": f"{info.numbers:,}",
            "base": " ".join(x for x in (info.base, info.base_name and f"({info.base_name})") if x)
            or "not said",
            "not read": ", ".join(info.dropped),
        },
    )


def _ranges(layers: Sequence[int]) -> list[str]:
    """0, 1, 2, 5 as `0 to 2` and `5`."""
    found: list[list[int]] = []
    for layer in layers:
        if found and found[-1][-1] == layer - 1:
            found[-1].append(layer)
        else:
            found.append([layer])
    return [f"{x[0]} to {x[-1]}" if len(x) > 1 else f"{x[0]}" for x in found]
