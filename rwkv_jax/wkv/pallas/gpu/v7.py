"""RWKV-7 on GPUs: the algebra of one chunk on tiles (`tiles.py`).

The algebra and its letters are those of `v7/algebra.py`, without concatenations.
"""

from typing import NamedTuple

import jax.numpy as jnp

from rwkv_jax.typing import Array, Float
from rwkv_jax.wkv.pallas import heads
from rwkv_jax.wkv.pallas.gpu.tiles import Products, Rows, sum_rows
from rwkv_jax.wkv.pallas.kernel import Algebra
from rwkv_jax.wkv.v7.recurrence import Tokens


class Scores(NamedTuple):
    """The state-free part of a chunk."""

    scale_a: Array  # [C, k]
    scale_r: Array  # [C, k]
    scale_bk: Array  # [C, k]
    a: Array  # the tokens, scaled [C, k]
    r: Array
    b: Array
    k: Array
    ab: Array  # A, masked [C, C]: scores of rows of a and columns of b
    ak: Array
    rb: Array
    rk: Array
    inverse: Array  # (I - A_ab)^-1 [C, C]
    enter: Array  # e^m [1, k]
    leave: Array  # e^{g_C - m} [1, k]


def unit_inverse(lower: Float[Array, "C C"], rows: Rows, p: Products) -> Float[Array, "C C"]:
    """(I - lower)^-1 by exact block doubling (`algebra.unit_inverse`)."""
    row, column = rows.token, rows.other
    one = jnp.where(rows.within(row == column), 1.0, 0.0)
    inverse, block = one, 1
    while block < rows.size:
        below = (row // block % 2 == 1) & (row // block == column // block + 1)
        link = jnp.where(below, lower, 0.0)
        if block == 1:
            inverse = inverse + link
        else:
            inverse = inverse + p.exact_nn(p.exact_nn(inverse, link), inverse)
        block *= 2
    return inverse


def relate(x: Tokens, rows: Rows, p: Products) -> Scores:
    g = p.exact_sums(rows.upto, x.log_w)
    if rows.starts is None:
        total = sum_rows(x.log_w)
        m = total / 2
        enter, leave = jnp.exp(m), jnp.exp(total - m)
    else:
        # Sums of each document's own tokens, so that no document's rounding depends on another.
        m = p.exact_sums(rows.within(rows.token >= 0), x.log_w) / 2
        first, last = rows.at(0), rows.at(rows.size - 1)
        enter = jnp.exp(sum_rows(jnp.where(first, m, 0.0)))
        leave = jnp.exp(sum_rows(jnp.where(last, g - m, 0.0)))
    scale_a, scale_r, scale_bk = jnp.exp(g - x.log_w - m), jnp.exp(g - m), jnp.exp(m - g)
    a, r, b, k = x.a * scale_a, x.r * scale_r, x.b * scale_bk, x.k * scale_bk
    ab = jnp.where(rows.before, p.nt(a, b), 0.0)
    ak = jnp.where(rows.before, p.nt(a, k), 0.0)
    rb = jnp.where(rows.upto, p.nt(r, b), 0.0)
    rk = jnp.where(rows.upto, p.nt(r, k), 0.0)
    inverse = unit_inverse(ab, rows, p)
    return Scores(scale_a, scale_r, scale_bk, a, r, b, k, ab, ak, rb, rk, inverse, enter, leave)


def removed(x: Tokens, s: Scores, sm: Array, rows: Rows, p: Products) -> Array:
    """U [C, v], the removed vectors."""
    reading = p.nt(s.a, sm)
    if rows.starts is not None:
        reading = reading * rows.starts.sees_state
    return p.exact_nn(s.inverse, reading + p.nn(s.ak, x.v))


def forward(
    x: Tokens, shared: tuple, state: Float[Array, "v k"], rows: Rows, p: Products
) -> tuple[Float[Array, "C v"], Float[Array, "v k"]]:
    """The chunk's `y` and the state after it."""
    s = relate(x, rows, p)
    sm = state * s.enter
    u = removed(x, s, sm, rows, p)
    reading, b, k = p.nt(s.r, sm), s.b, s.k
    if rows.starts is not None:
        reading = reading * rows.starts.sees_state
        sm, b, k = (
            sm * rows.starts.carries_on,
            b * rows.starts.reaches_end,
            k * rows.starts.reaches_end,
        )
    y = reading + p.nn(s.rb, u) + p.nn(s.rk, x.v)
    return y, (sm + p.tn(u, b) + p.tn(x.v, k)) * s.leave


def backward(
    x: Tokens,
    shared: tuple,
    state: Float[Array, "v k"],
    dy: Float[Array, "C v"],
    dstate: Float[Array, "v k"],
    rows: Rows,
    p: Products,
) -> tuple[Tokens, tuple, Float[Array, "v k"]]:
    """Gradients of the chunk's inputs and of the state that entered it (`algebra.backward`)."""
    s = relate(x, rows, p)
    sm = state * s.enter
    u = removed(x, s, sm, rows, p)
    dend = dstate * s.leave
    end_b, end_k, dkept = s.b, s.k, dend
    if rows.starts is not None:
        end_b, end_k = end_b * rows.starts.reaches_end, end_k * rows.starts.reaches_end
        dkept = dend * rows.starts.carries_on
    z = p.nt(end_b, dend) + p.tn(s.rb, dy)
    z = p.exact_tn(s.inverse, z)
    dv = p.nt(end_k, dend) + p.tn(s.rk, dy) + p.tn(s.ak, z)
    dab = jnp.where(rows.before, p.nt(z, u), 0.0)
    dak = jnp.where(rows.before, p.nt(z, x.v), 0.0)
    drb = jnp.where(rows.upto, p.nt(dy, u), 0.0)
    drk = jnp.where(rows.upto, p.nt(dy, x.v), 0.0)
    db_end, dk_end = p.nn(u, dend), p.nn(x.v, dend)
    reading_z, reading_dy = z, dy
    if rows.starts is not None:
        db_end, dk_end = db_end * rows.starts.reaches_end, dk_end * rows.starts.reaches_end
        reading_z, reading_dy = z * rows.starts.sees_state, dy * rows.starts.sees_state
    da = p.nn(dab, s.b) + p.nn(dak, s.k) + p.nn(reading_z, sm)
    dr = p.nn(drb, s.b) + p.nn(drk, s.k) + p.nn(reading_dy, sm)
    db = p.tn(dab, s.a) + p.tn(drb, s.r) + db_end
    dk = p.tn(dak, s.a) + p.tn(drk, s.r) + dk_end
    dsm = dkept + p.tn(reading_z, s.a) + p.tn(reading_dy, s.r)

    flow_a = da * s.a
    flow = dr * s.r - db * s.b - dk * s.k
    at_end = s.b * db_end + s.k * dk_end
    kept = sum_rows(sm * dkept)
    # Flows at or after t count; rows of a have token t's exponent before its decay.
    after = rows.within(rows.token < rows.other)
    dlog_w = p.sums(after, flow_a + flow) + flow
    if rows.starts is None:
        dlog_w = dlog_w + sum_rows(at_end) + kept
    else:
        flow_end = sum_rows(at_end) + kept
        dlog_w = dlog_w + flow_end * rows.starts.reaches_end
    gradients = Tokens(
        r=dr * s.scale_r,
        log_w=dlog_w,
        k=dk * s.scale_bk,
        v=dv,
        a=da * s.scale_a,
        b=db * s.scale_bk,
    )
    return gradients, (), dsm * s.enter


ALGEBRA = Algebra("wkv7", forward, backward, heads.segment_counts)
