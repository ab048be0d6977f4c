"""`eval`: measure a model on text and tasks."""

import argparse
import contextlib
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console

from rwkv_jax import disk
from rwkv_jax.cli.adapters import add_adapters
from rwkv_jax.cli.command import (
    add_model,
    add_tokenizer,
    command,
    import_jax,
    load_model,
    run,
    spoken,
    width,
)
from rwkv_jax.config import DataConfig
from rwkv_jax.console import LastingConsole, counting, numbers
from rwkv_jax.errors import UserError, within_memory

ABOUT = """
Measure a model: how well it predicts text, ends texts, chooses answers.

  {prog} runs/demo
      held-out text of a run of train.py: bits per byte beside gzip and xz, and perplexity
  {prog} RWKV-x070-World-0.1B-v2.8.pth book.txt notes/ "papers/*.md" reviews.jsonl.zst --field body
      the same for any text: files, folders, quoted globs, JSON lines; `-` is stdin
  {prog} MODEL enwik8 --limit 100000
      for its first 100,000 tokens
  {prog} MODEL book.txt --by-position --plot book.png
      by position in the document: where the numbers fall, the model uses its context
  {prog} MODEL --lambada lambada.jsonl
      lines like {{"text": "... and then he opened the door"}}, whose last word is predicted,
      or {{"prompt": "The capital of France is", "completion": "Paris"}}
  {prog} MODEL --choices quiz.jsonl
      lines like {{"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}}; the answer is the
      right choice's index, from 0, or its text

Every document and prompt begins with the end-of-document token, in a fresh state.
"""


def main(arguments: list[str], prog: str = "python -m rwkv_jax eval") -> int:
    """Runs the command line; returns the exit code: 2 for bad input, 130 when interrupted."""
    args = _parse(arguments, prog)
    return run(spoken(prog), partial(_evaluate, args))


def _parse(arguments: list[str], prog: str) -> argparse.Namespace:
    parser = command(prog, "MODEL [TEXT]... [options]", ABOUT)
    add_model(parser)
    parser.add_argument(
        "text",
        metavar="TEXT",
        nargs="*",
        default=[],
        help="file, folder, quoted glob, .jsonl (.gz, .zst too), stdlib, or - for stdin; default,"
        " without a task: the text that a run held out",
    )

    add = parser.add_argument_group("what to measure").add_argument
    add("--field", metavar="NAME", help="the field of a JSON line that holds the text (text)")
    add("--lambada", metavar="FILE", action="append", default=[], help="ends of texts")
    add("--choices", metavar="FILE", action="append", default=[], help="multiple choice")
    few = "only the first N tokens of each text and N questions of each task"
    add("--limit", type=int, metavar="N", help=few)

    add = parser.add_argument_group("output").add_argument
    add("--by-position", action="store_true", help="bits per byte by position in the document")
    add("--plot", metavar="PNG", type=Path, help="the same as a curve")
    add("--json", metavar="FILE", type=Path, help="all results, for programs")

    add = parser.add_argument_group("computation").add_argument
    add_tokenizer(add)
    add_adapters(add)
    types = "compute type (float32 on CPU, bfloat16 elsewhere)"
    add("--dtype", choices=("float32", "bfloat16"), help=types)
    rows = "documents or answers that are read side by side; fewer take less memory (16)"
    add("--batch", type=int, default=16, metavar="N", help=rows)
    return parser.parse_intermixed_args(arguments)


def _evaluate(args: argparse.Namespace) -> None:
    _check(args)
    # Imported here, so that --help and a mistyped option answer at once.
    import_jax()
    import jax

    from rwkv_jax.evaluation import tasks
    from rwkv_jax.evaluation.bits import Settings
    from rwkv_jax.sampling.decode import decoding_dtype

    # Faults in these files are found before the model is loaded, which may take long.
    endings = [(name, tasks.read_endings(name, args.limit or 0)) for name in args.lambada]
    choices = [(name, tasks.read_choices(name, args.limit or 0)) for name in args.choices]
    sources = _sources(args)
    with within_memory("lower --batch, or --dtype bfloat16"):
        # Tasks read prompts in the layout of sampling; for texts alone, the other compiles faster.
        decoding = {"dtype": args.dtype} if endings or choices or args.adapter else {}
        params, cfg, tokenizer = load_model(args, **decoding)
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        dtype = args.dtype or decoding_dtype().__name__
        subject = _Subject(params, tokenizer, Settings(cfg, rows=args.batch, dtype=dtype))
        console = LastingConsole(width=width(), highlight=False)
        console.print(
            f"RWKV-{cfg.version}, {count:,} parameters, {cfg.layers} layers of width"
            f" {cfg.width}, in {dtype}",
            markup=False,
        )
        results = {
            "model": args.model,
            "version": cfg.version,
            "parameters": count,
            "tokenizer": tokenizer.identity(),
            "dtype": dtype,
            "texts": _texts(args, subject, console, sources),
            "lambada": _tasks(
                subject, console, endings, tasks.score_endings, "ends of texts", ENDINGS
            ),
            "choices": _tasks(subject, console, choices, tasks.score_choices, "choices", CHOICES),
        }
    if args.json:
        text = json.dumps(_jsonable(results), indent=2, ensure_ascii=False)
        with disk.writing(args.json, "name another file for --json"):
            args.json.write_text(text + "\n", encoding="utf-8")


