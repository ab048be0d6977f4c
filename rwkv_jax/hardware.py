"""Accelerators that need not be there: what they can do, and descriptions that compilers take.

Peak rates are the makers' (dense bfloat16; Google Cloud's pages of TPU versions, NVIDIA's data
sheets of A100 and H100 SXM). Links are what a chip can send at once in one direction over all of
its links: 45 GB/s each of 4 (v5e) or 6 (v4), 90 GB/s each of 4 (v6e) or 6 (v5p); NVLink within a
machine of eight GPUs, 400 Gbit/s of network for each GPU beyond.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from rwkv_jax.errors import UserError

GIB = 2**30


class TopologyError(UserError):
    """Hardware that there is no description of."""


@dataclass(frozen=True)
class Chip:
    """One accelerator."""

    name: str
    flops: float
    """Per second, bfloat16 products."""
    memory: int
    """Bytes."""
    bandwidth: float
    """Bytes per second of its memory."""
    links: float
    """Bytes per second that it sends, in one direction, to chips beside it."""
    kinds: tuple[str, ...]
    """What `device_kind` of JAX says of it, or a part of that."""
    dimensions: tuple[int, ...]
    """How many numbers the shape of a topology has: a slice is a grid; GPUs are machines x each."""
    network: float = 0.0
    """Bytes per second to chips of other machines, where that is another way; 0: it is not."""


CHIPS = {
    "v4": Chip("TPU v4", 275e12, 32 * GIB, 1.228e12, 6 * 45e9, ("TPU v4",), (3,)),
    "v5e": Chip("TPU v5e", 197e12, 16 * GIB, 0.819e12, 4 * 45e9, ("TPU v5 lite", "TPU v5e"), (2,)),
    "v5p": Chip("TPU v5p", 459e12, 95 * GIB, 2.765e12, 6 * 90e9, ("TPU v5p", "TPU v5"), (3,)),
    "v6e": Chip("TPU v6e", 918e12, 32 * GIB, 1.640e12, 4 * 90e9, ("TPU v6 lite", "TPU v6e"), (2,)),
    "a100": Chip("A100 SXM 80GB", 312e12, 80 * GIB, 2.039e12, 300e9, ("A100",), (1, 2), 50e9),
    "h100": Chip("H100 SXM 80GB", 989e12, 80 * GIB, 3.35e12, 450e9, ("H100", "H200"), (1, 2), 50e9),
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls so; None for one that is not known."""
    found = (chip for chip in CHIPS.values() if any(kind in device_kind for kind in chip.kinds))
    return next(found, None)


GPUS = {
    # compute capability, multiprocessors, shared memory a block and a multiprocessor (bytes),
    # L2 (MiB), memory (GiB), its bandwidth (GB/s), clock (GHz); NVIDIA's data sheets and CUDA's
    # table of compute capabilities
    "A100": ("NVIDIA A100-SXM4-80GB", 8, 0, 108, 166912, 167936, 40, 80, 2039, 1.41),
    "L4": ("NVIDIA L4", 8, 9, 58, 101376, 102400, 48, 24, 300, 2.04),
    "H100": ("NVIDIA H100 80GB HBM3", 9, 0, 132, 232448, 233472, 50, 80, 3352, 1.98),
    "B200": ("NVIDIA B200", 10, 0, 148, 232448, 233472, 126, 180, 8000, 1.97),
}
"""What XLA compiles for, by name."""


def configuration(
    name: str,
    major: int,
    minor: int,
    cores: int,
    block: int,
    core: int,
    l2: int,
    memory: int,
    bandwidth: int,
    clock: float,
) -> str:
    """XLA's description of a GPU, from a row of `GPUS`."""
    threads = 2048 if minor == 0 else 1536
    return (
        "gpu_device_info {"
        " threads_per_block_limit: 1024 threads_per_warp: 32"
        f" shared_memory_per_block: 49152 shared_memory_per_core: {core}"
        f" shared_memory_per_block_optin: {block} threads_per_core_limit: {threads}"
        f" core_count: {cores} fpus_per_core: 128"
        " block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535"
        f" memory_bandwidth: {bandwidth * 10**9} l2_cache_size: {l2 << 20}"
        f" clock_rate_ghz: {clock} device_memory_size: {memory << 30}"
        f" cuda_compute_capability {{ major: {major} minor: {minor} }}"
        " registers_per_core_limit: 65536 registers_per_block_limit: 65536"
        ' } platform_name: "CUDA"'
        " dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 minor: 0 }"
        f' device_description_str: "{name}"'
    )


@dataclass(frozen=True)
class Topology:
    """Devices to compile for."""

    chip: Chip | None
    """None: those that are here, of which no rates are known."""
    devices: Sequence[Any]
    platform: str
    hosts: int = 1


def open_topology(name: str) -> Topology:
    """The hardware that `v5e:16x16`, `v5p:4x4x4`, `h100:8`, `h100:4x8` (machines x GPUs) or `here`
    names.

    Raises `TopologyError` for one that is not known, or whose compiler is not installed.
    """
    import jax

    if name == "here":
        devices = jax.devices()
        return Topology(None, devices, devices[0].platform, jax.process_count())
    kind, _, shape = name.lower().partition(":")
    sizes = [int(n) for n in shape.split("x")] if re.fullmatch(r"\d+(x\d+)*", shape) else []
    if kind not in CHIPS or 0 in sizes or len(sizes) not in CHIPS[kind].dimensions:
        raise TopologyError(
            f"--topology {name}: not known; give one of {', '.join(CHIPS)} and its shape, as in"
            " v5e:16x16, v5p:4x4x4 or h100:8, or here (the devices of this machine)"
        )
    return _gpus(kind, sizes) if kind.upper() in GPUS else _tpus(f"{kind}:{shape}", kind, sizes)


def _tpus(name: str, kind: str, sizes: list[int]) -> Topology:
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is none to ask
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    if all(n == 1 for n in sizes):
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:
        raise _not_described(name, "libtpu", error) from error
    hosts = len({device.process_index for device in found.devices})
    return Topology(CHIPS[kind], found.devices, "tpu", hosts)


def _gpus(kind: str, sizes: list[int]) -> Topology:
    from jax.experimental import topologies

    machines, each = sizes if len(sizes) == 2 else (1, sizes[0])
    try:
        found = topologies.get_topology_desc(
            platform="cuda",
            target_config=configuration(*GPUS[kind.upper()]),
            topology=f"1x{machines}x{each}",
        )
    except Exception as error:
        name = f"{kind}:{machines}x{each}"
        raise _not_described(name, "jax_cuda13_plugin", error) from error
    return Topology(CHIPS[kind], found.devices, "cuda", machines)


def _not_described(name: str, compiler: str, error: Exception) -> TopologyError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    remedy = "give another shape"
    if find_spec(compiler) is None:
        remedy = "its compiler comes with pip install 'rwkv_jax[aot]'"
    return TopologyError(f"--topology {name}: cannot be described here ({reason[:160]}); {remedy}")
