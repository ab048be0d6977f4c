"""`convert`: weights from any format into another."""

import argparse
import sys
from functools import partial
from pathlib import Path

from rwkv_jax.cli.command import add_model, command, run, spoken
from rwkv_jax.errors import UserError

ABOUT = """
Convert weights from any format into another; the name of OUT decides which.

  {prog} RWKV-x070-World-0.1B-v2.8.pth world-0.1b.safetensors
  {prog} runs/demo demo.pth
      the newest checkpoint of a run, for programs that read official files
  {prog} RWKV-x070-World-0.1B-v2.8.pth world-0.1b-hf
      no ending: a folder for Hugging Face's libraries (versions 4 and 7)
  {prog} model.pth model-bf16.pth --dtype bfloat16

Numbers are copied bit for bit unless --dtype is given, one tensor at a time, so a model may be
larger than memory. OUT appears once all of it is on disk.
"""


def main(arguments: list[str], prog: str = "python -m rwkv_jax convert") -> int:
    """Runs the command line; returns the exit code: 2 for bad input, 130 when interrupted."""
    parser = command(prog, "MODEL OUT [options]", ABOUT)
    add_model(parser)
    add = parser.add_argument
    add("out", metavar="OUT", help=".pth, .safetensors, or a new folder")
    types = ("float32", "float16", "bfloat16")
    add("--dtype", choices=types, help="round to this type (default: the stored type)")
    add("--overwrite", action="store_true", help="replace OUT if it exists")
    return run(spoken(prog), partial(_convert, parser.parse_args(arguments)))


def _convert(args: argparse.Namespace) -> None:
    # Here, so that --help answers at once.
    from rwkv_jax.checkpoint.keymaps import check
    from rwkv_jax.checkpoint.weights import naming, read, tokenizer_files, write
    from rwkv_jax.data.tokenizers import TokenizerError

    source, target = Path(args.model).expanduser(), Path(args.out).expanduser()
    if target.exists() and target.resolve() == source.resolve():
        raise UserError(f"{target}: input and output are the same file; name another")
    if target.is_dir():
        raise UserError(f"{target}: already exists; a folder is not replaced, name a new one")
    if target.exists() and not args.overwrite:
        raise UserError(f"{target}: already exists; name another file, or add --overwrite")
    weights = read(source)
    with naming(weights.path):
        cfg = check(weights.tensors)
    try:
        beside = tokenizer_files(weights, cfg.vocab_size, target)
    except TokenizerError as error:  # weights are complete without one
        print(f"{target}: without a tokenizer: {error}", file=sys.stderr)
        beside = {}
    write(target, weights.tensors, dtype=args.dtype, beside=beside)
    print(f"{target}: RWKV-{cfg.version}, {len(weights.tensors):,} tensors")
    if names := [name for name in beside if name != "tokenizer_config.json"]:
        folder = target if target.is_dir() else target.parent
        print(f"{folder / names[0]}: its tokenizer")
