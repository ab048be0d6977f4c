"""RWKV-4's WKV, one file per form; `rwkv_jax.wkv.wkv4` is the operator."""

from rwkv_jax.wkv.v4 import associative, chunked, recurrence

FORMS = {"scan": recurrence.scan, "chunked": chunked.wkv4, "associative": associative.wkv4}
