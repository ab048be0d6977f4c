"""The notation: one letter per axis, used in every annotation of the package.

=====  ==================================================================
`b`    batch
`t`    time (tokens)
`c`    model width ("channels", official `n_embd`)
`h`    heads
`n`    head size; inside a head `k` is the key index, `v` the value index
`f`    width of the channel-mix hidden layer (official `dim_ffn`)
`l`    layers
`V`    vocabulary
=====  ==================================================================

Tensors have the letters of the papers: `r` receptance, `w` decay, `k` key, `v` value, `a` and `b`
(version 7: removal and replacement keys), `u` (versions 4 to 6: bonus of the current token).

Everything else has the field's words:

    state       the recurrent state, a value that goes in and comes out
    reset       bool [b, t]: where documents start (others write segment ids)
    lengths     int [b]: valid tokens of each row; the rest is right padding
    carry       what passes from layer to layer besides `x`
    form        one implementation of an operator: `scan`, `chunked`, `associative`, a kernel
    chunk       consecutive tokens that are computed at once
    document    tokens that see each other; `packing` puts several into one row
    sharded     split across devices, else replicated; gathered when needed in full
    resume      continue a run from its last checkpoint
"""

from collections.abc import Callable
from typing import Any, TypeVar

from jax import Array
from jaxtyping import Bool, Float, Int, PRNGKeyArray, Shaped

Leaf = TypeVar("Leaf")
"""The leaves of a container of parameters or states: arrays, specs, shapes or labels."""

PyTree = Any

__all__ = ["Array", "Bool", "Callable", "Float", "Int", "Leaf", "PRNGKeyArray", "PyTree", "Shaped"]
