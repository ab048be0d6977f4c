"""RWKV-5's and 6's WKV, one file an implementation; `rwkv_jax.wkv.wkv6` is the front."""
