"""The processes of one run: how they find each other, agree on what happens, and end.

Every process runs the same program; JAX's distributed runtime connects them. Arrays are everybody's
(`rwkv_jax.training.mesh`), files and the terminal are the first one's. What one process alone can
know, that it was asked to stop or that its files can't be read, is told to all, so that they do
the same thing at the same step. A process that dies tells nobody: the others notice by a broken
connection, at once, or where the device library waits in silence by missed heartbeats.
"""

import contextlib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from rwkv_jax.errors import UserError

T = TypeVar("T")

HEARTBEAT_S, LEAVING_S, WAITING_S = 30, 30, 10
"""After so many seconds without a sign of a process the others end; so long those that end wait for
each other; and after so many of waiting for others at the start a process says so."""
LOST = 75
"""Exit code of a process that lost another one: a temporary failure (EX_TEMPFAIL)."""
LONGEST = 8000
"""Bytes of what is told to all."""


class SharedError(UserError):
    """An error that every process of the run raises."""


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop; the message is one line that says how to go on. `shared`: every
    process stops by it, at the same step, which is saved."""

    def __init__(self, message: str, shared: bool = False):
        super().__init__(message)
        self.shared = shared


class HostsError(SharedError):
    """Processes that cannot come together, or of which one cannot go on."""


def join(environment: Mapping[str, str] = os.environ) -> None:
    """Connects the processes of a run, if it was started as several.

    Two plain machines say so by JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES
    and JAX_PROCESS_ID; TPU pods, SLURM (`srun`), Open MPI (`mpirun`) and Kubernetes indexed jobs
    say it themselves, and JAX reads it. Raises `HostsError` if they can't connect.
    """
    if jax.distributed.is_initialized() or not _several(environment):
        return
    stated = _plain(environment)
    # It would swallow SIGTERM, which is for us: save, and end.
    jax.config.update("jax_enable_preemption_service", False)
    late = threading.Timer(WAITING_S, _say_waiting, [stated])
    late.daemon = True
    late.start()
    try:
        with _deadly_interrupts():
            jax.distributed.initialize(
                **stated,
                heartbeat_timeout_seconds=HEARTBEAT_S,
                shutdown_timeout_seconds=LEAVING_S,
            )
    except (ValueError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise HostsError(
            f"the processes of this run cannot connect ({reason[:200]}); see that all of them are"
            " started and can reach the first one"
        ) from error
    finally:
        late.cancel()
    if jax.default_backend() == "cpu":
        # Of programs for CPUs each process has its own, and only the first one keeps them: it would
        # wait for the others to compile, longer than Gloo waits for anybody.
        jax.config.update("jax_enable_compilation_cache", False)


def _say_waiting(stated: Mapping[str, Any]) -> None:
    at = f" at {stated['coordinator_address']}" if stated else ""
    print(f"waiting for the other processes of this run{at}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _deadly_interrupts() -> Iterator[None]:
    """Ctrl-C ends the process at once: Python would not see it while C++ waits for others."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


PLAIN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def _several(environment: Mapping[str, str]) -> bool:
    def above_one(name: str) -> bool:
        return environment.get(name, "1").strip() not in ("", "0", "1")

    return (
        any(name in environment for name in PLAIN)
        or above_one("SLURM_STEP_NUM_TASKS")
        or above_one("OMPI_COMM_WORLD_SIZE")
        or above_one("MEGASCALE_NUM_SLICES")
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys()
        or _on_tpu_machine(environment)
    )


def _on_tpu_machine(environment: Mapping[str, str]) -> bool:
    """A machine of a TPU slice, which may be of several; JAX asks for the others."""
    wanted = environment.get("JAX_PLATFORMS", "tpu").split(",")
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return "tpu" in wanted and bool(chips) and find_spec("libtpu") is not None


