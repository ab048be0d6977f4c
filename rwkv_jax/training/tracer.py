"""A profiler's trace of a few steps."""

from pathlib import Path

import jax

from rwkv_jax.console import Ticker
from rwkv_jax.training.state import TrainState

TRACED = range(5, 8)
"""Steps after a start that are traced: once all is compiled and the first batches are read."""


class Tracer:
    """Traces the steps `TRACED` of those that are `left` into `folder`; None traces nothing."""

    def __init__(self, folder: Path | None, left: int, ticker: Ticker):
        self._folder, self._ticker, self._running = folder, ticker, False
        if folder and left < TRACED.stop:
            ticker.line(f"not traced: fewer than {TRACED.stop} steps are left")
            self._folder = None

    def step(self, done: int, state: TrainState) -> None:
        """Starts or ends the trace, after `done` steps of this start."""
        if self._folder and done == TRACED.start:
            jax.block_until_ready(state.step)
            jax.profiler.start_trace(self._folder)
            self._running = True
        elif done == TRACED.stop:
            jax.block_until_ready(state.step)
            self.close()

    def close(self) -> None:
        """Writes what is traced so far."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            self._ticker.line(f"{self._folder}: a trace; open it in xprof or TensorBoard")
