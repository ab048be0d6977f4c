"""The WKV of RWKV-5 and 6, one file per form; `rwkv_jax.wkv.wkv6` is the operator."""

from rwkv_jax.wkv.v6 import associative, chunked, recurrence

FORMS = {"scan": recurrence.scan, "chunked": chunked.wkv6, "associative": associative.wkv6}
