"""`convert`: weights from any format into another."""

import argparse
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_jax.cli.command import add_model, command, import_jax, run, spoken
from rwkv_jax.errors import UserError

if TYPE_CHECKING:
    from rwkv_jax.checkpoint.weights import Weights

ABOUT = """
Convert weights from any format into another; the name of OUT decides which.

  {prog} RWKV-x070-World-0.1B-v2.8.pth world-0.1b.safetensors
  {prog} runs/demo demo.pth
      the newest checkpoint of a run, for programs that read official files
  {prog} RWKV-x070-World-0.1B-v2.8.pth world-0.1b-hf
      no ending: a Hugging Face folder, which transformers (version 4) or rwkv7_hf (7) loads
  {prog} rwkv7-g1-1.5b.pth g1-hf --layout official-rwkv7
      the layout of the official Hugging Face folders of version 7
  {prog} model.pth model-bf16.pth --dtype bfloat16

Numbers are copied bit for bit unless --dtype is given, one tensor at a time, so a model may be
larger than memory. OUT appears once all of it is on disk.
"""


def main(arguments: list[str], prog: str = "python -m rwkv_jax convert") -> int:
    """Runs the command line; returns the exit code: 2 for bad input, 130 when interrupted."""
    parser = command(prog, "MODEL OUT [options]", ABOUT)
    add_model(parser)
    add_target(parser)
    return run(spoken(prog), partial(_convert, parser.parse_args(arguments)))


def add_target(parser: argparse.ArgumentParser) -> None:
    """Adds the argument OUT and the options of writing it."""
    add = parser.add_argument
    add("out", metavar="OUT", help=".pth, .safetensors, or a new folder")
    types = ("float32", "float16", "bfloat16")
    add("--dtype", choices=types, help="round to this type (default: the stored type)")
    layouts = ("transformers-rwkv4", "fla-rwkv7", "official-rwkv7")
    add("--layout", choices=layouts, default="", help="of a folder (default: the version's first)")
    add("--overwrite", action="store_true", help="replace OUT if it exists")


def _convert(args: argparse.Namespace) -> None:
    # Here, so that --help answers at once.
    import_jax()
    from rwkv_jax.checkpoint.weights import read

    source, target = Path(args.model).expanduser(), Path(args.out).expanduser()
    check_target(source, target, args.overwrite)
    weights = read(source)
    write_model(args, weights, weights.tensors, target)


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Raises UserError if OUT would replace something that it must not."""
    if target.exists() and target.resolve() == source.resolve():
        raise UserError(f"{target}: input and output are the same file; name another")
    if target.is_dir():
        raise UserError(f"{target}: already exists; a folder is not replaced, name a new one")
    if target.exists() and not overwrite:
        raise UserError(f"{target}: already exists; name another file, or add --overwrite")


def write_model(
    args: argparse.Namespace, weights: "Weights", tensors: Mapping[str, Any], target: Path
) -> None:
    """Writes a model of other `tensors` than the weights', with their tokenizer, and says so."""
    from rwkv_jax.checkpoint.huggingface import DEFAULTS
    from rwkv_jax.checkpoint.keymaps import check
    from rwkv_jax.checkpoint.weights import naming, write

    with naming(weights.path):
        cfg = check(tensors)
    beside, missing = _tokenizer(weights, cfg.vocab_size, target)
    write(target, tensors, dtype=args.dtype, layout=args.layout, beside=beside)
    print(f"{target}: RWKV-{cfg.version}, {len(tensors):,} tensors")
    if names := [name for name in beside if name != "tokenizer_config.json"]:
        folder = target if target.is_dir() else target.parent
        print(f"{folder / names[0]}: its tokenizer")
    if target.is_dir():
        print(_opening(target, args.layout or DEFAULTS[cfg.version]))
    if missing:
        print(f"{target}: without a tokenizer: {missing}", file=sys.stderr)


def _tokenizer(weights: "Weights", vocab_size: int, target: Path) -> tuple[dict[str, bytes], str]:
    """The tokenizer's files to write beside the weights, and why one is missing that is needed."""
    from rwkv_jax.checkpoint.weights import is_file, tokenizer_files, tokenizer_kind
    from rwkv_jax.data.tokenizers import TokenizerError

    try:
        beside = tokenizer_files(weights, vocab_size, target)
        kind = tokenizer_kind(weights, vocab_size)
    except TokenizerError as error:  # weights are complete without one
        return {}, str(error)
    if not kind:
        place = "beside it" if is_file(target) else "into it"
        return {}, f"none is known for {vocab_size:,} tokens; put its tokenizer.json {place}"
    if kind == "bytes" and not is_file(target):
        return beside, "the model's is bytes, which Hugging Face's libraries do not have"
    return beside, ""


def _opening(folder: Path, layout: str) -> str:
    """The line of Python that opens a folder."""
    from rwkv_jax.checkpoint.huggingface import LOADED_BY

    if layout not in LOADED_BY:
        return (
            f'open it: rwkv_jax.load("{folder}"); no released library reads {layout} yet, the code'
            " of the official repositories does"
        )
    package, name = LOADED_BY[layout]
    return f'open it: from {package} import {name}; {name}.from_pretrained("{folder}")'
