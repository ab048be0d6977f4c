"""RWKV-7's WKV as a kernel for TPUs (`rwkv_jax/wkv/mosaic.py`)."""

from rwkv_jax.wkv import mosaic
from rwkv_jax.wkv.kernels import Kernel
from rwkv_jax.wkv.v7 import tile
from rwkv_jax.wkv.v7.kernel import FORM, operator

KERNEL = Kernel("wkv7", "tpu", mosaic, tile, size=32, form=FORM)
"""Chunks of 32: two heads of 64 fill half of a matrix unit's rows, and no decay overflows."""

wkv7 = operator(KERNEL, named=True)
