"""`train.py` in processes of its own: one, as a user starts it, or several, as a cluster does."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from compiling import QUICK_FLAGS
from training.runs import ALIKE, settings

ROOT = Path(__file__).parents[2]
LIMITED = (
    "-c",
    f"""
import resource, sys
sys.dont_write_bytecode = True  # Python would leave the part that fits
sys.path.insert(0, {str(ROOT)!r})
import matplotlib.font_manager  # which would write its cache
from rwkv_jax.cli import train
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(train.main(sys.argv[1:], "python train.py"))
""",
)
"""`train.py` whose files may not grow beyond 20 kB: their writes fail inside of libraries, as on a
full disk."""


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def launch(
    settings: list[str],
    count: int,
    devices: int = 1,
    port: int | None = None,
    only: int | None = None,
    program: tuple[str, ...] = ("train.py",),
) -> list[subprocess.Popen]:
    """`train.py`, or another `program`, in `count` processes of so many devices each, with no
    config but `settings`; or `only` one of them."""
    port = port or free_port()
    flags = f"--xla_force_host_platform_device_count={devices} {QUICK_FLAGS}"
    started = []
    for number in range(count) if only is None else (only,):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        if count > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(number),
            }
        started.append(
            subprocess.Popen(
                [sys.executable, *program, os.devnull, *settings],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def outcomes(processes: list[subprocess.Popen], timeout: float = 300) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each, once all have ended; fails if one doesn't in time."""
    ended = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=timeout)
            ended.append((process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return ended


def start(tmp_path: Path, *extra: str) -> subprocess.Popen:
    """`train.py` as a user starts it."""
    toml = tmp_path / "empty.toml"
    toml.write_text("")
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", toml, *settings(tmp_path, **ALIKE), *extra],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )


def wait_for(condition, process, seconds=120):
    """Waits until something is so, while the process lives."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "too slow"
        time.sleep(0.01)
