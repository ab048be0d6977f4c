"""RWKV-7's WKV, one file per form; `rwkv_jax.wkv.wkv7` is the operator."""

from rwkv_jax.wkv.v7 import associative, chunked, recurrence
from rwkv_jax.wkv.v7.any_decay import STRONGEST, for_any_decay

__all__ = ["FORMS", "STRONGEST", "for_any_decay"]

FORMS = {"scan": recurrence.scan, "chunked": chunked.wkv7, "associative": associative.wkv7}
