"""`tokenize`: text into the pair of files that training reads."""

import argparse
import contextlib
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from rich.console import Console

from rwkv_jax.cli.command import command, run, spoken, width
from rwkv_jax.config import DataConfig
from rwkv_jax.console import header, reading_bar, reporting
from rwkv_jax.errors import UserError

ABOUT = """
Tokenise text into OUT.bin and OUT.idx, the pair of files that the official trainers and this
package read; each document is followed by the end-of-document id.

  {prog} stories.jsonl -o data/stories
      the field "text" of each line, with the World vocabulary
  {prog} books/ 'web/*.parquet' -o data/mixed --field content
      several sources in order: folders (one document a file), globs, .jsonl, .parquet, folders of
      Hugging Face's datasets; text files also as .gz or .zst
  {prog} notes.txt -o data/notes --tokenizer runs/demo/tokenizer --document line

Every core is used. If it is stopped, the same command resumes; OUT appears when it is complete.
OUT.json describes it. Train with: python train.py CONFIG data.source=OUT data.tokenizer=world
"""

CONTEXTS = (512, 1024, 2048, 4096, 8192)


def main(arguments: list[str], prog: str = "python -m rwkv_jax tokenize") -> int:
    """Runs the command line; returns the exit code: 2 for bad input, 130 when interrupted."""
    parser = command(prog, "SOURCE [SOURCE ...] -o OUT [options]", ABOUT)
    add = parser.add_argument
    add("source", metavar="SOURCE", nargs="+", help="file, folder, quoted glob, or stdlib")
    add("-o", "--out", metavar="OUT", required=True, help="name of the pair, without .bin")
    what = "world (default), bytes, or a tokenizer.json (or its folder)"
    add("--tokenizer", metavar="T", default="world", help=what)
    add("--field", default="text", metavar="NAME", help="field or column of the text (text)")
    what = "a document of plain text is a file (default) or a line"
    add("--document", choices=("file", "line"), default="file", help=what)
    what = "how the turns of a conversation become text, if the field holds one (g1)"
    add("--template", choices=("g1", "world", "raven", "flower"), default="g1", help=what)
    what = "names of special tokens in the text are those tokens, not letters"
    add("--special-tokens", action="store_true", help=what)
    add("--strict", action="store_true", help="a record without text is an error")
    add("--workers", type=_count, metavar="N", help="processes (default: one for each core)")
    add("--overwrite", action="store_true", help="replace OUT if it exists")
    return run(spoken(prog), partial(_tokenize, parser.parse_args(arguments)))


def _count(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: not a whole number of at least 1")
    return number


def _tokenize(args: argparse.Namespace) -> None:
    # Here, so that --help answers at once.
    from rwkv_jax.data.tokenize import tokenize

    start = time.monotonic()
    cfg = DataConfig(
        tokenizer=args.tokenizer,
        field=args.field,
        document=args.document,
        template=args.template,
        special_tokens=args.special_tokens,
        strict=args.strict,
    )
    with reporting(reading_bar(), "tokenising") as progress:
        result = tokenize(
            args.source,
            args.out,
            cfg,
            workers=args.workers,
            overwrite=args.overwrite,
            progress=progress,
        )
    _report(result, time.monotonic() - start)


def _report(result: Any, seconds: float) -> None:
    counts, console = result.counts, Console(width=width())
    skipped = f"{counts.skipped:,} files: not readable UTF-8 text, or JSON for other purposes"
    records = f"{counts.left_out:,} of {counts.records:,} records, without text"
    rows = {
        "pair": f"{result.path}.bin, {result.path.name}.idx",
        "documents": f"{counts.documents:,}",
        "text": f"{counts.bytes / 1e6:,.2f} MB",
        "tokens": f"{counts.tokens:,}",
        "bytes a token": f"{counts.bytes / counts.tokens:.3f}",
        "speed": f"{result.new_bytes / 1e6 / seconds:,.1f} MB/s" if result.new_bytes else "",
        "left out": "; ".join([skipped] * bool(counts.skipped) + [records] * bool(counts.left_out)),
    }
    header(console, "", rows)
    console.print("\nfor the official recipe:", highlight=False)
    console.print(f"  data.exit_tokens = {counts.tokens}", highlight=False)
    for context, prime in _primes(counts.tokens):
        console.print(f"  context {context}: magic prime {prime}", highlight=False)


def _primes(tokens: int) -> Iterator[tuple[int, int]]:
    """The contexts for which there are enough tokens, each with its magic prime."""
    from rwkv_jax.data.order import magic_prime

    for context in CONTEXTS:
        with contextlib.suppress(UserError):
            yield context, magic_prime(tokens, context)
