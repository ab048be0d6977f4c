"""The recurrences as Pallas kernels, for NVIDIA GPUs from Ampere on and for TPUs from v4 on.

docs/kernels.md says what they are made of.
"""

import logging
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from rwkv_jax.wkv.device import accelerator, device_kind, too_old
from rwkv_jax.wkv.form import Form
from rwkv_jax.wkv.pallas import forms, v4
from rwkv_jax.wkv.pallas.gpu import driver as triton
from rwkv_jax.wkv.pallas.gpu import v6 as gpu_v6
from rwkv_jax.wkv.pallas.gpu import v7 as gpu_v7
from rwkv_jax.wkv.pallas.kernel import Kernel
from rwkv_jax.wkv.pallas.partition import auto_axes
from rwkv_jax.wkv.pallas.tpu import v6 as tpu_v6
from rwkv_jax.wkv.pallas.tpu import v7 as tpu_v7
from rwkv_jax.wkv.pallas.tpu.driver import SIZE

log = logging.getLogger("rwkv_jax")

KERNELS = {
    ("wkv4", "cuda"): Kernel(v4.ALGEBRA, v4.GPU, size=v4.SIZE),
    ("wkv4", "tpu"): Kernel(v4.ALGEBRA, v4.TPU, size=v4.SIZE),
    # With chunks of 32, registers spill by the kilobyte (`python -m benchmarks.kernels`).
    ("wkv6", "cuda"): Kernel(gpu_v6.ALGEBRA, triton.DRIVER, size=16),
    ("wkv6", "tpu"): Kernel(tpu_v6.ALGEBRA, tpu_v6.DRIVER, size=SIZE),
    ("wkv7", "cuda"): Kernel(gpu_v7.ALGEBRA, triton.DRIVER, size=16),
    ("wkv7", "tpu"): Kernel(tpu_v7.ALGEBRA, tpu_v7.DRIVER, size=SIZE),
}
"""By operator, and platform in XLA's words."""

_FORMS = {"wkv4": v4.form, "wkv6": forms.wkv6, "wkv7": forms.wkv7}


@lru_cache
def form(operator: str, platform: str, *, named: bool) -> Form:
    """(x, state, reset) -> (y, state) by the kernel of "wkv4", "wkv6" or "wkv7" for "cuda" or
    "tpu", for inputs of any float dtype; y is in v's.

    In programs for a CPU the kernel is interpreted if it was asked for by name; if it was not,
    XLA's form runs. Raises `ValueError` with the reason if the inputs are not supported, or if a
    named kernel is for another device than the program's.
    """
    kernel = KERNELS[operator, platform]
    run = _FORMS[operator](kernel, named)

    def checked(x: Any, state: Any, reset: Any) -> Any:
        device = accelerator()
        if named and device not in (None, platform):
            reason = f"{device}: this one is for {platform}"
        else:
            reason = unsupported_reason(kernel, x, state)
        if reason is not None:
            raise ValueError(
                f"{operator}: no kernel for {reason}; implementation='chunked' takes any"
            )
        return run(x, state, reset)

    return checked


def select(operator: str, x: Any, state: Any) -> Form | None:
    """The `form` of the kernel for the program's device, or None.

    If there is a kernel but it does not take these inputs, the log says why in one line.
    """
    platform = accelerator()
    if platform is None or (operator, platform) not in KERNELS:
        return None
    kernel = KERNELS[operator, platform]
    reason = unsupported_reason(kernel, x, state) or _no_mesh(platform)
    if reason is None:
        return form(operator, platform, named=False)
    warn_once(f"{operator}: no kernel for {reason}; XLA's form runs instead")
    return None


def needs_shard_map(implementation: str | None) -> bool:
    """Whether this implementation needs a `shard_map` around it even if no axis shards anything:
    XLA for TPUs does not partition kernels."""
    return implementation == "pallas_tpu" or (implementation is None and accelerator() == "tpu")


def unsupported_reason(kernel: Kernel, x: Any, state: Any) -> str | None:
    """Why the kernel cannot run here, or not on these inputs."""
    platform, mesh = kernel.driver.platform, jax.sharding.get_abstract_mesh()
    if platform == "tpu" and (axes := auto_axes(mesh)):
        return (
            f"automatic mesh axes ({', '.join(axes)}) on TPUs, where XLA cannot partition it; make"
            " them explicit, or map them by jax.shard_map"
        )
    if platform == "tpu" and device_kind() in ("TPU v2", "TPU v3"):
        return device_kind()
    if platform == "cuda" and (reason := too_old()):
        return reason
    if any(z.dtype == jnp.float64 for z in jax.tree.leaves(state)):  # as any input makes it
        return "float64"
    return kernel.driver.unsupported(x)


def _no_mesh(platform: str | None) -> str | None:
    """On several TPUs with no mesh set, XLA may have to partition the program."""
    if platform != "tpu" or not jax.sharding.get_abstract_mesh().empty or jax.device_count() == 1:
        return None
    return "several TPUs without a mesh; set one of explicit axes (jax.set_mesh)"


@lru_cache
def warn_once(message: str) -> None:
    """A line in the log, once in a process."""
    log.warning(message)
