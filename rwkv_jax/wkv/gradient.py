"""Operators whose gradient is written by hand, for reverse mode only."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from rwkv_jax.remat import save_for_backward
from rwkv_jax.typing import Array, Callable, PyTree

FORWARD_MODE = {
    "wkv4": "'scan'",
    "wkv6": "'scan' or 'associative'",
    "wkv7": "'scan' or 'associative'",
}
"""The implementations of each operator that JAX differentiates itself, in forward mode too."""


def with_gradient(
    operator: str,
    primal: Callable,
    forward: Callable,
    backward: Callable,
    *,
    keeps_outputs: bool = False,
) -> Callable[..., Any]:
    """`primal(*args)`, differentiated by hand in reverse mode.

    Under differentiation `forward(*args)` runs instead and returns (outputs, residuals);
    `backward(args, residuals, cotangents)` returns the gradients of `args`. With `keeps_outputs`
    the residuals that `backward` gets are (outputs, residuals). All of them are tagged as too
    expensive to recompute (`rwkv_jax.remat`).

    Forward-mode differentiation raises `TypeError`, which names the implementations of `operator`
    that support it.
    """

    @jax.custom_vjp
    def run(*args):
        return primal(*args)

    def run_forward(*args):
        outputs, residuals = save_for_backward(forward(*args), of_wkv=True)
        return outputs, (args, (outputs, residuals) if keeps_outputs else residuals)

    def run_backward(saved, cotangents):
        return backward(*saved, cotangents)

    run.defvjp(run_forward, run_backward)
    return lambda *args: run(*_reverse_only(operator, args))


def outputs_of(forward: Callable) -> Callable:
    """`forward` without its residuals: a `primal`."""
    return lambda *args: forward(*args)[0]


# A guard: where JAX would only say that there is a `custom_vjp` somewhere, forward mode fails with
# a message that names the operator. It is the identity on tangents; reverse mode transposes it
# away, and forward mode would run it.
_guard = Primitive("reverse_only")


def _fail(*_, operator: str, **__):
    raise TypeError(
        f"{operator}: forward-mode differentiation (jvp, jacfwd, linearize) needs"
        f" implementation={FORWARD_MODE[operator]}; the others have a gradient for reverse mode"
        " (grad, vjp) only"
    )


_guard.def_impl(_fail)
_guard.def_abstract_eval(lambda x, **_: x)
mlir.register_lowering(_guard, _fail)
ad.deflinear(_guard, lambda cotangent, **_: [cotangent])
batching.defvectorized(_guard)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _guarded(operator: str, x: Array) -> Array:
    return x


@_guarded.defjvp
def _(operator: str, primals: tuple[Array], tangents: tuple[Array]):
    # The primal passes unguarded: second derivatives differentiate the gradient's own operations.
    return primals[0], _guard.bind(tangents[0], operator=operator)


def _reverse_only(operator: str, args: PyTree) -> PyTree:
    """`args`, guarded against forward-mode differentiation."""

    def guard(x: Array) -> Array:
        return _guarded(operator, x) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(guard, args)
