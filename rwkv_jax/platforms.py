"""Which devices there are, before JAX is imported."""

from collections.abc import Mapping, MutableMapping
from importlib.util import find_spec
from pathlib import Path

COMPILERS = {
    "cuda": (("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"), ("nvidia[0-9]*", "dxg")),
    "tpu": (("libtpu",), ("accel[0-9]*", "vfio/[0-9]*")),
}
"""Platform -> the packages of its compiler, and its devices in `/dev`."""


def has_device(platform: str, root: Path = Path("/dev")) -> bool:
    """Whether this machine has a device of a platform."""
    return any(any(root.glob(pattern)) for pattern in COMPILERS[platform][1])


def leave_out_absent(environment: MutableMapping[str, str], root: Path = Path("/dev")) -> None:
    """Has JAX use the CPU alone where compilers of accelerators are installed (the extra `aot`) and
    no accelerator is there: it would look for one, and print what it does not find.

    A JAX_PLATFORMS that is set stays.
    """
    if environment.get("JAX_PLATFORMS") or not root.is_dir():
        return
    if any(has_device(platform, root) for platform in COMPILERS):
        return
    if any(_installed(name) for packages, _ in COMPILERS.values() for name in packages):
        environment["JAX_PLATFORMS"] = "cpu"


def wants(platform: str, environment: Mapping[str, str]) -> bool:
    """Whether JAX_PLATFORMS allows a platform."""
    return platform in (environment.get("JAX_PLATFORMS") or platform).split(",")


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # not even its parent
        return False