def _check(args: argparse.Namespace) -> None:
    for name in ("limit", "batch"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: 1 or more")
    for name in ("plot", "json"):
        path = getattr(args, name)
        if path and (path.is_dir() or not path.parent.is_dir()):
            raise UserError(f"--{name} {path}: cannot be a file; name one in an existing folder")
    if args.field is not None and not args.text:
        raise UserError("--field belongs to the JSON lines of a TEXT; name one, or leave it out")
    if args.text.count("-") > 1:
        raise UserError("stdin (-) can be read once; name it once")


def _sources(args: argparse.Namespace) -> list[tuple[str, Iterable[str]]]:
    """The texts to read, each with its documents."""
    from rwkv_jax.checkpoint.store import find_run, read_config

    if args.text:
        field = "text" if args.field is None else args.field
        texts = (DataConfig(source=name, field=field, heldout=0.0) for name in args.text)
        return [(x.source, _stdin() if x.source == "-" else _documents(x)) for x in texts]
    if (args.lambada or args.choices) and not (args.by_position or args.plot):
        return []
    if not (run := find_run(args.model)):
        if args.by_position or args.plot:
            raise UserError(
                f"{'--by-position' if args.by_position else '--plot'} needs a text: name a TEXT"
                " (only a run has held-out text of its own)"
            )
        raise UserError(
            "nothing to measure the model on: name a TEXT, --lambada FILE or --choices FILE (only a"
            " run has held-out text of its own)"
        )
    return [("held-out text", _heldout(read_config(run.folder).data))]


def _heldout(data: Any) -> Iterable[str]:
    """The documents that a run held out."""
    from rwkv_jax.data.binidx import is_binidx

    if not data.mixture and not is_binidx(data.source):
        return _documents(data, heldout=True)
    from rwkv_jax.data.sources import open_data

    return open_data(data).heldout_documents()


def _documents(data: Any, heldout: bool = False) -> Iterable[str]:
    """All documents of a text, or those that a run held out."""
    from rwkv_jax.data.corpus import open_corpus
    from rwkv_jax.data.records import LeftOut

    named = contextlib.nullcontext if heldout else _naming_arguments
    with named():
        corpus = open_corpus(data)
    for why, count in corpus.skipped.items():
        files = f"{count:,} file{'s' * (count != 1)}"
        print(f"{data.source}: {files} left out, {why}", file=sys.stderr)

    def texts() -> Iterator[str]:
        left_out = LeftOut(data.strict)
        with named():
            documents = corpus.documents(left_out=left_out)
            yield from (x.text for x in documents if x.heldout or not heldout)
            left_out.check()
        if left_out.count:
            print(left_out, file=sys.stderr)

    return texts()


@contextlib.contextmanager
def _naming_arguments() -> Iterator[None]:
    """Names this command's arguments where an error names the settings of a config."""
    from rwkv_jax.data.files import CorpusError

    try:
        yield
    except CorpusError as error:
        text = str(error).replace("data.source = ", "").replace("data.field", "--field")
        raise UserError(text) from error


def _stdin() -> list[str]:
    try:
        return [sys.stdin.buffer.read().decode("utf-8-sig")]
    except UnicodeDecodeError as error:
        raise UserError(f"stdin: byte {error.start} is not UTF-8; convert it first") from None


class _Subject(NamedTuple):
    """The model to measure."""

    params: Any
    tokenizer: Any
    settings: Any


def _texts(
    args: argparse.Namespace,
    subject: _Subject,
    console: Any,
    sources: Sequence[tuple[str, Iterable[str]]],
) -> list[dict[str, Any]]:
    """Measures the texts and prints the results; returns them for --json."""
    from rwkv_jax.evaluation.bits import compressors
    from rwkv_jax.evaluation.plot import plot
    from rwkv_jax.evaluation.text import encode, measure

    results, marks = [], []
    for name, documents in sources:
        text = encode(name, documents, subject.tokenizer, args.limit or 0)
        with counting(Console(stderr=True), name, "tokens") as report:
            found = measure(subject.params, text, subject.settings, report=report)
        results.append((name, found))
        marks.append(compressors(text.content))
    columns = ["text", "tokens", "bits/byte", *dict.fromkeys(itertools.chain(*marks))]
    rows = [
        [name, f"{x.tokens:,}"]
        + [_number(y) for y in (x.bits_per_byte, *mark.values(), x.perplexity, x.word_perplexity)]
        for (name, x), mark in zip(results, marks, strict=True)
    ]
    _table(console, [*columns, "ppl/token", "ppl/word"], rows)
    if args.by_position:
        for name, found in results:
            _positions(console, name, found.buckets)
    if args.plot and results:
        with disk.writing(args.plot, "name another file for --plot"):
            version = subject.settings.cfg.version
            plot(results, args.plot, f"{Path(args.model).name}, RWKV-{version}")
    return [
        {"name": name, **_facts(x), "compressors": mark}
        for (name, x), mark in zip(results, marks, strict=True)
    ]


def _positions(console: Any, name: str, buckets: Iterable[Any]) -> None:
    rows = []
    for x in buckets:
        span = f"{x.start:,}-{x.stop - 1:,}" if x.stop - x.start > 1 else f"{x.start:,}"
        rates = _number(x.bits_per_byte), _number(x.perplexity)
        rows.append([span, f"{x.documents:,}", f"{x.tokens:,}", *rates])
    _table(console, [f"{name}: position", "documents", "tokens", "bits/byte", "ppl/token"], rows)


def _facts(text: Any) -> dict[str, Any]:
    """A measured text, for --json."""

    def rates(x: Any) -> dict[str, Any]:
        return {"bits_per_byte": x.bits_per_byte, "token_perplexity": x.perplexity}

    buckets = [asdict(x) | rates(x) for x in text.buckets]
    words = {"word_perplexity": text.word_perplexity}
    return asdict(text) | rates(text) | words | {"buckets": buckets}


Columns = dict[str, Callable[[Any], str]]

COMMON: Columns = {
    "questions": lambda x: f"{x.questions:,}",
    "accuracy, %": lambda x: _percent(x.accuracy, x.error),
}
ENDINGS: Columns = {**COMMON, "perplexity": lambda x: _number(x.perplexity)}
CHOICES: Columns = {
    **COMMON,
    "by bytes, %": lambda x: _percent(x.normalised, x.normalised_error),
    "guessing, %": lambda x: _percent(x.guessing),
}
"""Columns of the results of a task, after the file's name."""


def _tasks(
    subject: _Subject,
    console: Any,
    files: Sequence[tuple[str, Any]],
    score: Callable[..., Any],
    title: str,
    columns: Columns,
) -> list[dict[str, Any]]:
    """Scores files of questions and prints the results; returns them for --json."""
    params, tokenizer, settings = subject
    rows, facts = [], []
    for name, questions in files:
        with counting(Console(stderr=True), name, "answers") as report:
            found = score(params, questions, settings, tokenizer=tokenizer, report=report)
        rows.append([name, *(cell(found) for cell in columns.values())])
        errors = {x: getattr(found, x) for x in ("error", "normalised_error") if hasattr(found, x)}
        facts.append({"name": name, **asdict(found), **errors})
    _table(console, [title, *columns], rows)
    return facts


def _table(console: Any, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table, without rules where stdout is not a terminal."""
    if not rows:
        return
    rules = box.SIMPLE_HEAD if console.is_terminal else None
    if not rules:  # which come with empty lines
        console.print()
    numbers(console, columns, rows, box=rules, pad_edge=False)


def _number(x: float) -> str:
    if math.isnan(x):
        return "-"
    return f"{x:,.3f}" if x < 1e5 else f"{x:.2e}"


def _percent(share: float, error: float = math.nan) -> str:
    return f"{100 * share:.2f}" + ("" if math.isnan(error) else f" ± {100 * error:.2f}")


def _jsonable(value: Any) -> Any:
    """The value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _jsonable(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
