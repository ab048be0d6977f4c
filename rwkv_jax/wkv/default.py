"""What `implementation=None` runs: the form measured to be the fastest for the device, the length
and the head size.

On a CPU (`python -m benchmarks.forms`, whose table is in docs/operators.md):

    version   no gradient                                       with a gradient
    4         token by token                                    `chunked`
    5, 6      `chunked`; token by token for heads of 32         `chunked`
    7         token by token, the state read once a token       `chunked`

On a GPU or TPU it is the kernel, `pallas_gpu` or `pallas_tpu`: the only form that reads each token
once, whereas XLA's forms write each intermediate result to memory (docs/kernels.md; not measured
yet). Where no kernel supports the inputs, the log says so in one line and XLA's form runs:
`chunked`, or `associative` for version 4, whose chunks in order would take as many steps as there
are tokens.

A single token is `scan`, on an accelerator the kernel of one token.

The choice follows the platform that a program is compiled for, not that of the process. Which
kernels are available is known when the program is traced, from the mesh in context or the devices
of this process: to get kernels in a program compiled ahead of time, set its mesh
(`jax.set_mesh`).
"""

from typing import Any

from rwkv_jax.typing import Array, Float
from rwkv_jax.wkv import pallas
from rwkv_jax.wkv.chunks import transpose
from rwkv_jax.wkv.device import by_platform
from rwkv_jax.wkv.form import Form, Output, Starts, State
from rwkv_jax.wkv.gradient import outputs_of, with_gradient
from rwkv_jax.wkv.v4 import associative as v4_associative
from rwkv_jax.wkv.v4 import chunked as v4_chunked
from rwkv_jax.wkv.v4 import recurrence as v4
from rwkv_jax.wkv.v6 import chunked as v6_chunked
from rwkv_jax.wkv.v6 import recurrence as v6
from rwkv_jax.wkv.v7 import chunked as v7_chunked
from rwkv_jax.wkv.v7 import recurrence as v7

SMALL_HEAD = 32
"""Heads of version 6 up to this size go token by token on a CPU, where no gradient is taken."""


def choose(operator: str, x: Any, state: Any) -> tuple[Form, bool]:
    """The form of "wkv4", "wkv6" or "wkv7" for these inputs, and whether it is a kernel."""
    single = x.k.shape[1] == 1
    # One token of version 4 is element-wise, one pass in XLA: it has no kernel.
    kernel = None if single and operator == "wkv4" else pallas.select(operator, x, state)
    if kernel is not None:
        return kernel, True
    scan, form = _XLA[operator]
    return scan if single else form, False


wkv4 = with_gradient(
    by_platform(cpu=v4.in_place, default=outputs_of(v4_associative.forward)),
    by_platform(cpu=v4_chunked.forward, default=v4_associative.forward),
    by_platform(cpu=v4_chunked.backward, default=v4_associative.backward),
    keeps_outputs=True,
)


def _in_place6(
    x: v6.Tokens, heads: v6.Heads, state: Float[Array, "b h k v"], reset: Array | None
) -> tuple[Array, Array]:
    initial = None if heads.initial is None else transpose(heads.initial)
    y, after = v6.in_place(v6.Inputs(*x, heads.u, initial), transpose(state), reset)
    return y, transpose(after)


_small6 = with_gradient(
    by_platform(cpu=_in_place6, default=outputs_of(v6_chunked.forward)),
    v6_chunked.forward,
    v6_chunked.backward,
)


def wkv6(x: v6.Inputs, state: State, reset: Starts) -> tuple[Output, State]:
    """By chunks; small heads token by token where no gradient is taken."""
    if x.r.shape[-1] > SMALL_HEAD:
        return v6_chunked.wkv6(x, state, reset)
    y, after = _small6(x.tokens, x.heads, transpose(state), reset)
    return y, transpose(after)


_wkv7 = with_gradient(
    by_platform(cpu=v7.in_place, default=outputs_of(v7_chunked.forward)),
    v7_chunked.forward,
    v7_chunked.backward,
)


def wkv7(x: v7.Inputs, state: State, reset: Starts) -> tuple[Output, State]:
    """By chunks; on a CPU token by token where no gradient is taken."""
    return _wkv7(x.tokens, x.initial, state, reset)


_XLA: dict[str, tuple[Form, Form]] = {
    "wkv4": (v4.scan, wkv4),
    "wkv6": (v6.scan, wkv6),
    "wkv7": (v7.scan, wkv7),
}
"""The form for a single token, and the one for longer inputs."""
