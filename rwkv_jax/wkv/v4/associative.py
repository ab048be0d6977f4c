"""RWKV-4's WKV with all chunks swept at once and their summaries combined by
`lax.associative_scan`: depth 2 C + log(T / C).

Sweep 1 starts every chunk from the empty state and yields its summary. Combining the summaries
gives the state that enters each chunk. Sweep 2 starts from those states and emits y. The backward
pass does the same in reverse. The algebra is in `sweeps.py`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array, Float, Shaped
from rwkv_jax.wkv.chunks import chunk_size
from rwkv_jax.wkv.form import Starts
from rwkv_jax.wkv.gradient import outputs_of, with_gradient
from rwkv_jax.wkv.v4 import sweeps
from rwkv_jax.wkv.v4.recurrence import LOG_ZERO, Inputs, Wkv4State, blend
from rwkv_jax.wkv.v4.sweeps import SweptBack, Tokens

CHUNK = 64


def side_by_side(x: Shaped[Array, "b chunks C c"]) -> Shaped[Array, "C b chunks c"]:
    return x.transpose(2, 0, 1, 3)


def chunks_first(x: Array) -> Array:
    """[b, chunks, c] -> [chunks, b, c], and back."""
    return x.swapaxes(0, 1)


def merge_chunks(x: Float[Array, "C b chunks c"], t: int) -> Float[Array, "b t c"]:
    """The inverse of `split_chunks` and `side_by_side`, for `t` tokens."""
    size, b, chunks, c = x.shape
    return x.transpose(1, 2, 0, 3).reshape(b, chunks * size, c)[:, :t]


def combine(first: Wkv4State, decay: Array, second: Wkv4State) -> Wkv4State:
    """`first` decayed by e^decay, plus `second`."""
    top, old, new = blend(first.max_exp + decay, second.max_exp)
    return Wkv4State(old * first.num + new * second.num, old * first.den + new * second.den, top)


def compose(
    first: tuple[Array, Wkv4State], second: tuple[Array, Wkv4State]
) -> tuple[Array, Wkv4State]:
    """The map `first`, then `second`; a map is a log decay and the sums added after it."""
    # Sums of log 0 would end in -inf.
    return jnp.maximum(first[0] + second[0], LOG_ZERO), combine(first[1], *second)


def decay_over(log_w: Array, steps: Array | int, restarts: Array | None) -> Array:
    """The log decay over `steps` tokens; log 0 where a document starts among them."""
    decay = jnp.where(steps == 0, 0, steps * log_w)  # 0 * -inf would be NaN
    return decay if restarts is None else jnp.where(restarts, LOG_ZERO, decay)


def total_decay(log_w: Array, x: Tokens) -> Float[Array, "b chunks c"]:
    """The log decay over each whole chunk."""
    size, b, chunks, c = x.k.shape
    count = jnp.full((b, chunks, 1), size, log_w.dtype)
    if x.padding is not None:
        count = count - jnp.sum(x.padding, axis=0, dtype=log_w.dtype)
    restarts = None if x.starts is None else jnp.any(x.starts, axis=0)
    return jnp.broadcast_to(decay_over(log_w[None, None, :], count, restarts), (b, chunks, c))


def join(
    decay: Array, added: Wkv4State, start: Wkv4State, reverse: bool = False
) -> tuple[Wkv4State, Wkv4State]:
    """The state that enters each chunk [b, chunks, c], and the one that leaves the last; with
    `reverse`, chunks are entered from their end and the last is the first in time."""
    start = jax.tree.map(lambda x: x[:, None], start)
    # In reverse, `compose` gets the map that is later in time first: the order of the sweep.
    total, prefix = lax.associative_scan(compose, (decay, added), axis=1, reverse=reverse)
    after = combine(start, total, prefix)
    if reverse:
        entering = jax.tree.map(lambda s, x: jnp.concatenate([x[:, 1:], s], 1), start, after)
        return entering, jax.tree.map(lambda x: x[:, 0], after)
    entering = jax.tree.map(lambda s, x: jnp.concatenate([s, x[:, :-1]], 1), start, after)
    return entering, jax.tree.map(lambda x: x[:, -1], after)


def forward(
    x: Inputs, state: Wkv4State, reset: Starts
) -> tuple[tuple[Array, Wkv4State], Wkv4State]:
    """(`y`, the state after), and the states that enter the chunks, as in `chunked.py`."""
    t = x.k.shape[1]
    size = chunk_size(CHUNK, t)
    chunks = jax.tree.map(side_by_side, sweeps.tokens(x.k, x.v, reset, x.mask, size))

    def step(state: Wkv4State, token: Tokens) -> tuple[Wkv4State, None]:
        return sweeps.advance(sweeps.meet(state, token), token, x.log_w), None

    added, _ = lax.scan(step, Wkv4State.empty(chunks.k.shape[1:], x.k.dtype), chunks)
    entering, last = join(total_decay(x.log_w, chunks), added, state)
    y = merge_chunks(sweeps.sweep(x.log_w, x.u, chunks, entering)[1], t)
    return (y, last), jax.tree.map(chunks_first, entering)


def backward(
    args: tuple[Inputs, Wkv4State, Array | None],
    residuals: tuple[tuple[Array, Wkv4State], Wkv4State],
    cotangents: tuple[Array, Wkv4State],
) -> tuple[Inputs, Wkv4State, None]:
    """Gradients of the arguments of `forward`, from those of `y` and the state after."""
    x, state, reset = args
    (y, last), entering = residuals
    entering = jax.tree.map(chunks_first, entering)
    dy, dlast = cotangents
    t = x.k.shape[1]
    size = chunk_size(CHUNK, t)
    chunks = jax.tree.map(side_by_side, sweeps.tokens(x.k, x.v, reset, x.mask, size))
    y, dy = (side_by_side(sweeps.split_chunks(z, size)) for z in (y, dy))
    reading = sweeps.readings(x.log_w, x.u, chunks, dy, entering)

    def step(grad: Wkv4State, inputs: tuple) -> tuple[Wkv4State, None]:
        token, y, reading = inputs
        return sweeps.retreat(grad, token, y, reading, x.log_w), None

    empty = Wkv4State.empty(chunks.k.shape[1:], x.k.dtype)
    added, _ = lax.scan(step, empty, (chunks, y, reading), reverse=True)
    decay = total_decay(x.log_w, chunks)
    leaving, first = join(decay, added, sweeps.gradient_of_sums(dlast, last), reverse=True)

    after = SweptBack(leaving, jnp.zeros_like(empty.num), jnp.zeros_like(empty.num))
    before, gradients = sweeps.sweep_back(x.log_w, chunks, y, reading, after)
    dk, dv = map(partial(merge_chunks, t=t), gradients)
    dx = Inputs(jnp.sum(before.log_w, (0, 1)), dk, dv, jnp.sum(before.u, (0, 1)))
    return dx, sweeps.gradient_of_state(first, state), None


wkv4 = with_gradient(outputs_of(forward), forward, backward, keeps_outputs=True)
"""The form by an associative scan over chunks of 64 tokens."""
