"""Checkpoints: those of runs (`store`), and files of weights in every format (`weights`)."""

from rwkv_jax.lazily import submodules

__getattr__ = submodules(__name__)
