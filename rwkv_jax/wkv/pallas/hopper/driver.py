"""Version 7 on Hopper GPUs: which inputs it takes, and the passes of `v7.py` on them.

Inputs are bfloat16, but for the log decays, which are float32. States that are kept for the
gradient are bfloat16.
"""

from typing import Any

import jax
import jax.numpy as jnp

from rwkv_jax.wkv.device import device_kind
from rwkv_jax.wkv.pallas import heads
from rwkv_jax.wkv.pallas.gpu.driver import LETTERS, pack, program, unpack
from rwkv_jax.wkv.pallas.kernel import Driver, Kernel

CHUNK = 64
"""Tokens of a chunk, and channels of a head."""
CARDS = ("H100", "H200", "H800", "H20")
"""GPUs of compute capability 9.0, by parts of JAX's `device_kind`."""


def unsupported(x: Any) -> str | None:
    if jax.__version_info__ < (0, 11):
        return f"JAX {jax.__version__}: it needs JAX 0.11 or newer, which needs Python 3.12"
    kind = device_kind()
    if "NVIDIA" in kind and not any(card in kind for card in CARDS):
        return f"{kind}: this one is for Hopper GPUs (H100, H200)"
    if reason := heads.unsupported(x):
        return reason
    if x.r.shape[-1] != CHUNK:
        return f"heads of {x.r.shape[-1]} channels (this one is for heads of {CHUNK})"
    rest = x._replace(log_w=None, initial=None)  # which are float32
    given = {z.dtype.name for z in jax.tree.leaves(rest)}
    if given != {"bfloat16"}:
        return f"{' and '.join(sorted(given))} (this one is for bfloat16)"
    return None


def run(kernel: Kernel, name: str, inputs: Any, outputs: Any, interpret: bool) -> Any:
    """Launches the forward or backward pass (`Driver.run`)."""
    # Imported here: JAX before 0.11 cannot.
    from rwkv_jax.wkv.pallas.hopper import v7

    log_w = inputs.x.log_w
    inputs = inputs._replace(x=inputs.x._replace(log_w=log_w.astype(jnp.float32)))
    if name == "forward":
        return v7.forward(inputs, outputs, interpret)
    exact = jax.ShapeDtypeStruct(log_w.shape, jnp.float32)
    outputs = outputs._replace(x=outputs.x._replace(log_w=exact))
    out = v7.backward(inputs, outputs, interpret)
    return out._replace(x=out.x._replace(log_w=out.x.log_w.astype(log_w.dtype)))


DRIVER = Driver(
    "cuda", LETTERS, run, lambda h, n: 1, pack, unpack, unsupported, program, on_host=True
)
