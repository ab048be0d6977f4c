"""Shared by the benchmarks: worker processes, interleaved rounds, machine, tables, results.

The speed of a shared machine drifts by tens of per cent over minutes. So the contestants take
turns, in a different order each round. Ratios are taken within a round, and a table states minimum,
median and maximum over the rounds. Each contestant is a process; its peak memory is the kernel's
figure after it has ended.
"""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GIB = 2**30
LOAD_BEFORE = os.getloadavg()[0]
"""Load average of the minute before: above zero, other processes ran too."""
console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)


class Missing(Exception):
    """A contestant's package is not installed in its interpreter; the message names it."""


class Worker:
    """A contestant in its own process: started with `options`, then asked one request at a time."""

    def __init__(
        self, script: str, options: dict, *, python: str = sys.executable, env: dict | None = None
    ):
        self.started = time.time()
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TOKENIZERS_PARALLELISM": "false",
            **(env or {}),
        }
        environment = {name: value for name, value in environment.items() if value is not None}
        self.process = subprocess.Popen(
            [python, str(ROOT / "benchmarks" / "peers" / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.about = self.ask(options)
        if "missing" in self.about:
            self.close()
            raise Missing(self.about["missing"])

    def ask(self, request: dict) -> dict:
        """Return the answer to one request; raises RuntimeError when the worker has died."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args}: ended early, see its message above")
        return json.loads(line)

    def close(self) -> int:
        """End the process and return its peak resident memory in bytes."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_alone(command: list[str], env: dict[str, str] | None = None) -> dict[str, float]:
    """Runs a program to its end: its CPU seconds (`cpu`), wall time (`seconds`), and peak anonymous
    memory in bytes (`anonymous`; pages of mapped files do not count). Linux only."""
    began, peak = time.perf_counter(), 0
    environment = {**os.environ, **(env or {})}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # modules are compiled once, as for any user
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=environment,
    )
    before = os.times()
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, int(status.split("RssAnon:")[1].split()[0]))
        except (OSError, IndexError):
            pass  # it is just starting or has just ended
        time.sleep(0.005)
    after = os.times()
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command)}\n{process.stderr.read().decode()}")
    cpu = after.children_user - before.children_user + after.children_system
    return {
        "cpu": cpu - before.children_system,
        "seconds": time.perf_counter() - began,
        "anonymous": peak * 1024,
    }


def start_all(makers: dict[str, Callable[[], Worker]]) -> dict[str, Worker]:
    """Start the workers one after another (start-up is timed); a missing package skips its own."""
    workers = {}
    for name, make in makers.items():
        console.print(f"[dim]starting {name}[/]")
        try:
            workers[name] = make()
        except Missing as error:
            console.print(
                f"[yellow]skipped: {name}: no package '{error}' (benchmarks/requirements.txt)[/]"
            )
    return workers


def interleave(workers: dict[str, Worker], rounds: int, request: dict) -> dict[str, list[dict]]:
    """Ask every worker once a round, each round in a different order; return answers by worker."""
    answers: dict[str, list[dict]] = {name: [] for name in workers}
    for index in range(rounds):
        console.print(f"[dim]round {index + 1} of {rounds}[/]")
        for name, answer in in_turn(workers, request, index).items():
            answers[name].append(answer)
    return answers


def in_turn(workers: dict[str, Worker], request: dict, index: int) -> dict[str, dict]:
    """Ask every worker once, in a random order seeded by `index`; answers by worker.

    The order varies because the previous contestant leaves traces: caches, memory being freed.
    """
    names = list(workers)
    random.Random(index).shuffle(names)
    return {name: workers[name].ask(request) for name in names}


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return minimum, median and maximum."""
    values = list(values)
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def shown(values: Iterable[float], digits: int = 0) -> str:
    """The median, and the spread in brackets."""
    s = spread(values)
    return f"{s['median']:,.{digits}f} [{s['min']:,.{digits}f}..{s['max']:,.{digits}f}]"


def device() -> dict:
    """The machine: CPU model, cores this process may use, memory, system."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = named[0] if named else model
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return {
        "cpu": model,
        "cores": cores,
        "memory_gib": round(memory, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table whose first column is text and the others numbers."""
    view = Table(title=Text(title), title_justify="left", show_edge=False, pad_edge=False)
    for index, column in enumerate(columns):
        view.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        view.add_row(*map(Text, row))
    console.print()
    console.print(view)


def report(name: str, result: dict) -> Path:
    """Print device and versions, and write everything to benchmarks/results/NAME.json."""
    machine = device()
    console.print(
        f"\n{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"{machine['system']}"
    )
    console.print(f"load of the machine in the minute before: {LOAD_BEFORE:.1f}")
    for whose, found in result.get("versions", {}).items():
        console.print(
            f"{whose}: " + ", ".join(f"{package} {number}" for package, number in found.items())
        )
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    stamp = datetime.now(UTC).isoformat(timespec="seconds")
    path.write_text(
        json.dumps(
            {"when": stamp, "device": machine, "load_before": LOAD_BEFORE, **result}, indent=1
        )
        + "\n"
    )
    console.print(f"written: {path.relative_to(ROOT)}")
    return path
