"""One token of versions 6 and 7 on an accelerator: the state read and written once.

XLA makes three passes over the state of these steps: what is read, what is removed and what is
written wait for each other. Version 4 has no such step: its own is element-wise, one pass anyway.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from rwkv_jax.typing import Array, Bool, Callable, Float
from rwkv_jax.wkv import mosaic, triton
from rwkv_jax.wkv.gradient import with_gradient
from rwkv_jax.wkv.kernels import on_platform, per_row
from rwkv_jax.wkv.v6 import recurrence as v6_scan
from rwkv_jax.wkv.v7 import recurrence as v7_scan

ROWS = 16
"""Rows of the state a program on a GPU: rows do not mix."""
HEADS = 8
"""Heads a program on a TPU."""


class Step(NamedTuple):
    """A version's step: of rows of a state, and as XLA has it."""

    name: str
    operator: str
    tile: Callable[..., tuple[Array, Array]]
    reference: Callable[..., tuple[Array, Array]]


def tile7(
    state: Float[Array, "m n"],
    v: Float[Array, "m 1"],
    r: Float[Array, "1 n"],
    log_w: Float[Array, "1 n"],
    k: Float[Array, "1 n"],
    a: Float[Array, "1 n"],
    b: Float[Array, "1 n"],
) -> tuple[Float[Array, "m 1"], Float[Array, "m n"]]:
    """`v7.recurrence.step` of some rows: y, and the state after."""
    removed = jnp.sum(state * a, axis=1, keepdims=True)
    state = state * jnp.exp(log_w) + removed * b + v * k
    return jnp.sum(state * r, axis=1, keepdims=True), state


def tile6(
    state: Float[Array, "m n"],
    v: Float[Array, "m 1"],
    r: Float[Array, "1 n"],
    log_w: Float[Array, "1 n"],
    k: Float[Array, "1 n"],
    u: Float[Array, "1 n"],
) -> tuple[Float[Array, "m 1"], Float[Array, "m n"]]:
    """`v6.recurrence.step` of some rows."""
    own = jnp.sum(r * u * k, axis=1, keepdims=True)
    y = jnp.sum(state * r, axis=1, keepdims=True) + own * v
    return y, state * jnp.exp(log_w) + v * k


def _reference7(v, r, log_w, k, a, b, state):
    return v7_scan.step(r, log_w, k, v, a, b, state)


def _reference6(v, r, log_w, k, u, state):
    # u is the same in every row.
    return v6_scan.step(r, log_w, k, v, u[0], state)


WKV6 = Step("wkv6_step", "wkv6", tile6, _reference6)
WKV7 = Step("wkv7_step", "wkv7", tile7, _reference7)


@lru_cache
def step(kind: Step, platform: str, named: bool) -> Callable[..., tuple[Array, Array]]:
    """f(v, *vectors, state) -> (y, the state after), all [b, h, n] but the states [b, h, n, n]; in
    float32. In a program for a CPU it is interpreted if it was `named`, else XLA's step runs."""
    driver = {"cuda": _gpu, "tpu": _tpu}[platform]

    def kernel(interpret: bool, *given: Array) -> tuple[Array, Array]:
        dims = [*["bhn"] * (len(given) - 1), "bhvk"]
        call = partial(driver, kind, interpret)
        y, after = per_row(call, dims, ["bhn", "bhvk"], platform=platform)(*given)
        return y, after

    run = on_platform(platform, named, kernel, kind.reference)

    def backward(given: tuple, kept: None, cotangents: tuple) -> tuple:
        return jax.vjp(kind.reference, *given)[1](cotangents)

    return with_gradient(kind.operator, run, lambda *given: (run(*given), None), backward)


def _gpu(kind: Step, interpret: bool, *given: Array) -> tuple[Array, ...]:
    v, *vectors, state = given
    b, h, n = v.shape
    some = pl.BlockSpec((None, None, ROWS), lambda b, h, i: (b, h, i))
    row = pl.BlockSpec((None, None, n), lambda b, h, i: (b, h, 0))
    rows = pl.BlockSpec((None, None, ROWS, n), lambda b, h, i: (b, h, i, 0))

    def body(v_ref: Any, *refs: Any) -> None:
        *vector_refs, state_ref, y_ref, after_ref = refs
        y, after = kind.tile(
            state_ref[...], v_ref[...][:, None], *(ref[...][None, :] for ref in vector_refs)
        )
        y_ref[...] = jnp.sum(y, axis=1)
        after_ref[...] = after

    specs = [some, *[row] * len(vectors), rows]
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (v, state)]
    aliases = {len(given) - 1: 1}
    grid = (b, h, n // ROWS)
    return triton.call(
        kind.name, body, grid, given, specs, [some, rows], shapes, 1, interpret, aliases
    )


def _tpu(kind: Step, interpret: bool, *given: Array) -> tuple[Array, ...]:
    v, *vectors, state = given
    b, h, n = v.shape
    heads = h if h % HEADS else HEADS
    row = pl.BlockSpec((None, heads, n), lambda b, i: (b, i, 0))
    square = pl.BlockSpec((None, heads, n, n), lambda b, i: (b, i, 0, 0))

    def body(v_ref: Any, *refs: Any) -> None:
        *vector_refs, state_ref, y_ref, after_ref = refs
        square = (n, n)
        diagonal = lax.broadcasted_iota(jnp.int32, square, 0) == lax.broadcasted_iota(
            jnp.int32, square, 1
        )
        for i in range(heads):
            here = slice(i, i + 1)
            # Rows to columns and back, by the diagonal: no lanes change places.
            v = jnp.sum(jnp.where(diagonal, v_ref[here, :], 0.0), axis=1, keepdims=True)
            y, after = kind.tile(state_ref[i], v, *(ref[here, :] for ref in vector_refs))
            y_ref[here, :] = jnp.sum(jnp.where(diagonal, y, 0.0), axis=0, keepdims=True)
            after_ref[i] = after

    specs = [row, *[row] * len(vectors), square]
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (v, state)]
    grid, aliases = (b, h // heads), {len(given) - 1: 1}
    return mosaic.call(
        kind.name, body, grid, given, specs, [row, square], shapes, [], interpret, aliases
    )


def run(
    kind: Step,
    platform: str,
    named: bool,
    x: Any,
    shared: tuple[Array, ...],
    state: Float[Array, "b h v k"],
    reset: Bool[Array, "b 1"] | None,
    initial: Float[Array, "h v k"] | None = None,
) -> tuple[Float[Array, "b 1 h v"], Float[Array, "b h v k"]]:
    """A version's inputs of one token [b, 1, h, n], which a document may start."""
    if reset is not None:
        fresh = jnp.zeros_like(state) if initial is None else initial[None]
        state = jnp.where(reset[:, :, None, None], fresh, state)
    vectors = [z[:, 0] for name, z in x._asdict().items() if name != "v"]
    vectors += [jnp.broadcast_to(u, vectors[0].shape) for u in shared]
    given = (z.astype(jnp.float32) for z in (x.v[:, 0], *vectors))
    y, after = step(kind, platform, named)(*given, state)
    return y[:, None].astype(x.v.dtype), after
