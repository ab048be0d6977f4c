"""RWKV-7's chunk on TPUs, forward and backward, heads side by side in the lanes (`lanes.py`).

The algebra and its letters are those of `v7/algebra.py`. With left = [a; r] and right = [b; k]:

    [A_ab; A_rb] = left spread(b)^T      [A_ak; A_rk] = left spread(k)^T      masked
    (I - A_ab) U = a S^T + A_ak V
    Y  = r S^T + A_rb U + A_rk V
    S' = S + [U; V]^T right

The triangle is not inverted as a whole. Its diagonal blocks of 16 rows are: element by element, in
float32 on the vector unit, the blocks of all heads side by side. U follows block by block, from
products with the blocks before it. A finished block is rounded once, and later ones see what was
rounded; nothing is formed that is not an entry of the result, so that no error grows.
"""

import operator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rwkv_jax.typing import Array
from rwkv_jax.wkv.pallas import heads
from rwkv_jax.wkv.pallas.kernel import Algebra
from rwkv_jax.wkv.pallas.tpu import driver
from rwkv_jax.wkv.pallas.tpu.driver import Chain
from rwkv_jax.wkv.pallas.tpu.lanes import (
    LANES,
    SUBLANES,
    Tile,
    causal,
    each,
    group,
    in_order,
    iota,
    place,
    split,
    store,
    wide,
)


class Kept(NamedTuple):
    """What is kept of a forward pass for its gradient."""

    states: Any  # that enter the chunks
    removed: Any  # U, like v


def pack(entering: Array, x: Any) -> Kept:
    return Kept(driver.pack(entering, x), jnp.zeros(x.v.shape, driver.operand_dtype(x)))


def unpack(entering: Kept, x: Any) -> Array:
    return driver.unpack(entering.states, x)


BLOCK = 2 * SUBLANES
"""Rows of the diagonal blocks that are inverted."""


class Scaled(NamedTuple):
    """A chunk's tokens, decayed relative to its middle."""

    exponent: Array  # g - m [C, W]
    left: Array  # a; r [2C, W]
    right: Array  # b; k [2C, W]
    enter: Array  # e^m [1, W]
    leave: Array  # e^{g_C - m} [1, W]


def scale(tile: Tile, chain: Chain) -> Scaled:
    c, x, docs = tile.size, chain.inputs.x, chain.docs
    log_w = wide(x.log_w[...])
    upto = docs.within(iota((c, 2 * c), 0) >= place(iota((c, 2 * c), 1), c))
    upto = jnp.where(upto, 1.0, 0.0)
    if docs.same is None:
        g = tile.sums(upto, log_w)
        m = g[c - 1 :] * 0.5
    else:
        # Over each document's own tokens, so that no document's rounding depends on another.
        half = jnp.where(docs.same[:, : 2 * c], 0.5, 0.0)
        both = tile.sums(jnp.concatenate([upto, half], 0), log_w)
        g, m = both[:c], both[c:]
    d = g - m
    a, r, b, k = (wide(ref[...]) for ref in (x.a, x.r, x.b, x.k))
    rise = jnp.exp(-d)
    left = jnp.concatenate([a * jnp.exp(d - log_w), r * jnp.exp(d)], 0)
    right = jnp.concatenate([b * rise, k * rise], 0)
    enter, leave = jnp.exp(m[:1]), jnp.exp(d[c - 1 :])
    return Scaled(d, left.astype(tile.dtype), right.astype(tile.dtype), enter, leave)


class Scores(NamedTuple):
    """A, masked [C, columns]; in the backward pass, its transposition."""

    ab: Array  # in float32
    ak: Array
    rb: Array
    rk: Array


def relate(tile: Tile, chain: Chain, s: Scaled) -> Scores:
    c = tile.size
    before = causal(tile, chain.docs, operator.gt)
    upto = causal(tile, chain.docs, operator.ge)
    b, k = (tile.nt(s.left, tile.spread(z)) for z in (s.right[:c], s.right[c:]))
    ab, ak = (jnp.where(before, z[:c], 0.0) for z in (b, k))
    rb, rk = (jnp.where(upto, z[c:], 0.0) for z in (b, k))
    return Scores(ab, *(z.astype(tile.dtype) for z in (ak, rb, rk)))


