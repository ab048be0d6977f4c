"""What a command is doing before its output begins: one line on stderr.

In a terminal the line is rewritten and finally erased; elsewhere a line is printed when something
begins, and every few seconds of reading.
"""

import itertools
import shutil
import sys
import time
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")

EVERY = 5.0
"""Seconds between two lines about the same, where there is no terminal."""


class Status:
    """The line. It needs no library, so that it appears before the first one is imported."""

    def __init__(self):
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._shown = False
        self._since = time.monotonic()

    def show(self, text: str) -> None:
        """Says what begins now."""
        self._since = time.monotonic()
        if not self._terminal:
            print(text, file=sys.stderr, flush=True)
            return
        width = shutil.get_terminal_size().columns
        print(f"\r\x1b[K{text[: width - 1]}", end="", file=sys.stderr, flush=True)
        self._shown = True

    def reading(self, done: int, total: int) -> None:
        """Says how much of a prompt is read; the line goes when all is."""
        if done >= total:
            self.clear()
        elif self._terminal or time.monotonic() - self._since > EVERY:
            self.show(f"read {done:,} of {total:,} tokens ({done / total:.0%})")

    def until_first(self, items: Iterator[T]) -> Iterator[T]:
        """The same items, the first of which is made here, while the line is shown."""
        if self._terminal:  # a log has had this line
            self.show("compiling")
        first = list(itertools.islice(items, 1))
        self.clear()
        return itertools.chain(first, items)

    def clear(self) -> None:
        """Erases the line."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = False
