"""What `implementation=None` is: for device, length and head size, the fastest form measured.

On a CPU (`python -m benchmarks.forms`, whose table is in docs/operators.md):

    version   no gradient                                       with a gradient
    4         token by token                                    `chunked`
    5, 6      `chunked`; token by token for heads of 32         `chunked`
    7         token by token, the state read once a token       `chunked`

On a GPU or TPU it is the kernel, `pallas_gpu` or `pallas_tpu`: the only form that reads each token
once, while XLA's write each intermediate result to memory (docs/kernels.md; not measured yet).
Where there is no kernel, one line in the log says why, and XLA's form runs: `chunked`, and for
version 4, whose chunks are as many steps as tokens, `associative`, with two sweeps of one chunk's
tokens.

One token is `scan`, on an accelerator the kernel of one token.

The platform is that of the compiled program, not that of the process: where kernels come into
question, a program for a CPU gets `chunked`. What kernels come into question is known when a
program is traced: those of the mesh that is set, or of this process. So a program compiled ahead of
time has kernels where its mesh is set (`jax.set_mesh`).
"""

from functools import partial

import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array, Bool, Callable, Float
from rwkv_jax.wkv import kernels, tokens
from rwkv_jax.wkv.chunks import transpose
from rwkv_jax.wkv.gradient import outputs_of, with_gradient
from rwkv_jax.wkv.precision import computed
from rwkv_jax.wkv.reverse import reverse_only
from rwkv_jax.wkv.v4 import associative as v4_associative
from rwkv_jax.wkv.v4 import chunked as v4_chunked
from rwkv_jax.wkv.v4 import kernel as v4_kernel
from rwkv_jax.wkv.v4 import pallas_gpu as v4_pallas_gpu
from rwkv_jax.wkv.v4 import pallas_tpu as v4_pallas_tpu
from rwkv_jax.wkv.v4 import recurrence as v4_scan
from rwkv_jax.wkv.v4.recurrence import Wkv4State
from rwkv_jax.wkv.v6 import chunked as v6_chunked
from rwkv_jax.wkv.v6 import kernel as v6_kernel
from rwkv_jax.wkv.v6 import pallas_gpu as v6_pallas_gpu
from rwkv_jax.wkv.v6 import pallas_tpu as v6_pallas_tpu
from rwkv_jax.wkv.v6 import recurrence as v6_scan
from rwkv_jax.wkv.v6.algebra import Heads
from rwkv_jax.wkv.v6.algebra import Inputs as Inputs6
from rwkv_jax.wkv.v7 import chunked as v7_chunked
from rwkv_jax.wkv.v7 import kernel as v7_kernel
from rwkv_jax.wkv.v7 import pallas_gpu as v7_pallas_gpu
from rwkv_jax.wkv.v7 import pallas_tpu as v7_pallas_tpu
from rwkv_jax.wkv.v7 import recurrence as v7_scan
from rwkv_jax.wkv.v7 import tokens as v7_tokens
from rwkv_jax.wkv.v7.algebra import Inputs as Inputs7

KERNELS4 = (v4_pallas_gpu.KERNEL, v4_pallas_tpu.KERNEL)
KERNELS6 = (v6_pallas_gpu.KERNEL, v6_pallas_tpu.KERNEL)
KERNELS7 = (v7_pallas_gpu.KERNEL, v7_pallas_tpu.KERNEL)

SMALL_HEAD = 32
"""Heads of version 6 that are no larger go token by token on a CPU, where no gradient is taken."""


def by_platform(cpu: Callable, default: Callable) -> Callable:
    """`cpu` in programs for a CPU, `default` in all others."""
    return lambda *given: lax.platform_dependent(*given, cpu=cpu, default=default)


