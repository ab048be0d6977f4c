"""The processes of one run: how they connect, agree on what happens, and exit.

Every process runs the same program; JAX's distributed runtime connects them. Arrays are shared
(`rwkv_jax.training.mesh`), files and the terminal belong to the first process. A request to stop,
or a file that cannot be read, is known to one process alone: it is sent to all, so that they do the
same thing at the same step. A process that dies sends nothing: the others notice by a broken
connection at once, or, where the device library waits in silence, by missed heartbeats.
"""

import contextlib
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from rwkv_jax import platforms
from rwkv_jax.errors import UserError
from rwkv_jax.interrupts import fatal_interrupts

T = TypeVar("T")

HEARTBEAT_S = 30
"""Seconds without a heartbeat of a process after which the others exit."""
SHUTDOWN_S = 30
"""Seconds for which exiting processes wait for each other."""
PATIENCE_S = 10
"""Seconds after which a process that waits for the others at the start says so, again and again."""
CONNECT_S = 300
"""Seconds for which it waits."""
LOST = 75
"""Exit code of a process that lost another one: a temporary failure (EX_TEMPFAIL)."""
LONGEST = 8000
"""Bytes of the longest text that is sent to all."""


class SharedError(UserError):
    """An error that every process of the run raises."""


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop; the message is one line that says how to resume. `shared`: every
    process raises it, at the same step, which is saved."""

    def __init__(self, message: str, shared: bool = False):
        super().__init__(message)
        self.shared = shared


class HostsError(SharedError):
    """Processes that cannot connect or do not agree, or one of which has failed."""


def join(environment: Mapping[str, str] = os.environ) -> None:
    """Connects the processes of a run, if it was started as several.

    On plain machines JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID say so; on TPU pods, under SLURM (`srun`), Open MPI (`mpirun`) and in Kubernetes
    indexed jobs JAX finds out by itself. Raises `HostsError` if they cannot connect.
    """
    if jax.distributed.is_initialized() or not _is_one_of_several(environment):
        return
    stated = _stated(environment)
    # It would swallow SIGTERM, on which a run saves and stops.
    jax.config.update("jax_enable_preemption_service", False)
    connected = threading.Event()
    threading.Thread(target=_say_waiting, args=(stated, connected), daemon=True).start()
    try:
        with fatal_interrupts():  # Python would not see a Ctrl-C while C++ waits for the others
            jax.distributed.initialize(
                **stated,
                initialization_timeout=CONNECT_S,
                heartbeat_timeout_seconds=HEARTBEAT_S,
                shutdown_timeout_seconds=SHUTDOWN_S,
            )
    except (ValueError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise HostsError(
            f"the processes of this run cannot connect ({reason[:200]}); check that all of them"
            " are started and can reach the first one"
        ) from error
    finally:
        connected.set()
    if jax.default_backend() == "cpu":
        # Each process compiles its own program for CPUs, and only the first one caches it: with a
        # cached program it would wait for the others to compile, longer than Gloo does.
        jax.config.update("jax_enable_compilation_cache", False)


def _say_waiting(stated: Mapping[str, Any], connected: threading.Event) -> None:
    """Says every `PATIENCE_S` for whom this process waits, until all are `connected`."""
    others, at = "the other processes of this run", ""
    if stated:
        count, number = stated["num_processes"], stated["process_id"]
        others = f"the other {count - 1} of {count} processes of this run"
        others = others if number == 0 else f"the first of {count} processes, or for any other,"
        at = f" at {stated['coordinator_address']}"
    waited = 0
    while not connected.wait(PATIENCE_S):
        waited += PATIENCE_S
        text = f"waiting for {others}{at}: {waited} s of at most {CONNECT_S}"
        print(text, file=sys.stderr, flush=True)


VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def _is_one_of_several(environment: Mapping[str, str]) -> bool:
    """Whether this process was started together with others.

    JAX detects the same environments, but would wait for others that never come, such as in the
    script of a SLURM job (`sbatch`) outside of `srun`.
    """

    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
    return (
        any(name in environment for name in VARIABLES)
        or any(environment.get(name, "1").strip() not in ("", "0", "1") for name in counts)
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys()
        or _on_tpu_machine(environment)
    )


def _on_tpu_machine(environment: Mapping[str, str]) -> bool:
    """Whether this machine belongs to a TPU slice; JAX asks how many others do."""
    there = platforms.wants("tpu", environment) and platforms.has_device("tpu")
    return there and find_spec("libtpu") is not None


def _stated(environment: Mapping[str, str]) -> dict[str, Any]:
    """The values of `VARIABLES`, empty where none is set. Raises `HostsError` if one is wrong or
    missing."""
    if not any(name in environment for name in VARIABLES):
        return {}
    for name in VARIABLES:
        if name not in environment:
            raise HostsError(f"{name} is not set; set all of {', '.join(VARIABLES)}")
    address, *numbers = (environment[name].strip() for name in VARIABLES)
    if not re.fullmatch(r".+:\d+", address):
        raise HostsError(f"{VARIABLES[0]} = {address}: must be host:port of the first process")
    for name, text in zip(VARIABLES[1:], numbers, strict=True):
        if not text.isdecimal():
            raise HostsError(f"{name} = {text}: must be a whole number")
    count, number = map(int, numbers)
    if not 0 < int(address.rpartition(":")[2]) < 2**16:
        raise HostsError(f"{VARIABLES[0]} = {address}: a port is a number from 1 to 65535")
    if not count:
        raise HostsError(f"{VARIABLES[1]} = 0: at least 1")
    if not number < count:
        raise HostsError(
            f"JAX_PROCESS_ID = {number}: JAX_NUM_PROCESSES = {count}, so the last is {count - 1}"
        )
    return {"coordinator_address": address, "num_processes": count, "process_id": number}


def is_primary() -> bool:
    """Whether this is process 0, which writes the files and prints."""
    return jax.process_index() == 0


def run_on_all(action: Callable[..., T], *args: Any, **options: Any) -> T:
    """Calls `action` on every process and returns this one's result, once all are done.

    Where one process raises a `UserError`, all raise `HostsError` with its message.
    """
    if jax.process_count() == 1:
        return action(*args, **options)
    mine, result = "", None
    try:
        result = action(*args, **options)
    except UserError as error:
        mine = str(error)
    for number, message in enumerate(allgather_text(mine)):
        if message:
            raise HostsError(message if number == 0 else f"process {number}: {message}")
    return result  # pyright: ignore[reportReturnType]


def run_on_primary(action: Callable[..., T], *args: Any) -> T | None:
    """As `run_on_all`, but only the first process calls `action`; the others return None."""
    return run_on_all(action, *args) if is_primary() else run_on_all(lambda: None)


def wait_for_all() -> None:
    """Returns once every process has called it."""
    run_on_all(lambda: None)


def allgather_text(text: str) -> list[str]:
    """The text of each process, by its number; a long one is cut at `LONGEST`."""
    if jax.process_count() == 1:
        return [text]
    padded = text.encode()[:LONGEST].ljust(LONGEST, b"\0")
    every = multihost_utils.process_allgather(np.frombuffer(padded, np.uint8))
    return [bytes(row[row > 0]).decode(errors="replace") for row in np.asarray(every)]


def check_equal(settings: Mapping[str, str], remedy: str) -> None:
    """Raises `HostsError` on all processes unless these are equal on each; it names the first
    setting that is not."""
    if jax.process_count() == 1:
        return
    text = "\n".join(f"{name} = {value}" for name, value in settings.items())
    first, *others = allgather_text(text)
    for number, other in enumerate(others, 1):
        if other != first:
            pairs = zip(other.splitlines(), first.splitlines(), strict=False)
            mine, wanted = next(pair for pair in pairs if pair[0] != pair[1])
            raise HostsError(f"process {number} has {mine}, the first one {wanted}; {remedy}")


def is_shared(error: BaseException) -> bool:
    """Whether every process of the run raises this error, or there is only one process."""
    if jax.process_count() == 1 or isinstance(error, SharedError):
        return True
    return isinstance(error, Interrupted) and error.shared


@contextlib.contextmanager
def exit_on_failure(prog: str) -> Iterator[None]:
    """Exits this process when it fails, so that the others do not wait for it for ever.

    An error of all processes (a `SharedError`, or an `Interrupted` that is shared) is printed by
    the first one. An error of this process alone, such as the loss of another (exit code `LOST`),
    is printed by this one, which exits without waiting for the others.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        code, message = _exit_status(error)
        shared = is_shared(error)
        if is_primary() or not shared:
            name = prog if is_primary() else f"{prog}, process {jax.process_index()}"
            print(f"{name}: {message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if shared:
            jax.distributed.shutdown()  # waits for all the others, which come here too
        os._exit(code)


SIGNS_OF_LOSS = (
    *("Gloo", "NCCL", "Connection closed", "Connection reset", "Socket closed", "UNAVAILABLE"),
    *("heartbeat", "coordination service", "DEADLINE_EXCEEDED"),
)
"""Texts in the errors of device libraries when another process is gone."""


def _exit_status(error: BaseException) -> tuple[int, str]:
    """Exit code and message of a process that exits with this error."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, str(error)
    for one in _chain(error):
        if any(sign in str(one) for sign in SIGNS_OF_LOSS):
            reason = str(one).strip().splitlines()[0]
            return LOST, (
                f"another process of this run is gone or out of reach ({reason[:160]}); start all"
                " of them again: they resume from the last checkpoint"
            )
    return 1, "".join(traceback.format_exception(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes: the writer of checkpoints reports a lost process by an error of its
    own."""
    while error:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
