"""`eval`: measure a model on text and tasks."""

import argparse
import contextlib
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rwkv_jax.cli.command import command, run, spoken, width
from rwkv_jax.errors import UserError, within_memory

ABOUT = """
Measure a model: how well it predicts text, ends texts, chooses answers.

  {prog} runs/demo
      held-out text of a run of train.py: bits per byte beside gzip and xz, and perplexity
  {prog} RWKV-x070-World-0.1B-v2.8.pth book.txt notes/ "papers/*.md" reviews.jsonl.zst --field body
      the same of any text: files, folders, quoted globs, JSON lines; `-` is stdin
  {prog} MODEL enwik8 --limit 100000
      of its first 100,000 tokens
  {prog} MODEL book.txt --by-position --plot book.png
      by how much of the document came before: falling numbers are context being used
  {prog} MODEL --lambada lambada.jsonl
      lines like {{"text": "... and then he opened the door"}}, whose last word is predicted,
      or {{"prompt": "The capital of France is", "completion": "Paris"}}
  {prog} MODEL --choices quiz.jsonl
      lines like {{"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}}; the answer is the
      right choice's index, from 0, or its text

All documents and prompts begin with the end-of-document token, in a fresh state.
"""


def main(arguments: list[str], prog: str = "python -m rwkv_jax eval") -> int:
    """Runs the command line; returns the exit code: 2 for bad input, 130 when interrupted."""
    args = _parse(arguments, prog)
    return run(spoken(prog), partial(_evaluate, args))


def _parse(arguments: list[str], prog: str) -> argparse.Namespace:
    parser = command(prog, "MODEL [TEXT]... [options]", ABOUT)
    parser.add_argument(
        "model", metavar="MODEL", help=".pth, .safetensors, Hugging Face folder, or folder of a run"
    )
    parser.add_argument(
        "text",
        metavar="TEXT",
        nargs="*",
        default=[],
        help="file, folder, quoted glob, .jsonl (.gz, .zst too), stdlib, or - for stdin; without"
        " one, and without a task, the text that a run held out",
    )

    what = parser.add_argument_group("what is measured")
    add = what.add_argument
    add("--field", metavar="NAME", help="the field of a JSON line that holds the text (text)")
    add("--lambada", metavar="FILE", action="append", default=[], help="how it ends texts")
    add("--choices", metavar="FILE", action="append", default=[], help="how it chooses answers")
    add(
        "--limit",
        type=int,
        metavar="N",
        help="the first N tokens of each text and N questions of each task alone",
    )

    shown = parser.add_argument_group("what is shown")
    add = shown.add_argument
    add("--by-position", action="store_true", help="bits per byte by the place in the document")
    add("--plot", metavar="PNG", type=Path, help="the same as a picture")
    add("--json", metavar="FILE", type=Path, help="all of it, for programs")

    model = parser.add_argument_group("how it is computed")
    add = model.add_argument
    add(
        "--tokenizer",
        default="",
        metavar="NAME",
        help="world, bytes or a tokenizer.json (default: what belongs to the model)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="compute type (float32 on CPU, bfloat16 elsewhere)",
    )
    add(
        "--batch",
        type=int,
        default=16,
        metavar="N",
        help="documents or answers read side by side; fewer take less memory (16)",
    )
    return parser.parse_intermixed_args(arguments)


def _evaluate(args: argparse.Namespace) -> None:
    _check(args)
    # Here, so that --help and a mistyped option answer at once.
    from rwkv_jax.console import LastingConsole
    from rwkv_jax.evaluation import tasks

    # Before the model, which may take long to load, whatever can be wrong in what it is to read.
    endings = [(name, tasks.read_endings(name, args.limit or 0)) for name in args.lambada]
    choices = [(name, tasks.read_choices(name, args.limit or 0)) for name in args.choices]
    sources = _sources(args)
    with within_memory("lower --batch, or --dtype bfloat16"):
        subject = _load(args)
        console = LastingConsole(width=width(), highlight=False)
        console.print(subject.title, markup=False)
        results = {
            "model": args.model,
            **subject.facts(),
            "texts": _texts(args, subject, console, sources),
            "lambada": _endings(subject, console, endings),
            "choices": _choices(subject, console, choices),
        }
    if args.json:
        text = json.dumps(_jsonable(results), indent=2, ensure_ascii=False)
        with _writing("--json", args.json):
            args.json.write_text(text + "\n", encoding="utf-8")


