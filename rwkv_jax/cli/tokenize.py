"""`tokenize`: text into the pair of files that training reads."""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from rwkv_jax.cli.command import command, run, spoken, width
from rwkv_jax.errors import UserError

ABOUT = """
Text into OUT.bin and OUT.idx, the pair of files that the official trainers and this one read; each
document is followed by the end-of-document id.

  {prog} stories.jsonl -o data/stories
      the field "text" of each line, by the World vocabulary
  {prog} books/ 'web/*.parquet' -o data/mixed --field content
      folders (a file a document), globs, .jsonl, .parquet, each also as .gz or .zst where it is
      text, and folders of Hugging Face's datasets, one behind the other
  {prog} notes.txt -o data/notes --tokenizer runs/demo/tokenizer --document line

Every core is used. Stopped, the same command goes on where it was; OUT appears when it is whole.
OUT.json says what it holds. Train with: python train.py CONFIG data.source=OUT data.tokenizer=world
"""

CONTEXTS = (512, 1024, 2048, 4096, 8192)


def main(arguments: list[str], prog: str = "python -m rwkv_jax tokenize") -> int:
    """Runs the command line; returns the exit code: 2 for bad input, 130 when interrupted."""
    parser = command(prog, "SOURCE [SOURCE ...] -o OUT [options]", ABOUT)
    add = parser.add_argument
    add("source", metavar="SOURCE", nargs="+", help="file, folder, quoted glob, or stdlib")
    add("-o", "--out", metavar="OUT", required=True, help="name of the pair, without .bin")
    add(
        "--tokenizer",
        metavar="T",
        default="world",
        help="world (default), bytes, or a tokenizer.json (or its folder)",
    )
    add("--field", default="text", metavar="NAME", help="field or column of the text (text)")
    add(
        "--document",
        choices=("file", "line"),
        default="file",
        help="a document of plain text is a file (default) or a line",
    )
    add(
        "--template",
        choices=("g1", "world", "raven"),
        default="g1",
        help="how turns are written down where the field holds a conversation (g1)",
    )
    add("--workers", type=_count, metavar="N", help="processes (default: one for each core)")
    add("--overwrite", action="store_true", help="replace OUT if it is there")
    return run(spoken(prog), partial(_tokenize, parser.parse_args(arguments)))


def _count(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: a whole number from 1 on is needed")
    return number


def _tokenize(args: argparse.Namespace) -> None:
    # Here, so that --help answers at once.
    from rwkv_jax.data.tokenize import tokenize

    start = time.monotonic()
    with _bar() as progress:
        result = tokenize(
            args.source,
            args.out,
            tokenizer=args.tokenizer,
            field=args.field,
            document=args.document,
            template=args.template,
            workers=args.workers,
            overwrite=args.overwrite,
            progress=progress,
        )
    _report(result, time.monotonic() - start)


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[int, int], None] | None]:
    """Yields what moves a bar on stderr; None where that is no terminal."""
    from rwkv_jax.data.prepare import reading_bar

    bar = reading_bar()
    if bar.disable:
        yield None
        return
    task = bar.add_task("tokenising", total=None)
    with bar:
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _report(result: Any, seconds: float) -> None:
    from rich.console import Console

    from rwkv_jax.console import header

    counts, console = result.counts, Console(width=width())
    rows = {
        "pair": f"{result.path}.bin, {result.path.name}.idx",
        "documents": f"{counts.documents:,}",
        "text": f"{counts.bytes / 1e6:,.2f} MB",
        "tokens": f"{counts.tokens:,}",
        "bytes a token": f"{counts.bytes / counts.tokens:.3f}",
        "speed": f"{result.new_bytes / 1e6 / seconds:,.1f} MB/s" if result.new_bytes else "",
        "left out": f"{counts.skipped:,} files that are not readable UTF-8 text",
    }
    if not counts.skipped:
        del rows["left out"]
    header(console, "", {name: text for name, text in rows.items() if text})
    console.print("\nfor the official recipe:", highlight=False)
    console.print(f"  data.exit_tokens = {counts.tokens}", highlight=False)
    for context, prime in _primes(counts.tokens):
        console.print(f"  context {context}: magic prime {prime}", highlight=False)


def _primes(tokens: int) -> Iterator[tuple[int, int]]:
    """The contexts that there are enough tokens for, each with its prime."""
    from rwkv_jax.data.order import magic_prime

    for context in CONTEXTS:
        with contextlib.suppress(UserError):
            yield context, magic_prime(tokens, context)
