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

Tensors keep the letters of the papers: `r` receptance, `w` decay, `k` key, `v` value, `a` and `b`
(version 7: the removal and replacement keys), `u` (version 4: the bonus of the current token).
"""

from collections.abc import Callable
from typing import Any, TypeVar

from jax import Array
from jaxtyping import Bool, Float, Int, PRNGKeyArray, Shaped

Leaf = TypeVar("Leaf")
"""What a container of parameters or states holds: arrays, specs, labels, shapes."""

PyTree = Any

__all__ = ["Array", "Bool", "Callable", "Float", "Int", "Leaf", "PRNGKeyArray", "PyTree", "Shaped"]
