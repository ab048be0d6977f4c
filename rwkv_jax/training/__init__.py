"""Training: the objective, the optimizer, the jitted step and the loop around it."""

from rwkv_jax.lazily import submodules

__getattr__ = submodules(__name__)