def relate_transposed(tile: Tile, chain: Chain, s: Scaled) -> Scores:
    c = tile.size
    after = causal(tile, chain.docs, operator.lt)
    since = causal(tile, chain.docs, operator.le)
    a, r = (tile.nt(s.right, tile.spread(z)) for z in (s.left[:c], s.left[c:]))
    ab, ak = (jnp.where(after, z, 0.0) for z in (a[:c], a[c:]))
    rb, rk = (jnp.where(since, z, 0.0) for z in (r[:c], r[c:]))
    return Scores(ab, *(z.astype(tile.dtype) for z in (ak, rb, rk)))


def invert_blocks(a: Array, size: int, upper: bool = False) -> Array:
    """(I - A)^-1 of the diagonal blocks of a strict triangle [C, columns], side by side as A's
    columns are [16, columns].

    Rows that are done are added to the others one after the other, from the first (for an upper
    triangle: the last): inverse += A[:, j] inverse[j].
    """
    groups = [_invert_group(a[:, i : i + LANES], size, upper) for i in range(0, a.shape[1], LANES)]
    return groups[0] if len(groups) == 1 else jnp.concatenate(groups, 1)


@partial(jax.jit, static_argnums=(1, 2))
def _invert_group(a: Array, size: int, upper: bool) -> Array:
    lane = iota((BLOCK, LANES), 1)
    blocks = a[:BLOCK]
    for i in range(1, size // BLOCK):
        mine = group(place(lane, size), BLOCK) == i
        blocks = jnp.where(mine, a[i * BLOCK : (i + 1) * BLOCK], blocks)
    one = jnp.where(iota((BLOCK, LANES), 0) == place(lane, BLOCK), 1.0, 0.0)
    parts, inverse = ([z[:SUBLANES], z[SUBLANES:]] for z in (blocks, one))  # registers
    first = lane[:SUBLANES] & -BLOCK
    for j in reversed(range(1, BLOCK)) if upper else range(BLOCK - 1):
        row = inverse[j // SUBLANES][j % SUBLANES : j % SUBLANES + 1]
        left = range((j - 1) // SUBLANES + 1) if upper else range((j + 1) // SUBLANES, 2)
        for i in left:
            column = jnp.take_along_axis(parts[i], first + j, 1, mode="promise_in_bounds")
            inverse[i] = inverse[i] + column * row
    return jnp.concatenate(inverse, 0)


def solve(
    tile: Tile, a: list[Array], rhs: list[Array], inverse: list[Array], upper: bool = False
) -> list[Array]:
    """U of (I - A) U = rhs [C, W] for every chain, from the inverses of A's diagonal blocks."""
    count = tile.size // BLOCK
    done = [[jnp.zeros((BLOCK, tile.width), tile.dtype)] * count for _ in a]
    order = range(count)[::-1] if upper else range(count)
    for i in order:
        mine = [z[i * BLOCK : (i + 1) * BLOCK] for z in rhs]
        if i != order[0]:
            mine = each(partial(_substitute, tile, i), a, mine, done)
        solved = each(partial(_solve_block, tile, i), inverse, mine)
        for blocks, u in zip(done, solved, strict=True):
            blocks[i] = u
    return each(lambda blocks: jnp.concatenate(blocks, 0), done)


@partial(jax.jit, static_argnums=(0, 1))
def _substitute(tile: Tile, i: int, a: Array, rhs: Array, done: list[Array]) -> Array:
    """Block i of the right-hand side with what is known of U; A is in two terms."""
    a, u = a[i * BLOCK : (i + 1) * BLOCK], tile.spread(jnp.concatenate(done, 0))
    if tile.dtype == jnp.float32:
        return rhs + tile.nn(a, u)
    terms = tile.nn(jnp.concatenate(split(a), 0), u)
    return rhs + (terms[:BLOCK] + terms[BLOCK:])


@partial(jax.jit, static_argnums=(0, 1))
def _solve_block(tile: Tile, i: int, inverse: Array, rhs: Array) -> Array:
    """Block i of U; the inverse and the right-hand side are in two terms."""

    def weights(x: Array) -> Array:
        return tile.spread(x, i * BLOCK, tile.size)

    if tile.dtype == jnp.float32:
        return tile.nn(inverse, weights(rhs))
    (t, t_low), (x, x_low) = split(inverse), split(rhs)
    terms = tile.nn(jnp.concatenate([t, t_low], 0), weights(x))
    return (terms[:BLOCK] + (terms[BLOCK:] + tile.nn(t, weights(x_low)))).astype(tile.dtype)


class Entered(NamedTuple):
    """A chunk with its state."""

    sm: Array  # S e^m [v, W]
    read: Array  # what its rows read of it, a; r [2C, W]
    rhs: Array  # of the equation of U [C, W]


def enter(tile: Tile, chain: Chain, s: Scaled, a: Scores) -> Entered:
    state = chain.state[...]
    if chain.out.entering is not None:
        store(chain.out.entering.states, state)
    sm = state * s.enter
    read = chain.docs.seeing(tile.nt(s.left, tile.spread(sm)))
    v = tile.spread(chain.inputs.x.v[...])
    return Entered(sm, read, read[: tile.size] + tile.nn(a.ak, v))


def leave(tile: Tile, chain: Chain, s: Scaled, a: Scores, e: Entered, u: Array) -> None:
    v, out = chain.inputs.x.v[...].astype(tile.dtype), chain.out
    y = e.read[tile.size :] + (tile.nn(a.rb, tile.spread(u)) + tile.nn(a.rk, tile.spread(v)))
    store(out.y, y)
    if out.entering is not None:
        out.entering.removed[...] = u
    written = tile.tn(jnp.concatenate([u, v], 0), chain.docs.reaching(s.right))
    kept = chain.docs.carried(e.sm)
    chain.state[...] = (kept + tile.merge(written, kept.shape[0])) * s.leave


def forward(tile: Tile, chains: list[Chain], times: int) -> None:
    s = each(partial(scale, tile), chains)
    a = each(partial(relate, tile), chains, s)
    inverse = [invert_blocks(z.ab, tile.size) for z in a]
    for now, s_now, a_now, inverse_now in in_order(times, chains, s, a, inverse):
        e = each(partial(enter, tile), now, s_now, a_now)
        u = solve(tile, [z.ab for z in a_now], [z.rhs for z in e], inverse_now)
        each(partial(leave, tile), now, s_now, a_now, e, u)


class Returned(NamedTuple):
    """A chunk with the gradient of the state after it."""

    dend: Array  # of S' before it is decayed [v, W]
    rhs: Array  # of the equation of Z, the gradient of the equation of U [C, W]
    dv: Array  # without what comes by Z [C, W]


def enter_back(tile: Tile, chain: Chain, s: Scaled, a: Scores) -> Returned:
    dend, dy = chain.state[...] * s.leave, tile.spread(chain.inputs.dy[...])
    written = tile.nt(chain.docs.reaching(s.right), tile.spread(dend))
    return Returned(
        dend, written[: tile.size] + tile.nn(a.rb, dy), written[tile.size :] + tile.nn(a.rk, dy)
    )


class Scored(NamedTuple):
    """Gradients of the scores of rows a; r."""

    rows: Array  # z; dy [2C, W]
    with_b: Array  # [2C, columns]
    with_k: Array


def score(tile: Tile, chain: Chain, a: Scores, back: Returned, z: Array) -> Scored:
    x, out = chain.inputs.x, chain.out.x
    store(out.v, back.dv + tile.nn(a.ak, tile.spread(z)))
    rows = jnp.concatenate([z, chain.inputs.dy[...].astype(tile.dtype)], 0)
    before = causal(tile, chain.docs, operator.gt)
    upto = causal(tile, chain.docs, operator.ge)
    mask = jnp.concatenate([before, upto], 0)
    u, v = chain.inputs.entering.removed[...], x.v[...]
    with_b, with_k = (
        jnp.where(mask, tile.nt(rows, tile.spread(c)), 0.0).astype(tile.dtype) for c in (u, v)
    )
    return Scored(rows, with_b, with_k)


def entering(chain: Chain, s: Scaled) -> Array:
    """S e^m [v, W]."""
    return wide(chain.inputs.entering.states[...]) * s.enter


def left_gradients(tile: Tile, chain: Chain, s: Scaled, d: Scored) -> Array:
    """Of a; r, scaled [2C, W]."""
    b, k = (tile.spread(z) for z in (s.right[: tile.size], s.right[tile.size :]))
    read = chain.docs.seeing(tile.nn(d.rows, tile.spread(entering(chain, s))))
    return tile.nn(d.with_b, b) + tile.nn(d.with_k, k) + read


class Right(NamedTuple):
    """Gradients of b; k, scaled [2C, W]."""

    whole: Array
    end: Array  # of it, what comes from the state after the chunk


def right_gradients(tile: Tile, chain: Chain, s: Scaled, back: Returned, d: Scored) -> Right:
    uv = (chain.inputs.entering.removed[...], chain.inputs.x.v[...])
    uv = jnp.concatenate([z.astype(tile.dtype) for z in uv], 0)
    end = chain.docs.reaching(tile.nn(uv, tile.spread(back.dend)))
    inside = [tile.merge(tile.tn(z, s.left), tile.size) for z in (d.with_b, d.with_k)]
    return Right(jnp.concatenate(inside, 0) + end, end)


def leave_back(
    tile: Tile, chain: Chain, s: Scaled, back: Returned, d: Scored, left: Array, right: Right
) -> None:
    """The gradients of the chunk's inputs but v, and of the state that entered it.

    The decay's is a conservation law (`algebra.backward`): log w_t gets what flows at or after t.
    """
    c, x, docs, out = tile.size, chain.inputs.x, chain.docs, chain.out.x
    kept = docs.carried(back.dend)
    dsm = kept + tile.merge(tile.tn(docs.seeing(d.rows), s.left), kept.shape[0])
    chain.state[...] = dsm * s.enter

    flows_left, flows_right = left * wide(s.left), right.whole * wide(s.right)
    flow = flows_left[c:] - flows_right[:c] - flows_right[c:]
    through = flows_left[:c] + flow
    at_end = wide(s.right) * right.end
    ends = jnp.sum(at_end[:c] + at_end[c:], 0, keepdims=True)
    ends = ends + jnp.sum(entering(chain, s) * kept, 0, keepdims=True)
    after = docs.within(iota((c, 2 * c), 0) < place(iota((c, 2 * c), 1), c))
    dlog_w = tile.sums(jnp.where(after, 1.0, 0.0), through) + flow
    dlog_w = dlog_w + docs.reaching(jnp.broadcast_to(ends, flow.shape))

    fall, rise = jnp.exp(s.exponent), jnp.exp(-s.exponent)
    before = jnp.exp(s.exponent - wide(x.log_w[...]))
    store(out.r, left[c:] * fall)
    store(out.log_w, dlog_w)
    store(out.k, right.whole[c:] * rise)
    store(out.a, left[:c] * before)
    store(out.b, right.whole[:c] * rise)


def backward(tile: Tile, chains: list[Chain], times: int) -> None:
    s = each(partial(scale, tile), chains)
    a = each(partial(relate_transposed, tile), chains, s)
    inverse = [invert_blocks(z.ab, tile.size, upper=True) for z in a]
    for now, s_now, a_now, inverse_now in in_order(times, chains, s, a, inverse):
        back = each(partial(enter_back, tile), now, s_now, a_now)
        z = solve(tile, [z.ab for z in a_now], [z.rhs for z in back], inverse_now, upper=True)
        d = each(partial(score, tile), now, a_now, back, z)
        left = each(partial(left_gradients, tile), now, s_now, d)
        right = each(partial(right_gradients, tile), now, s_now, back, d)
        each(partial(leave_back, tile), now, s_now, back, d, left, right)


ALGEBRA = Algebra("wkv7", forward, backward, heads.segment_counts)
DRIVER = driver.driver(8, Kept("cbvm", "bthn"), pack, unpack)
