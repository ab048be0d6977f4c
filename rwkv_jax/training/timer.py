"""How fast a run trains, and what its time is spent on."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")

KINDS = ("steps", "data", "saving", "evaluating")
"""Computing; waiting for a batch; and what happens between steps."""


class StepTimer:
    """Tokens per second of training, without compiling, evaluating and saving, and seconds by
    `KINDS`; both since the beginning (`total`) and since `restart` (`recent`)."""

    def __init__(self):
        self.total: dict[str, float] = defaultdict(float)
        self.recent: dict[str, float] = defaultdict(float)
        self._last: float | None = None
        """When the last step ended; None if something else came after it."""

    def batches(self, coming: Iterable[T]) -> Iterator[T]:
        """The batches; the time until each is there counts as `data`."""
        source = iter(coming)
        while True:
            start = time.perf_counter()
            try:
                batch = next(source)
            except StopIteration:
                return
            if self._last is not None:  # the wait for a first batch overlaps with compiling
                self._count("data", time.perf_counter() - start)
            yield batch

    def step(self, tokens: int) -> None:
        """Counts a step that has just ended."""
        now = time.perf_counter()
        if self._last is not None:
            self._count("tokens", float(tokens))
            self._count("steps", now - self._last)
        self._last = now

    @contextlib.contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Counts what happens in the context, between two steps, as `kind`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._count(kind, time.perf_counter() - start)
            self._last = None

    def restart(self) -> None:
        """Starts a new count of `recent`."""
        self.recent.clear()

    @property
    def tokens_per_s(self) -> float:
        """Of the steps since `restart`, or of all if fewer than two followed it; 0 without any."""
        return _speed(self.recent) or self.all_tokens_per_s

    @property
    def all_tokens_per_s(self) -> float:
        """Tokens a second since the run began or resumed; 0 before the first step."""
        return _speed(self.total)

    def _count(self, kind: str, amount: float) -> None:
        for counter in (self.recent, self.total):
            counter[kind] += amount


def seconds(counter: Mapping[str, float]) -> dict[str, float]:
    """Seconds by `KINDS`; waiting for data, which happens within steps, is taken off those."""
    steps = max(counter["steps"] - counter["data"], 0.0)
    return {kind: counter[kind] for kind in KINDS} | {"steps": steps}


def _speed(counter: Mapping[str, float]) -> float:
    return counter["tokens"] / counter["steps"] if counter["tokens"] else 0.0
