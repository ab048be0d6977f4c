"""One token of versions 6 and 7 on an accelerator: the state read and written once.

XLA makes three passes over the state of these steps, because reading, removing and writing wait for
each other. Version 4 needs no kernel: its step is element-wise, and one pass anyway.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array, Callable, Float
from rwkv_jax.wkv.device import by_platform
from rwkv_jax.wkv.form import Output, Starts, State
from rwkv_jax.wkv.gradient import with_gradient
from rwkv_jax.wkv.pallas.gpu import driver as gpu
from rwkv_jax.wkv.pallas.launch import Axis, launch
from rwkv_jax.wkv.pallas.partition import partitioned
from rwkv_jax.wkv.pallas.tpu import driver as tpu
from rwkv_jax.wkv.v6 import recurrence as v6
from rwkv_jax.wkv.v7 import recurrence as v7

ROWS = 16
"""Rows of a head's state a program, on a GPU: they are independent of each other."""
HEADS = 8
"""Heads a program, on a TPU."""


class Inputs(NamedTuple):
    """The inputs of a step: arrays, the letters of their dimensions, or refs."""

    v: Any
    vectors: Any  # the others of the token, and what all tokens share
    state: Any


class Outputs(NamedTuple):
    """The outputs of a step."""

    y: Any
    after: Any  # the state after the token


LETTERS = Inputs("bhv", "bhk", "bhvk")
OUT_LETTERS = Outputs("bhv", "bhvk")


class Step(NamedTuple):
    """A version's step."""

    operator: str
    tile: Callable[..., tuple[Array, Array]]
    """On rows of a state: (state, v, *vectors) -> (y, the state after)."""
    reference: Callable[..., tuple[Array, Array]]
    """In XLA: (v, *vectors, state) -> (y, the state after)."""


def tile7(
    state: Float[Array, "*h m n"],
    v: Float[Array, "*h m 1"],
    r: Float[Array, "*h 1 n"],
    log_w: Float[Array, "*h 1 n"],
    k: Float[Array, "*h 1 n"],
    a: Float[Array, "*h 1 n"],
    b: Float[Array, "*h 1 n"],
) -> tuple[Float[Array, "*h m 1"], Float[Array, "*h m n"]]:
    """`v7.recurrence.step` on some rows of a state: y, and the rows after."""
    removed = jnp.sum(state * a, axis=-1, keepdims=True)
    state = state * jnp.exp(log_w) + removed * b + v * k
    return jnp.sum(state * r, axis=-1, keepdims=True), state


def tile6(
    state: Float[Array, "*h m n"],
    v: Float[Array, "*h m 1"],
    r: Float[Array, "*h 1 n"],
    log_w: Float[Array, "*h 1 n"],
    k: Float[Array, "*h 1 n"],
    u: Float[Array, "*h 1 n"],
) -> tuple[Float[Array, "*h m 1"], Float[Array, "*h m n"]]:
    """`v6.recurrence.step` on some rows of a state: y, and the rows after."""
    own = jnp.sum(r * u * k, axis=-1, keepdims=True)
    y = jnp.sum(state * r, axis=-1, keepdims=True) + own * v
    return y, state * jnp.exp(log_w) + v * k


WKV6 = Step(
    "wkv6",
    tile6,
    # u is the same in every row.
    lambda v, r, log_w, k, u, state: v6.step(r, log_w, k, v, u[0], state),
)
WKV7 = Step(
    "wkv7",
    tile7,
    lambda v, r, log_w, k, a, b, state: v7.step(r, log_w, k, v, a, b, state),
)


def applies(x: Any) -> bool:
    """Whether `x` is one token of square states."""
    return x.r.shape[1] == 1 and x.v.shape == x.r.shape