def _check(args: argparse.Namespace) -> None:
    for name in ("limit", "batch"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: 1 or more")
    for name in ("plot", "json"):
        path = getattr(args, name)
        if path and (path.is_dir() or not path.parent.is_dir()):
            raise UserError(f"--{name} {path}: no file can be there; name one in a folder there is")
    if args.field is not None and not args.text:
        raise UserError("--field is of the JSON lines of a TEXT; name one, or leave it out")
    if args.text.count("-") > 1:
        raise UserError("stdin (-) can be read once; name it once")


def _sources(args: argparse.Namespace) -> list[tuple[str, Iterable[str]]]:
    """The texts to read, each with its documents."""
    from rwkv_jax.checkpoint.store import CONFIG, read_config
    from rwkv_jax.config import DataConfig

    if args.text:
        field = "text" if args.field is None else args.field
        texts = (DataConfig(source=name, field=field, heldout=0.0) for name in args.text)
        return [(x.source, _stdin() if x.source == "-" else _documents(x)) for x in texts]
    if (args.lambada or args.choices) and not (args.by_position or args.plot):
        return []
    folder = Path(args.model).expanduser()
    if not (folder / CONFIG).is_file():
        if args.by_position or args.plot:
            raise UserError(
                f"{'--by-position' if args.by_position else '--plot'} is of a text: name a TEXT"
                " (only a run has held-out text of its own)"
            )
        raise UserError(
            "nothing to measure it on: name a TEXT, --lambada FILE or --choices FILE (only a run"
            " has held-out text of its own)"
        )
    return [("held-out text", _heldout(read_config(folder).data))]


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

    told = contextlib.nullcontext if heldout else _as_asked
    with told():
        corpus = open_corpus(data)
    if corpus.skipped:
        what = f"{corpus.skipped:,} file{'s' * (corpus.skipped != 1)}"
        print(f"{data.source}: {what} left out, not UTF-8 text", file=sys.stderr)

    def texts() -> Iterator[str]:
        with told():
            yield from (x.text for x in corpus.documents() if x.heldout or not heldout)

    return texts()


@contextlib.contextmanager
def _as_asked() -> Iterator[None]:
    """Names this command's arguments where the corpus names the settings of a run's config."""
    from rwkv_jax.data.files import CorpusError

    try:
        yield
    except CorpusError as error:
        text = str(error).replace("data.source = ", "").replace("data.field", "--field")
        raise UserError(text) from error


def _stdin() -> list[str]:
    try:
        return [sys.stdin.buffer.read().decode()]
    except UnicodeDecodeError as error:
        raise UserError(f"stdin: byte {error.start} is not UTF-8; convert it first") from None


@dataclass(frozen=True)
class _Subject:
    """The model that is measured."""

    params: Any
    cfg: Any
    tokenizer: Any
    options: dict[str, Any]
    """How it is run."""

    @property
    def title(self) -> str:
        cfg, dtype = self.cfg, self.options["dtype"]
        return (
            f"RWKV-{cfg.version}, {self.parameters:,} parameters, {cfg.layers} layers of width"
            f" {cfg.width}, in {dtype}"
        )

    @property
    def parameters(self) -> int:
        import jax

        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    def facts(self) -> dict[str, Any]:
        """For --json."""
        return {
            "version": self.cfg.version,
            "parameters": self.parameters,
            "tokenizer": self.tokenizer.identity(),
            "dtype": self.options["dtype"],
        }


def _load(args: argparse.Namespace) -> _Subject:
    from rwkv_jax.checkpoint.weights import load_with_tokenizer
    from rwkv_jax.compiled import keep_compiled_programs
    from rwkv_jax.config import DataConfig
    from rwkv_jax.sampling.decode import decoding_dtype

    keep_compiled_programs(DataConfig().cache_root)
    params, cfg, tokenizer = load_with_tokenizer(args.model, args.tokenizer)
    dtype = args.dtype or decoding_dtype().__name__
    return _Subject(params, cfg, tokenizer, {"cfg": cfg, "batch": args.batch, "dtype": dtype})


@contextlib.contextmanager
def _writing(option: str, path: Path) -> Iterator[None]:
    """Turns a failure of the file system into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}; name another file") from error


@contextlib.contextmanager
def _progress(what: str, unit: str) -> Iterator[Callable[[int, int], None] | None]:
    """Shows, on a terminal, how much is done; yields what it is reported to."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn(escape(what)),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn(f"{unit}  ETA"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, expand=True, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _texts(
    args: argparse.Namespace,
    subject: _Subject,
    console: Any,
    sources: Sequence[tuple[str, Iterable[str]]],
) -> list[dict[str, Any]]:
    """Measures and shows the texts; what --json says of them."""
    from rwkv_jax.evaluation.bits import compressors
    from rwkv_jax.evaluation.plot import plot
    from rwkv_jax.evaluation.text import encode, measure

    results, marks = [], []
    for name, documents in sources:
        text = encode(name, documents, subject.tokenizer, args.limit or 0)
        with _progress(name, "tokens") as report:
            found = measure(subject.params, text, **subject.options, report=report)
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
            _positions(console, name, found.stretches)
    if args.plot and results:
        with _writing("--plot", args.plot):
            plot(results, args.plot, f"{Path(args.model).name}, RWKV-{subject.cfg.version}")
    return [
        {"name": name, **_facts(x), "compressors": mark}
        for (name, x), mark in zip(results, marks, strict=True)
    ]


