"""The chunk of RWKV-5 and 6 on TPUs, forward and backward, heads side by side in the lanes
(`lanes.py`).

The algebra is that of `v6/algebra.py`: a binary tree of nodes, each with two halves of h tokens. A
level's scores are those of rows in second halves with columns in first halves, both decayed to the
middle. Going up, r of the second half is decayed over the first, k of the first over the second.

All levels have the shape of the chunk: `swap` exchanges the halves of every node, so that a token
has the sum over the other half beside its own. Sums are of float32 on the vector unit, exact, and
never differences of longer ones.
"""

import operator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rwkv_jax.typing import Array
from rwkv_jax.wkv.pallas import heads
from rwkv_jax.wkv.pallas.kernel import Algebra
from rwkv_jax.wkv.pallas.tpu import driver
from rwkv_jax.wkv.pallas.tpu.driver import Chain
from rwkv_jax.wkv.pallas.tpu.lanes import (
    SUBLANES,
    Tile,
    causal,
    each,
    group,
    in_order,
    iota,
    place,
    store,
    wide,
)

LOG_ZERO = -1e3
"""Stands for the log of 0: any sum with it has 0 for its exponential, and no product makes NaN."""


@partial(jax.jit, static_argnums=1)
def swap(x: Array, half: int) -> Array:
    """Rows [C, W] with the halves of every node exchanged: row i is row i ^ half of x."""
    if half >= SUBLANES:
        parts = [x[i : i + half] for i in range(0, x.shape[0], half)]
        return jnp.concatenate([parts[i ^ 1] for i in range(len(parts))], 0)
    # Imported here: only programs for TPUs, and tests, need it.
    from jax.experimental.pallas import tpu

    registers = x.reshape(-1, SUBLANES, x.shape[1])
    up, down = (tpu.roll(registers, n, 1).reshape(x.shape) for n in (SUBLANES - half, half))
    return join(up, down, half)