def recurrence(step: Step, platform: str, named: bool) -> Callable[..., tuple[Array, Array]]:
    """(v, *vectors, state) -> (y, the state after), all [b, h, n] but the states [b, h, n, n], in
    float32. In programs for a CPU the kernel is interpreted if it was `named`; if not, XLA's step
    runs in those for all other platforms."""
    driver = {"cuda": _gpu, "tpu": _tpu}[platform]

    def kernel(interpret: bool, v: Array, *others: Array) -> tuple[Array, Array]:
        *vectors, state = others
        inputs = Inputs(v, vectors, state)
        run = partial(driver, step, interpret)
        out = partitioned(run, inputs, LETTERS, OUT_LETTERS, lambda h: 1, platform=platform)
        return out.y, out.after

    cpu = {"cpu": partial(kernel, True)} if named else {"default": step.reference}
    run = by_platform(**{platform: partial(kernel, False)}, **cpu)

    def backward(args: tuple, residuals: None, cotangents: tuple) -> tuple:
        return jax.vjp(step.reference, *args)[1](cotangents)

    def forward(*args: Array) -> tuple:
        return run(*args), None

    return with_gradient(run, forward, backward, pushed=step.reference)


def _gpu(step: Step, interpret: bool, inputs: Inputs) -> Outputs:
    def body(inputs: Inputs, out: Outputs) -> None:
        vectors = (ref[...][None, :] for ref in inputs.vectors)
        y, after = step.tile(inputs.state[...], inputs.v[...][:, None], *vectors)
        out.y[...] = jnp.sum(y, axis=1)
        out.after[...] = after

    grid = (Axis({"b": None}), Axis({"h": None}), Axis({"v": ROWS}))
    return _launch(step, body, grid, inputs, gpu.options(1, interpret))


def _tpu(step: Step, interpret: bool, inputs: Inputs) -> Outputs:
    h, n = inputs.v.shape[1:]
    heads = h if h % HEADS else HEADS

    def body(inputs: Inputs, out: Outputs) -> None:
        row, column = (lax.broadcasted_iota(jnp.int32, (heads, n, n), axis) for axis in (1, 2))
        diagonal = row == column
        # Rows to columns and back by the diagonal, which moves nothing across lanes.
        v, *vectors = (ref[...][:, None, :] for ref in (inputs.v, *inputs.vectors))
        v = jnp.sum(jnp.where(diagonal, v, 0.0), axis=-1, keepdims=True)
        y, after = step.tile(inputs.state[...], v, *vectors)
        out.y[...] = jnp.sum(jnp.where(diagonal, y, 0.0), axis=-2)
        out.after[...] = after

    grid = (Axis({"b": None}), Axis({"h": heads}))
    return _launch(step, body, grid, inputs, tpu.options(2, [], interpret))


def _launch(step: Step, body: Callable, grid: tuple, inputs: Inputs, options: dict) -> Outputs:
    """The state is updated in place."""
    outputs = Outputs(
        *(jax.ShapeDtypeStruct(z.shape, jnp.float32) for z in (inputs.v, inputs.state))
    )
    aliases = {len(jax.tree.leaves(inputs)) - 1: 1}
    return launch(
        body,
        f"{step.operator}_step",
        grid,
        (inputs, LETTERS),
        (outputs, OUT_LETTERS),
        input_output_aliases=aliases,
        **options,
    )


def run(
    recurrence: Callable[..., tuple[Array, Array]],
    x: Any,
    shared: tuple[Array, ...],
    state: State,
    reset: Starts,
    initial: Float[Array, "h v k"] | None = None,
) -> tuple[Output, State]:
    """A version's inputs of one token [b, 1, h, n], which may start a document."""
    if reset is not None:
        fresh = jnp.zeros_like(state) if initial is None else initial[None]
        state = jnp.where(reset[:, :, None, None], fresh, state)
    vectors = [z[:, 0] for name, z in x._asdict().items() if name != "v"]
    vectors += [jnp.broadcast_to(u, vectors[0].shape) for u in shared]
    args = (z.astype(jnp.float32) for z in (x.v[:, 0], *vectors))
    y, after = recurrence(*args, state)
    return y[:, None].astype(x.v.dtype), after