def _positions(console: Any, name: str, stretches: Iterable[Any]) -> None:
    rows = [
        [
            f"{x.start:,}-{x.stop - 1:,}" if x.stop - x.start > 1 else f"{x.start:,}",
            f"{x.documents:,}",
            f"{x.tokens:,}",
            _number(x.bits_per_byte),
            _number(x.perplexity),
        ]
        for x in stretches
    ]
    _table(console, [f"{name}: place", "documents", "tokens", "bits/byte", "ppl/token"], rows)


def _facts(text: Any) -> dict[str, Any]:
    """A measured text, for --json."""

    def rates(x: Any) -> dict[str, Any]:
        return {"bits_per_byte": x.bits_per_byte, "token_perplexity": x.perplexity}

    stretches = [asdict(x) | rates(x) for x in text.stretches]
    words = {"word_perplexity": text.word_perplexity}
    return asdict(text) | rates(text) | words | {"stretches": stretches}


def _endings(subject: _Subject, console: Any, files: Sequence[tuple[str, Any]]) -> list[Any]:
    from rwkv_jax.evaluation.tasks import score_endings

    results = _scored(subject, files, score_endings)
    rows = [
        [name, f"{x.questions:,}", _percent(x.accuracy, x.error), _number(x.perplexity)]
        for name, x in results
    ]
    _table(console, ["ends of texts", "questions", "accuracy, %", "perplexity"], rows)
    return [{"name": name, **asdict(x), "error": x.error} for name, x in results]


def _choices(subject: _Subject, console: Any, files: Sequence[tuple[str, Any]]) -> list[Any]:
    from rwkv_jax.evaluation.tasks import score_choices

    results = _scored(subject, files, score_choices)
    rows = [
        [
            name,
            f"{x.questions:,}",
            _percent(x.accuracy, x.error),
            _percent(x.normalised, x.normalised_error),
            _percent(x.guessing),
        ]
        for name, x in results
    ]
    columns = ["choices", "questions", "accuracy, %", "by bytes, %", "guessing, %"]
    _table(console, columns, rows)
    return [
        {"name": name, **asdict(x), "error": x.error, "normalised_error": x.normalised_error}
        for name, x in results
    ]


def _scored(
    subject: _Subject, files: Sequence[tuple[str, Any]], score: Callable[..., Any]
) -> list[tuple[str, Any]]:
    """The result of each file of questions."""
    results = []
    for name, questions in files:
        with _progress(name, "answers") as report:
            found = score(
                subject.params,
                questions,
                tokenizer=subject.tokenizer,
                **subject.options,
                report=report,
            )
        results.append((name, found))
    return results


def _table(console: Any, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Names on the left, numbers on the right; without rules where it is not a terminal."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    if not rows:
        return
    rules = box.SIMPLE_HEAD if console.is_terminal else None
    table = Table(box=rules, pad_edge=False)
    table.add_column(escape(columns[0]), overflow="fold")
    for name in columns[1:]:
        table.add_column(escape(name), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    if not rules:  # they bring empty lines with them
        console.print()
    console.print(table)


def _number(x: float) -> str:
    if math.isnan(x):
        return "-"
    return f"{x:,.3f}" if x < 1e5 else f"{x:.2e}"


def _percent(share: float, error: float = math.nan) -> str:
    return f"{100 * share:.2f}" + ("" if math.isnan(error) else f" ± {100 * error:.2f}")


def _jsonable(value: Any) -> Any:
    """The same without NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _jsonable(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
