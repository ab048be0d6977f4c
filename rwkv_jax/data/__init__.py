"""From text to batches: corpora, tokenizers, token files and the loader. Does not use JAX."""

from rwkv_jax.lazily import submodules

__getattr__ = submodules(__name__)
