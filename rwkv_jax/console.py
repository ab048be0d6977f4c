"""What a run prints: a header, its progress, and the tables at the end.

In a terminal progress is a bar; elsewhere (a log file, a pipe) it is a plain line for each line of
`metrics.jsonl`.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table


class LastingConsole(Console):
    """Goes quiet when its reader leaves (`train.py | head`), and the program continues."""

    def on_broken_pipe(self) -> None:
        """Called by rich, whose own method exits."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def header(console: Console, title: str, *sections: Mapping[str, str]) -> None:
    """Prints a table of two columns, names and values, with a rule between sections."""
    table = Table(title=escape(title), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for rows in sections:
        for name, value in rows.items():
            table.add_row(name, escape(value))
        table.add_section()
    console.print(table)


def comparison(console: Console, rows: Mapping[str, float], best: str) -> None:
    """Prints bits per byte side by side, the lowest first; the row `best` is in bold."""
    table = Table(title="held-out text, bits per byte", title_justify="left")
    table.add_column("compressed by")
    table.add_column("bits per byte", justify="right")
    for name, value in sorted(rows.items(), key=lambda item: item[1]):
        table.add_row(escape(name), f"{value:.3f}", style="bold" if name == best else None)
    console.print(table)


@contextlib.contextmanager
def counting(console: Console, what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that counts; yields `report(done, total)`."""
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
        """Shows a finished step in the bar; without a bar, as a line if one is `due`."""
        if self._bar:
            self._bar.update(self._task, completed=step, numbers=numbers, description="training")
        elif due:
            self.line(f"step {step}/{self._steps}  {numbers}")

    def line(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def progress_numbers(loss: float, bpb: float, tokens_per_s: float, seconds_left: float) -> str:
    """`loss 2.345  bpb 1.234  5,678 tokens/s  ETA 1:23`; the speed is left out while it is 0."""
    speed = f"  {tokens_per_s:,.0f} tokens/s  ETA {duration(seconds_left)}" if tokens_per_s else ""
    return f"loss {loss:.3f}  bpb {bpb:.3f}{speed}"


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
