"""Which device a program is traced for."""

from functools import lru_cache

import jax
from jax import lax

from rwkv_jax.typing import Callable


def by_platform(**forms: Callable) -> Callable:
    """A function that runs the form for the platform that the program is compiled for ("cpu",
    "cuda", "tpu"), or `default`."""
    return lambda *args: lax.platform_dependent(*args, **forms)


def device_kind() -> str:
    """The name of the device that a program is traced for: of the mesh in context, or of this
    process."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def accelerator() -> str | None:
    """XLA's name of the platform that a program is traced for: of the mesh in context, or of this
    process; None for a CPU."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    if platform == "gpu" and jax.default_backend() == "gpu" and _is_rocm():
        return "rocm"
    return {"gpu": "cuda", "cuda": "cuda", "rocm": "rocm", "tpu": "tpu"}.get(platform)


def is_here(platform: str) -> bool:
    """Whether the program is traced for this process' own devices, and they are of the platform."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    mine = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    return mine == platform and (
        device is None or device.device_kind == jax.devices()[0].device_kind
    )


@lru_cache
def _is_rocm() -> bool:
    return "rocm" in jax.devices()[0].client.platform_version.lower()


@lru_cache
def too_old() -> str | None:
    """Why this process' GPU, if it has one, cannot run Triton's kernels."""
    if jax.default_backend() != "gpu" or _is_rocm():
        return None
    device = jax.devices()[0]
    if float(device.compute_capability) >= 8.0:
        return None
    return f"{device.device_kind}, whose compute capability {device.compute_capability} is below 8"
