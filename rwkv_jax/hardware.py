"""Accelerators: their peak rates, and the descriptions that compile for them without one present.

Peak rates are the makers' (dense bfloat16; Google Cloud's pages of TPU versions, NVIDIA's data
sheets of A100 and H100 SXM). Links are the total bandwidth of a chip in one direction: 45 GB/s for
each of 4 links (v5e) or 6 (v4), 90 GB/s for each of 4 (v6e) or 6 (v5p); NVLink within a machine of
eight GPUs, and a 400 Gbit/s network per GPU between machines.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

from rwkv_jax.errors import UserError

GIB = 2**30


class TopologyError(UserError):
    """Hardware that is not known, or cannot be compiled for here."""


@dataclass(frozen=True)
class Chip:
    """One accelerator; rates are per second.

    flops       floating-point operations in bfloat16 matrix products
    memory      bytes
    bandwidth   bytes read from or written to its memory
    links       bytes sent, in one direction, to neighbouring chips
    kinds       its names in JAX's `device_kind`, or parts of them
    dimensions  allowed lengths of a topology's shape: TPU slices are grids, of GPUs it is
                machines x GPUs
    network     bytes sent to chips of other machines; 0: `links` reach those too
    """

    name: str
    flops: float
    memory: int
    bandwidth: float
    links: float
    kinds: tuple[str, ...]
    dimensions: tuple[int, ...]
    network: float = 0.0


CHIPS = {
    "v4": Chip("TPU v4", 275e12, 32 * GIB, 1.228e12, 6 * 45e9, ("TPU v4",), (3,)),
    "v5e": Chip("TPU v5e", 197e12, 16 * GIB, 0.819e12, 4 * 45e9, ("TPU v5 lite", "TPU v5e"), (2,)),
    "v5p": Chip("TPU v5p", 459e12, 95 * GIB, 2.765e12, 6 * 90e9, ("TPU v5p", "TPU v5"), (3,)),
    "v6e": Chip("TPU v6e", 918e12, 32 * GIB, 1.640e12, 4 * 90e9, ("TPU v6 lite", "TPU v6e"), (2,)),
    "a100": Chip("A100 SXM 80GB", 312e12, 80 * GIB, 2.039e12, 300e9, ("A100",), (1, 2), 50e9),
    "h100": Chip("H100 SXM 80GB", 989e12, 80 * GIB, 3.35e12, 450e9, ("H100", "H200"), (1, 2), 50e9),
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX's `device_kind` names; None if it is not known."""
    found = (chip for chip in CHIPS.values() if any(kind in device_kind for kind in chip.kinds))
    return next(found, None)


class Gpu(NamedTuple):
    """What XLA's compiler needs to know of a GPU.

    major, minor  compute capability
    cores         multiprocessors
    block         bytes of shared memory that a block can use
    core          bytes of shared memory of a multiprocessor
    l2            MiB
    memory        GiB
    bandwidth     GB/s
    clock         GHz
    """

    name: str
    major: int
    minor: int
    cores: int
    block: int
    core: int
    l2: int
    memory: int
    bandwidth: int
    clock: float

    def target_config(self) -> str:
        """XLA's description of the GPU (`GpuTargetConfigProto`, as text)."""
        return (
            "gpu_device_info {"
            " threads_per_block_limit: 1024 threads_per_warp: 32"
            f" shared_memory_per_block: 49152 shared_memory_per_core: {self.core}"
            f" shared_memory_per_block_optin: {self.block}"
            f" threads_per_core_limit: {2048 if self.minor == 0 else 1536}"
            f" core_count: {self.cores} fpus_per_core: 128"
            " block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535"
            f" memory_bandwidth: {self.bandwidth * 10**9} l2_cache_size: {self.l2 << 20}"
            f" clock_rate_ghz: {self.clock} device_memory_size: {self.memory << 30}"
            f" cuda_compute_capability {{ major: {self.major} minor: {self.minor} }}"
            " registers_per_core_limit: 65536 registers_per_block_limit: 65536"
            ' } platform_name: "CUDA"'
            " dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 minor: 0 }"
            f' device_description_str: "{self.name}"'
        )


GPUS = {
    "A100": Gpu("NVIDIA A100-SXM4-80GB", 8, 0, 108, 166912, 167936, 40, 80, 2039, 1.41),
    "L4": Gpu("NVIDIA L4", 8, 9, 58, 101376, 102400, 48, 24, 300, 2.04),
    "H100": Gpu("NVIDIA H100 80GB HBM3", 9, 0, 132, 232448, 233472, 50, 80, 3352, 1.98),
    "B200": Gpu("NVIDIA B200", 10, 0, 148, 232448, 233472, 126, 180, 8000, 1.97),
}
"""Source: NVIDIA's data sheets and CUDA's table of compute capabilities."""


@dataclass(frozen=True)
class Topology:
    """Devices to compile for."""

    chip: Chip | None
    """None for the devices of this machine, whose rates are not known."""
    devices: Sequence[Any]
    platform: str
    hosts: int = 1


def open_topology(name: str) -> Topology:
    """The hardware named by `v5e:16x16`, `v5p:4x4x4`, `h100:8`, `h100:4x8` (machines x GPUs) or
    `here`.

    Raises `TopologyError` for hardware that is not known, or whose compiler is not installed.
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
    options: dict[str, Any]
    if gpu := GPUS.get(kind.upper()):
        platform, compiler = "cuda", "jax_cuda13_plugin"
        hosts, each = sizes if len(sizes) == 2 else (1, sizes[0])
        options = {"topology": f"1x{hosts}x{each}", "target_config": gpu.target_config()}
    else:
        platform, compiler = "tpu", "libtpu"
        options = {"topology_name": f"{kind}:{shape}", **_tpu_options(kind, sizes)}
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform=platform, **options).devices
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = "give another shape"
        if find_spec(compiler) is None:
            remedy = "its compiler comes with pip install 'rwkv_jax[aot]'"
        raise TopologyError(
            f"--topology {name}: cannot be described here ({reason[:160]}); {remedy}"
        ) from error
    hosts = len({device.process_index for device in devices})
    return Topology(CHIPS[kind], devices, platform, hosts)


def _tpu_options(kind: str, sizes: list[int]) -> dict[str, Any]:
    """Options of libtpu for a machine without a TPU; sets its environment variables too."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    if all(n == 1 for n in sizes):
        options["chips_per_host_bounds"] = (1, 1, 1)
    return options
