"""What the kernels of versions 5 to 7 share, whose state is a matrix for each head: inputs of any
length in whole chunks, and XLA's passes with the kernel's arguments."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array, Callable, Float
from rwkv_jax.wkv.form import Output, Starts, State
from rwkv_jax.wkv.gradient import outputs_of
from rwkv_jax.wkv.pallas.kernel import Kernel, Passes

SIZES = (16, 32, 64, 128)
"""Channels of a head. On TPUs larger heads do not fit VMEM in float32, and smaller ones take
minutes to compile."""


def unsupported_dtype(x: Any, *names: str) -> str | None:
    """The reason why there is no kernel for inputs of these dtypes, if it takes those named."""
    if odd := sorted({z.dtype.name for z in jax.tree.leaves(x)} - {*names, "bool"}):
        return f"{odd[0]} ({', '.join(names)} are supported)"
    return None


def unsupported(x: Any) -> str | None:
    """The reason why no platform has a kernel for inputs `x`; None if there may be one."""
    n, v = x.k.shape[-1], x.v.shape[-1]
    if v % n:
        return f"values of {v} channels a head for keys of {n}"
    return None if n in SIZES else f"heads of {n} channels (16, 32, 64 and 128 are supported)"


def kept_dtype(x: Any) -> Any:
    """The dtype of the states that are kept for the backward pass. float16 would overflow."""
    return jnp.bfloat16 if x.v.dtype == jnp.bfloat16 else jnp.float32


def segment_counts(reset: Starts, size: int) -> Float[Array, "b chunks C"] | None:
    """How many documents have started in the chunk, up to and including each token."""
    if reset is None:
        return None
    return jnp.cumsum(reset.reshape(reset.shape[0], -1, size).astype(jnp.float32), 2)


def run(
    recurrence: Callable[..., Any],
    size: int,
    x: Any,
    shared: tuple[Array, ...],
    state: State,
    reset: Starts,
) -> tuple[Output, State]:
    """A recurrence of whole chunks and square states, for any length and for values that are a
    multiple of the keys in size."""
    t, n = x.r.shape[1], x.r.shape[3]
    more = -t % size
    if more:
        # Zeros: no decay, nothing written, nothing removed.
        x = jax.tree.map(lambda z: jnp.pad(z, ((0, 0), (0, more), (0, 0), (0, 0))), x)
        reset = None if reset is None else jnp.pad(reset, ((0, 0), (0, more)))
    parts = []
    for start in range(0, x.v.shape[-1], n):
        part = x._replace(v=lax.slice_in_dim(x.v, start, start + n, axis=3))
        entering = lax.slice_in_dim(state, start, start + n, axis=2)
        parts.append(recurrence(part, shared, entering, reset))
    y, after = parts[0]
    if len(parts) > 1:
        ys, states = zip(*parts, strict=True)
        y, after = jnp.concatenate(ys, 3), jnp.concatenate(states, 2)
    return y[:, :t], after


def xla_passes(kernel: Kernel, forward: Callable, backward: Callable) -> Passes:
    """XLA's passes with the arguments and residuals of the kernel's. They are given as
    `forward(*args, size)` and `backward(args, entering, cotangents, size)`, in float32."""

    def widened(args: tuple) -> tuple:
        *inputs, reset = args
        return *jax.tree.map(lambda z: z.astype(jnp.float32), inputs), reset

    def run_forward(*args: Any) -> Any:
        (y, after), entering = forward(*widened(args), kernel.size)
        x = args[0]
        return (y.astype(x.v.dtype), after), kernel.driver.pack(entering, x)

    def run_backward(args: Any, entering: Any, cotangents: Any) -> Any:
        entering = kernel.driver.unpack(entering, args[0])
        dy, dafter = cotangents
        gradients = backward(widened(args), entering, (dy.astype(jnp.float32), dafter), kernel.size)
        return *jax.tree.map(lambda d, z: d.astype(z.dtype), gradients, args[:-1]), None

    return Passes(outputs_of(run_forward), run_forward, run_backward)
