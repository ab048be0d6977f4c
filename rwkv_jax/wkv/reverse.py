"""What forward-mode differentiation meets at a form whose gradient is written by hand."""

from functools import partial
from typing import TypeVar

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from rwkv_jax.typing import Array

Tree = TypeVar("Tree")

_linear = Primitive("reverse_only")
"""The identity on tangents, which reverse mode transposes away and forward mode would run."""


def _refuse(*_, operator: str, forms: str, **__):
    raise TypeError(
        f"{operator}: forward-mode differentiation (jvp, jacfwd, linearize) needs"
        f" implementation={forms}; the others have a gradient for reverse mode (grad, vjp) only"
    )


_linear.def_impl(_refuse)
_linear.def_abstract_eval(lambda x, **_: x)
mlir.register_lowering(_linear, _refuse)
ad.deflinear(_linear, lambda cotangent, **_: [cotangent])
batching.defvectorized(_linear)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _guarded(operator: str, forms: str, x: Array) -> Array:
    return x


@_guarded.defjvp
def _(operator: str, forms: str, primals: tuple[Array], tangents: tuple[Array]):
    # The value itself is let through: a second differentiation meets the gradient's own operations.
    return primals[0], _linear.bind(tangents[0], operator=operator, forms=forms)


def reverse_only(operator: str, x: Tree, forms: str = "'scan'") -> Tree:
    """`x`; forward-mode differentiation through it is a `TypeError` that names the `forms` to ask
    for, where JAX would only say that there is a `custom_vjp` somewhere."""
    return jax.tree.map(partial(_guarded, operator, forms), x)
