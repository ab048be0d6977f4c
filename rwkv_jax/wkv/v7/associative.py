"""Being written."""

from rwkv_jax.wkv.v7.scan import wkv7  # noqa: F401