def wkv4(
    log_w: Float[Array, " c"],
    k: Float[Array, "b t c"],
    v: Float[Array, "b t c"],
    u: Float[Array, " c"],
    state: Wkv4State,
    reset: Bool[Array, "b t"] | None,
    mask: Bool[Array, "b t"] | None,
) -> tuple[Float[Array, "b t c"], Wkv4State]:
    """`rwkv_jax.wkv.wkv4`."""
    if k.shape[1] == 1:
        return computed(v4_scan.wkv4, v=2)(log_w, k, v, u, state, reset, mask)
    kernel = kernels.chosen("wkv4", KERNELS4, v4_kernel.refusal, state)
    if kernel is not None:
        return v4_kernel.operator(kernel, named=False)(log_w, k, v, u, state, reset, mask)
    log_w, k, v, u, state = reverse_only("wkv4", (log_w, k, v, u, state))
    return computed(_wkv4, v=2)(log_w, k, v, u, state, reset, mask)


_wkv4 = with_gradient(
    by_platform(v4_chunked.without_gradient, outputs_of(v4_associative.forward)),
    by_platform(v4_chunked.forward, v4_associative.forward),
    by_platform(v4_chunked.backward, v4_associative.backward),
    keeps_outputs=True,
)


def wkv6(
    r: Float[Array, "b t h k"],
    log_w: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    u: Float[Array, "h k"],
    state: Float[Array, "b h v k"],
    reset: Bool[Array, "b t"] | None,
    initial: Float[Array, "h v k"] | None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h v k"]]:
    """`rwkv_jax.wkv.wkv6`."""
    given = (r, log_w, k, v, u, state, reset, initial)
    kernel = kernels.chosen("wkv6", KERNELS6, kernels.refusal, Inputs6(r, log_w, k, v), state)
    if kernel is not None:
        return v6_kernel.operator(kernel, named=False)(*given)
    form = _wkv6_small if r.shape[-1] <= SMALL_HEAD else v6_chunked.wkv6
    form = v6_scan.wkv6 if r.shape[1] == 1 else form
    return computed(form, v=3)(*given)


def _wkv6_small(r, log_w, k, v, u, state, reset, initial) -> tuple[Array, Array]:
    x, heads = Inputs6(r, log_w, k, v), Heads.of(u, initial)
    x, heads, state = reverse_only("wkv6", (x, heads, state), v6_chunked.FORWARD_MODE)
    y, after = _wkv6(x, heads, transpose(state), reset)
    return y, transpose(after)


def _wkv6_by_token(
    x: Inputs6, heads: Heads, state: Float[Array, "b h k v"], reset: Bool[Array, "b t"] | None
) -> tuple[Array, Array]:
    initial = None if heads.initial is None else transpose(heads.initial)
    token = partial(v6_scan.token, heads.u, initial)
    y, after = tokens.in_place(token, (tuple(x), reset), transpose(state), jnp.zeros_like(x.v))
    return y, transpose(after)


_wkv6 = with_gradient(
    by_platform(_wkv6_by_token, outputs_of(v6_chunked.forward)),
    v6_chunked.forward,
    v6_chunked.backward,
)


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
    """`rwkv_jax.wkv.wkv7`."""
    x = Inputs7(r, log_w, k, v, a, b)
    kernel = kernels.chosen("wkv7", KERNELS7, kernels.refusal, x, state)
    if kernel is not None:
        return v7_kernel.operator(kernel, named=False)(*x, state, reset)
    form = v7_scan.wkv7 if r.shape[1] == 1 else _without_kernel7
    return computed(form, v=3)(*x, state, reset)


def _without_kernel7(r, log_w, k, v, a, b, state, reset) -> tuple[Array, Array]:
    x, state = reverse_only("wkv7", (Inputs7(r, log_w, k, v, a, b), state), v7_chunked.FORWARD_MODE)
    return _wkv7(x, state, reset)


_wkv7 = with_gradient(
    by_platform(v7_tokens.wkv7, outputs_of(v7_chunked.forward)),
    v7_chunked.forward,
    v7_chunked.backward,
)
