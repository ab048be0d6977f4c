"""Workarounds for Orbax 0.12, all in one place; each says why it is there.

To be checked again at every release of Orbax.
"""

import contextlib
import errno
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence, Set
from functools import cache
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from orbax.checkpoint import multihost
from orbax.checkpoint.checkpoint_managers import preservation_policy

UNFINISHED = ".orbax-checkpoint-tmp"
"""In the name of a checkpoint until all of it is on disk."""


class _Marked(preservation_policy.PreservationPolicy):
    """Keeps the steps in a set that may change."""

    def __init__(self, steps: Set[int]):
        self._steps = steps

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        return [checkpoint.step in self._steps for checkpoint in checkpoints]


def open_manager(
    folder: Path, keep: int, items: tuple[str, ...], marked: Set[int] = frozenset()
) -> ocp.CheckpointManager:
    """Writes checkpoints and keeps the newest `keep`, and the steps that are `marked`; 0 opens them
    for reading only."""
    _silence()
    options = ocp.CheckpointManagerOptions(read_only=True)
    if keep:
        newest = preservation_policy.LatestN(keep)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(
                [newest, _Marked(marked)]
            ),
            async_options=ocp.AsyncOptions(barrier_sync_fn=_barrier()),
        )
    return ocp.CheckpointManager(folder, options=options, item_names=items)


def open_reader(folder: Path, items: tuple[str, ...]) -> ocp.CheckpointManager:
    """Reads for this process alone.

    Where one process's part of a checkpoint is damaged and the others' are not, those would wait
    for it inside Orbax.
    """
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"reader_{me}"
    )
    options = ocp.CheckpointManagerOptions(read_only=True, multiprocessing_options=alone)
    return ocp.CheckpointManager(folder, options=options, item_names=items)


def _barrier() -> Callable[..., None] | None:
    """How processes wait for each other while they write.

    A process that has failed raises its error instead of waiting: the others would never come.
    """
    if jax.process_count() == 1:
        return None
    wait = multihost.get_barrier_sync_fn()

    def wait_unless_failed(*, key: str, timeout_ms: int) -> None:
        if error := sys.exc_info()[1]:
            raise error
        wait(key=key, timeout_ms=timeout_ms)

    return wait_unless_failed


@contextlib.contextmanager
def file_errors(folder: Path) -> Iterator[None]:
    """Raises OSError, which names `folder`, whatever exception a file system's failure arrives as.

    TensorStore, which writes the arrays, raises ValueError with the number in its text.
    """
    try:
        yield
    except Exception as error:
        # Other writes of the same checkpoint are dropped, and would say so when collected.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        if number := _error_number(error):
            raise OSError(number, os.strerror(number), str(folder)) from error
        raise


def _error_number(error: Exception) -> int | None:
    text = str(error)
    if found := re.search(r"os_error_code='(\d+)'", text):
        return int(found[1])
    if "No space left" in text:
        return errno.ENOSPC
    if "Disk quota" in text:
        return errno.EDQUOT
    return getattr(error, "errno", None)


@cache
def _silence() -> None:
    """Silences Orbax's log, whose failures are raised as well.

    When one of a checkpoint's reads or writes fails, it does not await the others, and Python
    reports each of them, pages long, when it is collected.
    """
    absl_logging.set_verbosity(absl_logging.FATAL)
    report = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        source = unraisable.object
        file = source.cr_code.co_filename if inspect.iscoroutine(source) else ""
        if "orbax" not in file and "Event loop is closed" not in str(unraisable.exc_value):
            report(unraisable)

    def is_wanted(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not ("never retrieved" in text and ("tensorstore" in text or "orbax" in text))

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(is_wanted)
