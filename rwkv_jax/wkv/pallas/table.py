"""The kernels, by operator and platform. Importing this needs Pallas."""

from rwkv_jax.wkv.pallas import forms, v4
from rwkv_jax.wkv.pallas.gpu import driver as triton
from rwkv_jax.wkv.pallas.gpu import v6 as gpu_v6
from rwkv_jax.wkv.pallas.gpu import v7 as gpu_v7
from rwkv_jax.wkv.pallas.hopper import driver as hopper
from rwkv_jax.wkv.pallas.kernel import Kernel
from rwkv_jax.wkv.pallas.tpu import v6 as tpu_v6
from rwkv_jax.wkv.pallas.tpu import v7 as tpu_v7
from rwkv_jax.wkv.pallas.tpu.driver import SIZE

KERNELS = {
    ("wkv4", "cuda"): Kernel(v4.ALGEBRA, v4.GPU, size=v4.SIZE),
    ("wkv4", "tpu"): Kernel(v4.ALGEBRA, v4.TPU, size=v4.SIZE),
    # With chunks of 32, registers spill by the kilobyte (`python -m benchmarks.schedule`).
    ("wkv6", "cuda"): Kernel(gpu_v6.ALGEBRA, triton.DRIVER, size=16),
    ("wkv6", "tpu"): Kernel(tpu_v6.ALGEBRA, tpu_v6.DRIVER, size=SIZE),
    ("wkv7", "cuda"): Kernel(gpu_v7.ALGEBRA, triton.DRIVER, size=16),
    ("wkv7", "tpu"): Kernel(tpu_v7.ALGEBRA, tpu_v7.DRIVER, size=SIZE),
    # Of the algebra it needs only where documents start.
    ("wkv7", "mosaic_gpu"): Kernel(gpu_v7.ALGEBRA, hopper.DRIVER, size=hopper.CHUNK),
}
"""By operator, and platform in XLA's words, or the name of one that is not the default yet."""

FORMS = {"wkv4": v4.form, "wkv6": forms.wkv6, "wkv7": forms.wkv7}
"""(kernel, named) -> the form by a kernel, by operator."""
