"""What the kernels of RWKV-7 share: the operator around one, and XLA's form beside it."""

from rwkv_jax.typing import Array, Bool, Float
from rwkv_jax.wkv import kernels, one_token
from rwkv_jax.wkv.kernels import Form, Kernel
from rwkv_jax.wkv.reverse import reverse_only
from rwkv_jax.wkv.v7 import chunked
from rwkv_jax.wkv.v7.algebra import Inputs


def operator(kernel: Kernel, named: bool):
    """`rwkv_jax.wkv.wkv7` by the kernel; on a CPU by XLA's form, unless it was asked for by
    name."""

    def wkv7(
        r: Float[Array, "b t h k"],
        log_w: Float[Array, "b t h k"],
        k: Float[Array, "b t h k"],
        v: Float[Array, "b t h v"],
        a: Float[Array, "b t h k"],
        b: Float[Array, "b t h k"],
        state: Float[Array, "b h v k"],
        reset: Bool[Array, "b t"] | None,
    ) -> tuple[Float[Array, "b t h v"], Float[Array, "b h v k"]]:
        x, state = reverse_only("wkv7", (Inputs(r, log_w, k, v, a, b), state), chunked.FORWARD_MODE)
        kernels.check(kernel, "wkv7", named, kernels.refusal(kernel, x, state))
        if r.shape[1] == 1 and v.shape == r.shape:
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
    y, after = chunked.wkv7(*kernels.wide(x), state=state, reset=reset)
    return y.astype(x.v.dtype), after


FORM = Form(_primal, _forward, _backward, _reference)
