"""`merge`: adapters added to a model's weights."""

import argparse
from functools import partial
from pathlib import Path

from rich.console import Console

from rwkv_jax.cli.adapters import ALPHA, Changes, load_all, percent
from rwkv_jax.cli.command import add_model, command, import_jax, run, spoken, width
from rwkv_jax.cli.convert import add_target, check_target, write_model
from rwkv_jax.errors import UserError, remark

ABOUT = """
Add adapters to a model's weights; the name of OUT decides its format, as for `convert`.

  {prog} rwkv7-g1-0.4b.pth runs/lora merged.pth
      a run of train.py that has trained an adapter, or one of its checkpoints
  {prog} rwkv7-g1-0.4b.pth downloaded-lora/ merged-hf
      a folder of Hugging Face's peft, into a Hugging Face folder
  {prog} model.pth style/:0.8 facts/:0.5 merged.safetensors
      several, each with a weight: their changes of MODEL add up
  {prog} model.pth rwkv-20.pth merged.pth --alpha 32
      a file of RWKV-PEFT, which does not say its alpha
  {prog} merged.pth runs/lora:-1 model-again.pth

Sums are computed in float32, one tensor at a time, and rounded once, to the type that the tensor
has, or to --dtype. What that loses of the change is printed; --dtype float32 loses next to nothing.
"""

MUCH = 0.1
"""A share of the change whose loss is worth a remedy."""


def main(arguments: list[str], prog: str = "python -m rwkv_jax merge") -> int:
    """Runs the command line; returns the exit code: 2 for bad input, 130 when interrupted."""
    parser = command(prog, "MODEL ADAPTER[:WEIGHT]... OUT [options]", ABOUT)
    add_model(parser)
    what = "folder of peft, .pth of RWKV-PEFT, or a run; with a weight (1)"
    parser.add_argument("adapter", metavar="ADAPTER[:WEIGHT]", nargs="+", help=what)
    add_target(parser)
    parser.add_argument("--alpha", type=float, metavar="X", help=ALPHA)
    return run(spoken(prog), partial(_merge, parser.parse_args(arguments)))


def _merge(args: argparse.Namespace) -> None:
    # Here, so that --help answers at once.
    import_jax()
    from rwkv_jax.checkpoint.fingerprint import fingerprint_of
    from rwkv_jax.checkpoint.keymaps import check
    from rwkv_jax.checkpoint.merging import merged
    from rwkv_jax.checkpoint.weights import naming, read

    source, target = Path(args.model).expanduser(), Path(args.out).expanduser()
    check_target(source, target, args.overwrite)
    weights = read(source)
    with naming(weights.path):
        cfg = check(weights.tensors)
    found = load_all(args.adapter, args.alpha, cfg, fingerprint_of(weights.tensors))
    if not found:
        raise UserError("no adapter is given; name one before OUT")
    changes = Changes()
    pairs = [(adapter, weight) for adapter, weight, _ in found]
    write_model(args, weights, merged(weights.tensors, cfg, pairs, args.dtype, changes), target)
    console, total = Console(width=width(), highlight=False), changes.total()
    for _, weight, info in found:
        rank = f" of rank {info.rank}" if info.rank else ""
        console.print(f"{info.path}: {info.method}{rank}, times {weight:g}", markup=False)
    if changes.tensors and not total.change:
        remark("the adapters change nothing: what they add is zero; are they trained?")
        return
    changes.show(console, lost=True)
    remedy = "; --dtype float32 keeps it" if total.share_lost > MUCH else ""
    share = percent(total.share_lost)
    print(f"\nrounding to the stored type takes {share} of the change (norm over norm){remedy}")
