"""Measuring a model: bits per byte of any text, LAMBADA, multiple choice, and lm-eval."""

from rwkv_jax.lazily import submodules

__getattr__ = submodules(__name__)
