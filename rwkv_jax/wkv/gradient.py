"""Operators whose gradient is written by hand: one frame for all of them."""

from typing import Any

import jax

from rwkv_jax.remat import save_for_backward
from rwkv_jax.typing import Callable


def with_gradient(
    primal: Callable, forward: Callable, backward: Callable, *, keeps_outputs: bool = False
) -> Callable[..., Any]:
    """`primal(*given)`, differentiated by hand in reverse mode.

    Where a gradient is asked for, `forward(*given)` runs instead and returns the outputs and what
    it keeps; `backward(given, kept, cotangents)` returns the gradients of `given`. `keeps_outputs`:
    the outputs are kept too, `kept` is (outputs, kept). What is kept is marked as too dear to
    compute again (`rwkv_jax.remat`).
    """

    @jax.custom_vjp
    def run(*given):
        return primal(*given)

    def run_forward(*given):
        outputs, kept = save_for_backward(forward(*given), of_wkv=True)
        return outputs, (given, (outputs, kept) if keeps_outputs else kept)

    def run_backward(residuals, cotangents):
        return backward(*residuals, cotangents)

    run.defvjp(run_forward, run_backward)
    return run


def outputs_of(forward: Callable) -> Callable:
    """`forward` without what it keeps: a `primal`."""
    return lambda *given: forward(*given)[0]
