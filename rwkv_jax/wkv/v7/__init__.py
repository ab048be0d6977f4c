"""RWKV-7's WKV, one file an implementation; `rwkv_jax.wkv.wkv7` is the front."""
