"""Tables, bars and the progress of a run.

In a terminal the progress of a run is a bar; elsewhere (a log file, a pipe) it is a plain line for
each line of `metrics.jsonl`.
"""

import contextlib
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
    track,
)
from rich.table import Table

T = TypeVar("T")


class LastingConsole(Console):
    """Goes quiet when its reader leaves (`train.py | head`), and the program continues."""

    def on_broken_pipe(self) -> None:
        """Called by rich, whose own method exits."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def header(console: Console, title: str, *sections: Mapping[str, str]) -> None:
    """Prints a table of two columns, names and values, with a rule between sections. An empty value
    is left out."""
    table = Table(title=escape(title), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for rows in sections:
        for name, value in rows.items():
            if value:
                table.add_row(name, escape(value))
        table.add_section()
    console.print(table)


def numbers(
    console: Console, titles: Sequence[str], rows: Iterable[Sequence[str]], **style: Any
) -> None:
    """Prints a table: names in the first column, numbers on the right in the others; `style` is
    that of rich's `Table`.

    A narrow terminal wraps names and shows the numbers of a row on several lines, but none is cut
    off.
    """
    rows, limit, needed, table = list(rows), console.width, 0, Table()
    for lines in range(1, max(2, len(titles))):
        table = Table(**style)
        first, *others = _on_lines(titles, lines)
        table.add_column(escape(first), overflow="fold")
        for title in others:
            table.add_column(escape(title), justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*map(escape, _on_lines(row, lines)))
        needed = Measurement.get(console, console.options.update(max_width=1000), table).minimum
        if needed <= limit:
            break
    console.width = max(limit, needed)  # a terminal wraps lines where rich would cut them
    console.print(table)


def _on_lines(cells: Sequence[str], lines: int) -> list[str]:
    """The first cell, and the others on so many lines, in columns."""
    first, *others = cells
    columns = -(-len(others) // lines)
    return [first, *("\n".join(others[column::columns]) for column in range(columns))]


def comparison(console: Console, rows: Mapping[str, float], best: str) -> None:
    """Prints bits per byte side by side, the lowest first; the row `best` is in bold."""
    table = Table(title="held-out text, bits per byte", title_justify="left")
    table.add_column("compressed by")
    table.add_column("bits per byte", justify="right")
    for name, value in sorted(rows.items(), key=lambda item: item[1]):
        table.add_row(escape(name), f"{value:.3f}", style="bold" if name == best else None)
    console.print(table)


def tracked(console: Console, items: Collection[T], what: str) -> Iterable[T]:
    """The items, counted by a bar if the console is a terminal."""
    if not console.is_terminal:
        return items
    return track(items, what, console=console, transient=True)


Reporting = AbstractContextManager[Callable[[int, int], None] | None]
"""A bar; the context's value is `report(done, total)`, or None if the bar is disabled."""


def counting(console: Console, what: str, unit: str) -> Reporting:
    """A bar that counts, disabled if the console is not a terminal."""
    columns = (
        TextColumn(escape(what)),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn(f"{unit}  ETA"),
        TimeRemainingColumn(compact=True),
    )
    shown = console.is_terminal
    bar = Progress(*columns, console=console, expand=True, transient=True, disable=not shown)
    return reporting(bar, "")


@contextlib.contextmanager
def reporting(bar: Progress, task: str) -> Iterator[Callable[[int, int], None] | None]:
    """Shows a bar with one task."""
    if bar.disable:  # older releases of rich print an empty line when a disabled bar stops
        yield None
        return
    number = bar.add_task(task, total=None)
    with bar:
        yield lambda done, total: bar.update(number, completed=done, total=total)


def reading_bar(show: bool = True) -> Progress:
    """A bar on stderr that counts the bytes read; disabled where stderr is not a terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (show and console.is_terminal),
    )


class Ticker:
    """The progress of a run, in steps."""

    def __init__(self, console: Console, steps: int):
        self._console = console
        self._steps = steps
        self._bar: Progress | None = None
        self._alive = False

    @contextlib.contextmanager
    def running(self, step: int) -> Iterator[None]:
        """Shows progress from `step` on while the context lasts."""
        if not self._console.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        with Progress(*columns, console=self._console, expand=True) as self._bar:
            self._task = self._bar.add_task(
                "compiling", total=self._steps, completed=step, numbers=""
            )
            yield

    def activity(self, name: str) -> None:
        """Names what is happening now."""
        if self._bar:
            self._bar.update(self._task, description=name)

    def step(self, step: int, numbers: str, *, due: bool) -> None:
        """Shows a finished step in the bar; without a bar, as a line if one is `due`, and after the
        first one, which shows that all is well."""
        if self._bar:
            self._bar.update(self._task, completed=step, numbers=numbers, description="training")
        elif due or not self._alive:
            self._alive = True
            self.line(f"step {step}/{self._steps}  {numbers}")

    def line(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def progress_numbers(loss: float, bpb: float, tokens_per_s: float, seconds_left: float) -> str:
    """`loss 2.345  bpb 1.234  5,678 tokens/s  ETA 1:23`; the speed is left out while it is 0, and
    bits per byte if they are NaN."""
    bits = "" if math.isnan(bpb) else f"  bpb {bpb:.3f}"
    speed = f"  {tokens_per_s:,.0f} tokens/s  ETA {duration(seconds_left)}" if tokens_per_s else ""
    return f"loss {loss:.3f}{bits}{speed}"


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
