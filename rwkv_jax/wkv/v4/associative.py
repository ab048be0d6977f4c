"""Being written."""

from rwkv_jax.wkv.v4.scan import wkv4  # noqa: F401
