"""What the kernels of RWKV-7 share: the operator around one, and XLA's form beside it."""

from rwkv_jax.typing import Array
from rwkv_jax.wkv import kernels, one_token
from rwkv_jax.wkv.kernels import Form, Kernel
from rwkv_jax.wkv.v7 import chunked
from rwkv_jax.wkv.v7.recurrence import Inputs


def operator(kernel: Kernel, named: bool):
    """`rwkv_jax.wkv.wkv7` by the kernel; on a CPU by XLA's form, unless it was asked for by
    name."""

    def wkv7(x: Inputs, state: Array, reset: Array | None) -> tuple[Array, Array]:
        kernels.check(kernel, "wkv7", named, kernels.refusal(kernel, x, state))
        if x.r.shape[1] == 1 and x.v.shape == x.r.shape:
            return one_token.run(one_token.WKV7, kernel.platform, named, x, (), state, reset)
        return kernels.run(kernel, named, x, (), state, reset)

    return wkv7


def _forward(kernel: Kernel, x: Inputs, shared: tuple, state: Array, reset: Array | None):
    (y, after), entering = chunked.forward(kernels.wide(x), state, reset, kernel.size)
    return (y.astype(x.v.dtype), after), kernels.kept(kernel, x, entering)


def _primal(kernel: Kernel, x: Inputs, shared: tuple, state: Array, reset: Array | None):
    return _forward(kernel, x, shared, state, reset)[0]


def _backward(kernel: Kernel, given: tuple, kept: Array, cotangents: tuple):
    x, _, state, reset = given
    dy, dstate = cotangents
    entering = kernels.entering(kernel, x, kept)
    given, cotangents = (kernels.wide(x), state, reset), (dy.astype(state.dtype), dstate)
    dx, dstate, _ = chunked.backward(given, entering, cotangents, kernel.size)
    return kernels.narrow(dx, x), (), dstate, None


def _reference(x: Inputs, shared: tuple, state: Array, reset: Array | None):
    y, after = chunked.wkv7(kernels.wide(x), state, reset)
    return y.astype(x.v.dtype), after


FORM = Form(_primal, _forward, _backward, _reference)
