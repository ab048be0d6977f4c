"""RWKV-4's WKV, one file an implementation; `rwkv_jax.wkv.wkv4` is the front."""
