"""How fast a run goes, and what its seconds go on."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

KINDS = ("steps", "data", "saving", "evaluating")
"""Computing; waiting for a batch; and what happens between steps."""


class Pace:
    """Tokens per second of training, without compiling, evaluating and saving, and seconds by
    `KINDS`."""

    def __init__(self):
        self.tokens = self.all_tokens = 0
        self.spent: dict[str, float] = defaultdict(float)
        """Seconds by kind since `start_over`."""
        self.total: dict[str, float] = defaultdict(float)
        """Seconds by kind since the beginning."""
        self._last: float | None = None

    def batches(self, coming: Iterable[T]) -> Iterator[T]:
        """The batches, the time that they are waited for counted."""
        source = iter(coming)
        while True:
            began = time.perf_counter()
            try:
                batch = next(source)
            except StopIteration:
                return
            if self._last is not None:  # the first one of a stretch is waited for while compiling
                self._spend("data", time.perf_counter() - began)
            yield batch

    def step(self, tokens: int) -> None:
        """A step is done."""
        now = time.perf_counter()
        if self._last is not None:
            self.tokens, self.all_tokens = self.tokens + tokens, self.all_tokens + tokens
            self._spend("steps", now - self._last)
        self._last = now

    @contextlib.contextmanager
    def between(self, kind: str) -> Iterator[None]:
        """Something that is not training, until the next step."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spend(kind, time.perf_counter() - began)
            self._last = None

    def start_over(self) -> None:
        """Begins to count anew."""
        self.tokens = 0
        self.spent.clear()

    def split(self, spent: dict[str, float]) -> dict[str, float]:
        """Seconds by kind, those of steps without the waiting within them."""
        return {kind: spent[kind] for kind in KINDS} | {
            "steps": max(spent["steps"] - spent["data"], 0.0)
        }

    @property
    def tokens_per_s(self) -> float:
        """Since `start_over`, or since the beginning where no two steps followed each other; 0
        before there are two."""
        return self.tokens / self.spent["steps"] if self.tokens else self.all_tokens_per_s

    @property
    def all_tokens_per_s(self) -> float:
        """Since the beginning."""
        return self.all_tokens / self.total["steps"] if self.all_tokens else 0.0

    def _spend(self, kind: str, seconds: float) -> None:
        self.spent[kind] += seconds
        self.total[kind] += seconds