@partial(jax.jit, static_argnums=2)  # traced once for all chains
def join(first: Array, second: Array, half: int) -> Array:
    """Rows of the first halves of all nodes, and of the second."""
    if half < SUBLANES:
        is_second = place(group(iota(first.shape, 0), half), 2) == 1
        return jnp.where(is_second, second, first)
    starts = range(0, first.shape[0], half)
    return jnp.concatenate([(first, second)[i // half % 2][i : i + half] for i in starts], 0)


class Level(NamedTuple):
    """Nodes of two halves of h tokens."""

    reading: Array  # r, decayed since the start of the token's half [C, W]
    writing: Array  # k, decayed up to the end of the token's half [C, W]
    decay: Array  # over the other half [C, W], float32


class Climbed(NamedTuple):
    """The state-free part of a chunk."""

    levels: list[Level]
    reading: Array  # r, decayed since the start of the chunk [C, W]
    writing: Array  # k, decayed up to its end [C, W]
    total: Array  # the decay over the chunk [1, W]


def climb(tile: Tile, chain: Chain) -> Climbed:
    x = chain.inputs.x
    reading, writing = (wide(ref[...]) for ref in (x.r, x.k))
    log_decay = jnp.maximum(wide(x.log_w[...]), LOG_ZERO)  # over the token's half
    levels, half = [], 1
    while half < tile.size:
        other = swap(log_decay, half)
        decay = jnp.exp(other)
        levels.append(Level(reading.astype(tile.dtype), writing.astype(tile.dtype), decay))
        reading = join(reading, reading * decay, half)
        writing = join(writing * decay, writing, half)
        log_decay, half = log_decay + other, 2 * half
    dtype = tile.dtype
    total = jnp.exp(log_decay[:1])
    return Climbed(levels, reading.astype(dtype), writing.astype(dtype), total)


def apart(tile: Tile) -> Array:
    """[C, columns]: tokens i and j are in the halves of a node of the level l for which
    2^l <= i ^ j < 2^(l + 1); 0 on the diagonal."""
    row, column = (iota((tile.size, tile.columns), axis) for axis in (0, 1))
    return row ^ place(column, tile.size)


def scores(tile: Tile, chain: Chain, c: Climbed, transposed: bool = False) -> Array:
    """A [C, columns], masked; the bonus u is on its diagonal."""
    x, (u,) = chain.inputs.x, chain.inputs.shared
    own = wide(x.r[...]) * wide(u[...])
    left, right = (x.k[...], own) if transposed else (own, x.k[...])
    distance, a = apart(tile), tile.nt(left, tile.spread(right))
    for i, level in enumerate(c.levels):
        left, right = level.reading, level.writing
        left, right = (right, left) if transposed else (left, right)
        a = jnp.where(distance >> i > 0, tile.nt(left, tile.spread(right)), a)
    a = jnp.where(causal(tile, chain.docs, operator.le if transposed else operator.ge), a, 0.0)
    return a.astype(tile.dtype)


def leave(tile: Tile, chain: Chain, c: Climbed, a: Array) -> None:
    out, docs, v = chain.out, chain.docs, chain.inputs.x.v[...].astype(tile.dtype)
    state = chain.state[...]
    if out.entering is not None:
        store(out.entering, state)
    y = docs.seeing(tile.nt(c.reading, tile.spread(state))) + tile.nn(a, tile.spread(v))
    store(out.y, y)
    written = tile.merge(tile.tn(v, docs.reaching(c.writing)), state.shape[0])
    chain.state[...] = state * docs.carried(c.total) + written


def forward(tile: Tile, chains: list[Chain], times: int) -> None:
    c = each(partial(climb, tile), chains)
    a = each(partial(scores, tile), chains, c)
    for now in in_order(times, chains, c, a):
        each(partial(leave, tile), *now)


class Down(NamedTuple):
    """The gradients of a node's tokens, on the way down the tree."""

    dreading: Array  # [C, W]
    dwriting: Array  # [C, W]
    flow: Array  # the log decay's, to be summed over the token's node [C, W]
    rows: Array  # of the scores, masked [C, columns]
    columns: Array  # its transposition


def enter_back(tile: Tile, chain: Chain, c: Climbed, a: Array) -> Down:
    """The gradients of v, of the state that enters, and of the chunk as the largest node."""
    docs, x, dy = chain.docs, chain.inputs.x, chain.inputs.dy[...].astype(tile.dtype)
    v = x.v[...].astype(tile.dtype)
    state, dstate = wide(chain.inputs.entering[...]), chain.state[...]
    total, after = docs.carried(c.total), tile.spread(dstate)
    dv = tile.nn(a, tile.spread(dy)) + tile.nt(docs.reaching(c.writing), after)
    store(chain.out.x.v, dv)
    read = tile.merge(tile.tn(dy, docs.seeing(c.reading)), state.shape[0])
    chain.state[...] = dstate * total + read
    flow = jnp.sum(state * dstate, 0, keepdims=True) * total
    first = iota((tile.size, tile.width), 0) == 0
    return Down(
        docs.seeing(tile.nn(dy, tile.spread(state))),
        docs.reaching(tile.nn(v, after)),
        jnp.where(first, flow, 0.0),
        jnp.where(causal(tile, docs, operator.gt), tile.nt(dy, tile.spread(v)), 0.0),
        jnp.where(causal(tile, docs, operator.lt), tile.nt(v, tile.spread(dy)), 0.0),
    )


def descend(tile: Tile, i: int, c: Climbed, d: Down) -> Down:
    """From the nodes of level i to their halves."""
    level, half = c.levels[i], 1 << i
    dreading = join(d.dreading, d.dreading * level.decay, half)
    dwriting = join(d.dwriting * level.decay, d.dwriting, half)
    # A log decay of a half gets what flows through those of the node, and through the tokens of the
    # other half, which are decayed over it.
    through = join(dwriting * wide(level.writing), dreading * wide(level.reading), half)
    flow = d.flow + swap(d.flow + through, half)
    rows, columns = (jnp.where(apart(tile) >> i == 1, z, 0.0) for z in (d.rows, d.columns))
    return d._replace(
        dreading=dreading + tile.nn(rows, tile.spread(level.writing)),
        dwriting=dwriting + tile.nn(columns, tile.spread(level.reading)),
        flow=flow,
    )


def leave_back(tile: Tile, chain: Chain, d: Down) -> None:
    x, (u,), out = chain.inputs.x, chain.inputs.shared, chain.out
    r, k, v, dy = (wide(z[...]) for z in (x.r, x.k, x.v, chain.inputs.dy))
    head = tile.spread(jnp.ones((tile.width // tile.heads, tile.width)))
    own = tile.nn(dy * v, head)  # of A's diagonal, in all lanes of a head
    u = wide(u[...])
    store(out.x.r, d.dreading + own * u * k)
    store(out.x.k, d.dwriting + own * u * r)
    store(out.x.log_w, d.flow)
    (du,) = out.shared
    du[...] += jnp.sum(own * r * k, 0, keepdims=True)


def backward(tile: Tile, chains: list[Chain], times: int) -> None:
    c = each(partial(climb, tile), chains)
    a = each(partial(scores, tile, transposed=True), chains, c)
    for now, c_now, a_now in in_order(times, chains, c, a):
        d = each(partial(enter_back, tile), now, c_now, a_now)
        for i in reversed(range(len(c_now[0].levels))):
            d = each(partial(descend, tile, i), c_now, d)
        each(partial(leave_back, tile), now, d)


ALGEBRA = Algebra("wkv6", forward, backward, heads.segment_counts)
DRIVER = driver.driver(4)
