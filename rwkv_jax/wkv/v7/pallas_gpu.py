"""RWKV-7's WKV as a kernel for NVIDIA GPUs from Ampere on (`rwkv_jax/wkv/triton.py`)."""

from rwkv_jax.wkv import triton
from rwkv_jax.wkv.kernels import Kernel
from rwkv_jax.wkv.v7 import tile
from rwkv_jax.wkv.v7.kernel import FORM, operator

KERNEL = Kernel("wkv7", "cuda", triton, tile, size=16, form=FORM)
"""Chunks of 16: with 32, registers spill by the kilobyte (`python -m benchmarks.kernels`)."""

wkv7 = operator(KERNEL, named=True)