def _plain(environment: Mapping[str, str]) -> dict[str, Any]:
    """What plain machines state; raises `HostsError` for what is wrong or missing of it."""
    if not any(name in environment for name in PLAIN):
        return {}
    for name in PLAIN:
        if name not in environment:
            raise HostsError(f"{name} is not set; {', '.join(PLAIN)} go together")
    address, *numbers = (environment[name].strip() for name in PLAIN)
    if not re.fullmatch(r".+:\d+", address):
        raise HostsError(f"{PLAIN[0]} = {address}: host:port of the first process is needed")
    for name, text in zip(PLAIN[1:], numbers, strict=True):
        if not text.isdecimal():
            raise HostsError(f"{name} = {text}: a whole number is needed")
    count, number = map(int, numbers)
    if not 0 < int(address.rpartition(":")[2]) < 2**16:
        raise HostsError(f"{PLAIN[0]} = {address}: a port is a number from 1 to 65535")
    if not count:
        raise HostsError(f"{PLAIN[1]} = 0: at least 1")
    if not number < count:
        raise HostsError(
            f"JAX_PROCESS_ID = {number}: JAX_NUM_PROCESSES = {count} are numbered from 0"
        )
    return {"coordinator_address": address, "num_processes": count, "process_id": number}


def is_primary() -> bool:
    """Whether this process writes the files and speaks."""
    return jax.process_index() == 0


def run_on_all(action: Callable[[], T]) -> T:
    """What `action` gives here, once every process has done it. Where one fails, all raise its
    `UserError`."""
    if jax.process_count() == 1:
        return action()
    told, result = "", None
    try:
        result = action()
    except UserError as error:
        told = str(error)
    for number, message in enumerate(allgather_text(told)):
        if message:
            raise HostsError(message if number == 0 else f"process {number}: {message}")
    return result  # pyright: ignore[reportReturnType]


def allgather_text(text: str) -> list[str]:
    """What each process says, by its number; of a longer text the beginning."""
    if jax.process_count() == 1:
        return [text]
    mine = np.zeros(LONGEST, np.uint8)
    said = text.encode()[:LONGEST]
    mine[: len(said)] = list(said)
    every = np.asarray(multihost_utils.process_allgather(mine))
    return [bytes(row[row > 0]).decode(errors="replace") for row in every]


def check_equal(what: Mapping[str, str], remedy: str) -> None:
    """Raises `HostsError` on all processes unless each has the same of everything, the first thing
    that differs named."""
    if jax.process_count() == 1:
        return
    text = "\n".join(f"{name} = {value}" for name, value in what.items())
    first, *others = allgather_text(text)
    for number, other in enumerate(others, 1):
        if other != first:
            pairs = zip(other.splitlines(), first.splitlines(), strict=False)
            mine, wanted = next(pair for pair in pairs if pair[0] != pair[1])
            raise HostsError(f"process {number} has {mine}, the first one {wanted}; {remedy}")


def is_shared(error: BaseException) -> bool:
    """Whether every process of the run comes to this end, or there is but one."""
    if jax.process_count() == 1 or isinstance(error, SharedError):
        return True
    return isinstance(error, Interrupted) and error.shared


@contextlib.contextmanager
def exit_on_failure(prog: str) -> Iterator[None]:
    """Ends this process when it fails, where others would wait for it for ever.

    What all of them come to is the first one's to tell (a `SharedError`, an `Interrupted` that is
    shared); what one alone has met, the loss of another one included (exit code `LOST`), each tells
    itself, and waits for nobody.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        code, told = _last_words(error)
        shared = is_shared(error)
        if is_primary() or not shared:
            name = prog if is_primary() else f"{prog}, process {jax.process_index()}"
            print(f"{name}: {told}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if shared:
            jax.distributed.shutdown()  # together, as all of them come here
        os._exit(code)


SIGNS_OF_LOSS = (
    *("Gloo", "NCCL", "Connection closed", "Connection reset", "Socket closed", "UNAVAILABLE"),
    *("heartbeat", "coordination service", "DEADLINE_EXCEEDED"),
)
"""What the errors of device libraries say when another process is gone."""


def _last_words(error: BaseException) -> tuple[int, str]:
    """Exit code and message of a process that ends by this error."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, str(error)
    for one in _chain(error):
        if any(sign in str(one) for sign in SIGNS_OF_LOSS):
            reason = str(one).strip().splitlines()[0]
            return LOST, (
                f"another process of this run is gone or out of reach ({reason[:160]}); start all"
                " of them again: they go on from the last checkpoint"
            )
    return 1, "".join(traceback.format_exception(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those it came of: a checkpoint's writer tells of a lost process by one of its
    own."""
    while error:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
