"""RWKV-4's WKV with every chunk swept at once, the chunks' summaries joined by
`lax.associative_scan`: depth 2 C + log(T / C).

Sweep 1 starts every chunk from the empty state and leaves its summary. The summaries are joined,
which gives the state that enters each chunk. Sweep 2 starts from those and emits y. The backward
pass does the same the other way round. The algebra is in `sweeps.py`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array, Bool, Float
from rwkv_jax.wkv.chunks import fit
from rwkv_jax.wkv.gradient import outputs_of, with_gradient
from rwkv_jax.wkv.reverse import reverse_only
from rwkv_jax.wkv.v4.recurrence import LOG_ZERO, Wkv4State, blend
from rwkv_jax.wkv.v4.sweeps import (
    SweptBack,
    Tokens,
    advance,
    arriving,
    cut,
    meet,
    of_state,
    readings,
    retreat,
    sweep,
    sweep_back,
    tokens,
)

CHUNK = 64


def wkv4(
    log_w: Float[Array, " c"],
    k: Float[Array, "b t c"],
    v: Float[Array, "b t c"],
    u: Float[Array, " c"],
    state: Wkv4State,
    reset: Bool[Array, "b t"] | None,
    mask: Bool[Array, "b t"] | None,
) -> tuple[Float[Array, "b t c"], Wkv4State]:
    """`rwkv_jax.wkv.wkv4` by an associative scan over chunks of 64."""
    log_w, k, v, u, state = reverse_only("wkv4", (log_w, k, v, u, state))
    return _over_chunks(log_w, k, v, u, state, reset, mask)


def side_by_side(x: Array) -> Array:
    """[b, chunks, C, c] -> [C, b, chunks, c]."""
    return x.transpose(2, 0, 1, 3)


def chunks_first(x: Array) -> Array:
    """[b, chunks, c] -> [chunks, b, c], and back."""
    return x.swapaxes(0, 1)


def join(x: Float[Array, "C b chunks c"], t: int) -> Float[Array, "b t c"]:
    """The inverse of `cut` and `side_by_side`."""
    size, b, chunks, c = x.shape
    return x.transpose(1, 2, 0, 3).reshape(b, chunks * size, c)[:, :t]


def combine(first: Wkv4State, decay: Array, second: Wkv4State) -> Wkv4State:
    """`first` decayed by e^decay, plus `second`."""
    top, old, new = blend(first.max_exp + decay, second.max_exp)
    return Wkv4State(old * first.num + new * second.num, old * first.den + new * second.den, top)


def compose(
    first: tuple[Array, Wkv4State], second: tuple[Array, Wkv4State]
) -> tuple[Array, Wkv4State]:
    """`first`, then `second`: a log decay each, and what is added after it."""
    # Sums of log 0 would end in -inf.
    return jnp.maximum(first[0] + second[0], LOG_ZERO), combine(first[1], *second)


def part_decay(log_w: Array, steps: Array | int, begun: Array | None) -> Array:
    """The log decay over so many tokens; log 0 where a document starts among them."""
    decay = jnp.where(steps == 0, 0, steps * log_w)  # of log 0 too
    return decay if begun is None else jnp.where(begun, LOG_ZERO, decay)


def total_decay(log_w: Array, x: Tokens) -> Float[Array, "b chunks c"]:
    """The log decay over each whole chunk."""
    size, b, chunks, c = x.k.shape
    count = jnp.full((b, chunks, 1), size, log_w.dtype)
    if x.padding is not None:
        count = count - jnp.sum(x.padding, axis=0, dtype=log_w.dtype)
    begun = None if x.starts is None else jnp.any(x.starts, axis=0)
    return jnp.broadcast_to(part_decay(log_w[None, None, :], count, begun), (b, chunks, c))


def joined(
    decay: Array, parts: Wkv4State, start: Wkv4State, reverse: bool = False
) -> tuple[Wkv4State, Wkv4State]:
    """The state that enters each chunk [b, chunks, c] from its side, and the one after the last."""
    start = jax.tree.map(lambda x: x[:, None], start)
    # Reversed, JAX hands over what comes later in time first: the order of sweeping, as it is here.
    total, prefix = lax.associative_scan(compose, (decay, parts), axis=1, reverse=reverse)
    after = combine(start, total, prefix)
    if reverse:
        entering = jax.tree.map(lambda s, x: jnp.concatenate([x[:, 1:], s], 1), start, after)
        return entering, jax.tree.map(lambda x: x[:, 0], after)
    entering = jax.tree.map(lambda s, x: jnp.concatenate([s, x[:, :-1]], 1), start, after)
    return entering, jax.tree.map(lambda x: x[:, -1], after)


def forward(log_w, k, v, u, state, reset, mask):
    """(`y`, the state after), and the states that enter the chunks, as in `chunked`."""
    size = fit(CHUNK, k.shape[1])
    x = jax.tree.map(side_by_side, tokens(k, v, reset, mask, size))

    def step(state: Wkv4State, token: Tokens) -> tuple[Wkv4State, None]:
        return advance(meet(state, token), token, log_w), None

    parts, _ = lax.scan(step, Wkv4State.empty(x.k.shape[1:], k.dtype), x)
    entering, last = joined(total_decay(log_w, x), parts, state)
    y = join(sweep(log_w, u, x, entering)[1], k.shape[1])
    return (y, last), jax.tree.map(chunks_first, entering)


def backward(given, kept, cotangents):
    """Gradients of what `forward` was given, from those of `y` and the state after."""
    log_w, k, v, u, state, reset, mask = given
    (y, last), entering = kept
    entering = jax.tree.map(chunks_first, entering)
    dy, dlast = cotangents
    size = fit(CHUNK, k.shape[1])
    x = jax.tree.map(side_by_side, tokens(k, v, reset, mask, size))
    y, dy = (side_by_side(cut(z, size)) for z in (y, dy))
    reading = readings(log_w, u, x, dy, entering)

    def step(grad: Wkv4State, inputs: tuple) -> tuple[Wkv4State, None]:
        token, y, reading = inputs
        return retreat(grad, token, y, reading, log_w), None

    empty = Wkv4State.empty(x.k.shape[1:], k.dtype)
    parts, _ = lax.scan(step, empty, (x, y, reading), reverse=True)
    leaving, first = joined(total_decay(log_w, x), parts, arriving(dlast, last), reverse=True)
    ends = jax.tree.map(lambda e, s: jnp.concatenate([e[:, 1:], s[:, None]], 1), entering, last)

    after = SweptBack(leaving, jnp.zeros_like(empty.num), jnp.zeros_like(empty.num))
    before, gradients = sweep_back(log_w, x, y, reading, ends, after)
    dk, dv = map(partial(join, t=k.shape[1]), gradients)
    dlog_w, du = jnp.sum(before.log_w, (0, 1)), jnp.sum(before.u, (0, 1))
    return dlog_w, dk, dv, du, of_state(first, state), None, None


_over_chunks = with_gradient(outputs_of(forward), forward, backward, keeps_outputs=True)
