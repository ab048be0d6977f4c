"""RWKV-7's WKV for decays of any strength.

The factors that a chunk splits its decays into overflow where these are strong (`algebra.py`).
Sequences with such a token are computed token by token, decided when the program runs.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from rwkv_jax.remat import rematerialise
from rwkv_jax.typing import Array, Bool, Float
from rwkv_jax.wkv.chunks import DocumentIds, scan_chunks, scan_chunks_back
from rwkv_jax.wkv.form import Form, Output, Starts, State, in_compute_dtype
from rwkv_jax.wkv.gradient import outputs_of, with_gradient
from rwkv_jax.wkv.v7 import recurrence
from rwkv_jax.wkv.v7.chunked import CHUNK
from rwkv_jax.wkv.v7.recurrence import Inputs, Tokens

STRONGEST = -1.0
"""The least log decay of a token that all forms in chunks, of up to 64 tokens, can compute: their
factors are up to e^32, and the products of these, of which only those that are at most 1 count, up
to e^64. The model's own are above -0.61."""


def for_any_decay(form: Form) -> Form:
    """`form`, or where a decay is stronger than `STRONGEST`, `by_tokens`."""
    if form is recurrence.scan:
        return form

    def run(x: Inputs, state: State, reset: Starts) -> tuple[Output, State]:
        mild = is_mild(lax.stop_gradient(x.log_w))
        return lax.cond(mild, form, in_compute_dtype(by_tokens), x, state, reset)

    # Of a `cond`, JAX keeps what the gradient of either branch needs: copies of all inputs, too.
    return rematerialise(run, "wkv", prevent_cse=True)


@custom_vmap
def is_mild(log_w: Float[Array, "..."]) -> Bool[Array, ""]:
    return jnp.all(log_w >= STRONGEST)


@is_mild.def_vmap
def _(size, batched, log_w):
    # One answer for all: a `cond` with several is computed by both branches.
    return is_mild(log_w), False


def chunk(
    x: Tokens, initial: Float[Array, "h v k"] | None, ids: DocumentIds | None, state: Array
) -> tuple[Array, Array]:
    """`y` of one chunk [b, h, C, n] and the state after it, token by token."""
    starts = None
    if ids is not None:
        before = jnp.concatenate([ids.before, ids.tokens[:, :-1]], 1)
        starts = ids.tokens != before
    tokens = (z.swapaxes(1, 2) for z in x)
    y, after = recurrence.scan(Inputs(*tokens, initial=initial), state, starts)
    return y.swapaxes(1, 2), after


def forward(
    x: Tokens, initial: Float[Array, "h v k"] | None, state: State, reset: Starts
) -> tuple[tuple[Array, Array], Array]:
    """(`y`, the state after), and the states that enter the chunks."""
    run = lambda x, ids, state: chunk(x, initial, ids, state)  # noqa: E731
    return scan_chunks(run, x, state, reset, CHUNK)


def backward(
    args: tuple[Tokens, Array | None, Array, Array | None],
    entering: Float[Array, "chunks b h v k"],
    cotangents: tuple[Array, Array],
) -> tuple[Tokens, Array | None, Array, None]:
    """Gradients of the arguments of `forward`, from those of `y` and the state after."""
    x, initial, _, reset = args

    def back(x: Tokens, ids: DocumentIds | None, state: Array, dy: Array, dstate: Array) -> tuple:
        run = lambda x, initial, state: chunk(x, initial, ids, state)  # noqa: E731
        return jax.vjp(run, x, initial, state)[1]((dy, dstate))

    return *scan_chunks_back(back, x, initial, reset, entering, cotangents, CHUNK), None


_by_tokens = with_gradient(outputs_of(forward), forward, backward)


def by_tokens(x: Inputs, state: State, reset: Starts) -> tuple[Output, State]:
    """The definition, whose gradient keeps one state a chunk."""
    return _by_tokens(x.tokens, x.initial, state, reset)
