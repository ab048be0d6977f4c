"""The kernels, as forms of the operators."""

from typing import Any

from rwkv_jax.wkv import kernels
from rwkv_jax.wkv.form import Form
from rwkv_jax.wkv.v4 import kernel as v4
from rwkv_jax.wkv.v4 import pallas_gpu as v4_gpu
from rwkv_jax.wkv.v4 import pallas_tpu as v4_tpu
from rwkv_jax.wkv.v6 import kernel as v6
from rwkv_jax.wkv.v6 import pallas_gpu as v6_gpu
from rwkv_jax.wkv.v6 import pallas_tpu as v6_tpu
from rwkv_jax.wkv.v7 import kernel as v7
from rwkv_jax.wkv.v7 import pallas_gpu as v7_gpu
from rwkv_jax.wkv.v7 import pallas_tpu as v7_tpu

_KERNELS = {
    "wkv4": (v4_gpu.KERNEL, v4_tpu.KERNEL),
    "wkv6": (v6_gpu.KERNEL, v6_tpu.KERNEL),
    "wkv7": (v7_gpu.KERNEL, v7_tpu.KERNEL),
}
_OPERATORS = {"wkv4": v4.operator, "wkv6": v6.operator, "wkv7": v7.operator}


def form(operator: str, platform: str, *, named: bool) -> Form:
    """The kernel for this platform; calling it raises `ValueError` for inputs or a device that it
    does not support."""
    kernel = next(x for x in _KERNELS[operator] if x.platform == platform)
    return _OPERATORS[operator](kernel, named)


def select(operator: str, x: Any, state: Any) -> Form | None:
    """The kernel for the program's device and these inputs, if there is one."""
    given = (state,) if operator == "wkv4" else (x, state)
    refusal = v4.refusal if operator == "wkv4" else kernels.refusal
    kernel = kernels.chosen(operator, _KERNELS[operator], refusal, *given)
    return None if kernel is None else _OPERATORS[operator](kernel, named=False)


needs_shard_map = kernels.mapped
