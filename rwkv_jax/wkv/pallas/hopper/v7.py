"""RWKV-7's passes for Hopper GPUs: chunks of 64 tokens, on the tiles of `tiles.py`.

The algebra and its letters are those of `v7/algebra.py`. A program computes one row and head, and
keeps its state in registers from the first chunk to the last. Exponents are of 2. Sums of log
decays are products with ones: their three bfloat16 terms are as exact as float32.

JAX before 0.11 cannot import this module.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from rwkv_jax.typing import Array, Callable
from rwkv_jax.wkv.pallas.hopper.driver import CHUNK as C
from rwkv_jax.wkv.pallas.hopper.tiles import (
    BLOCK,
    Documents,
    Program,
    each,
    launch,
    load,
    load_float32,
    ones,
    places,
    plgpu,
    put,
    put_terms,
    tile,
    unit_inverse,
)
from rwkv_jax.wkv.pallas.kernel import Backward, Forward, Gradients, Outputs
from rwkv_jax.wkv.v7.recurrence import Tokens

LOG2_E = math.log2(math.e)


def forward(inputs: Forward, outputs: Outputs, interpret: bool) -> Outputs:
    """One warpgroup for each row and head. Two of these programs fit a multiprocessor."""
    scratch: dict[str, Any] = _scratch(inputs, "k", "b", "u", "state", "lower")
    scratch["tokens"] = plgpu.Barrier(num_arrivals=5 + 2 * (inputs.starts is not None))
    scratch["values"] = plgpu.Barrier()
    if outputs.entering is not None:
        scratch["entering"] = tile()
    return launch(_forward, "wkv7_forward", inputs, outputs, scratch, interpret, warpgroups=1)


def backward(inputs: Backward, outputs: Gradients, interpret: bool) -> Gradients:
    """Two warpgroups for each row and head, which share the work on every chunk."""
    names = ("r", "k", "a", "b", "u", "z", "state", "dstate", "ab", "ak", "rb", "rk")
    scratch: dict[str, Any] = _scratch(inputs, *names, "dy", "entering")
    scratch |= {"g": tile(jnp.float32), "out": (tile(),) * 3}
    scratch["decays"] = plgpu.Barrier(num_arrivals=1 + 2 * (inputs.starts is not None))
    scratch["tokens"] = plgpu.Barrier(num_arrivals=4)
    scratch["values"] = plgpu.Barrier(num_arrivals=3)
    scratch["meeting"] = plgpu.Barrier(num_arrivals=2)
    return launch(_backward, "wkv7_backward", inputs, outputs, scratch, interpret, warpgroups=2)


def _scratch(inputs: Forward | Backward, *names: str) -> dict[str, Any]:
    """Tiles for the inputs, for the inverse, and by name."""
    x, sides = Tokens(*(tile(z.dtype) for z in inputs.x)), (tile(width=BLOCK),) * 2
    return {"x": x, "sides": sides, **dict.fromkeys(names, tile())}


def decays(docs: Documents, terms: tuple, dot: Callable[..., Array]) -> Array:
    """[t, k]: the log decay from the middle of a token's document to that token."""
    row, lane = places()
    return dot(*each(docs.same(jnp.where(row >= lane, 0.5, -0.5).astype(jnp.bfloat16)), terms))


def borders(docs: Documents, terms: tuple, dot: Callable[..., Array]) -> tuple[Array, Array]:
    """[v, k]: the decays from the entering state to the middle of its document, and from the middle
    of the last document to the state after; the same in every row."""
    half = jnp.full((C, C), 0.5, jnp.bfloat16)
    enter = jnp.exp2(dot(*each(docs.first(half, 1), terms)))
    leave = enter if docs.last is None else jnp.exp2(dot(*each(docs.final(half, 1), terms)))
    return enter, leave


def triangles(docs: Documents) -> tuple[Array, Array]:
    """[t, s]: tokens before a token, and up to it."""
    row, lane = places()
    return docs.same(ones(row > lane)), docs.same(ones(row >= lane))


def _forward(program: Program, inputs: Forward, out: Outputs) -> None:
    s, dot, tokens, at = program.tiles, program.dot, program.tokens, program.at
    x = inputs.x

    def fetch_tokens(c: Array | int) -> None:
        pairs = [(tokens(z, c), ref) for z, ref in zip(x, s.x, strict=True) if z is not x.v]
        program.fetch(s.tokens, c, *pairs, *program.counts(c))

    def fetch_values(c: Array | int) -> None:
        program.fetch(s.values, c, (tokens(x.v, c), s.x.v))

    def chunk(c: Array, state: Array) -> Array:
        plgpu.barrier_wait(s.tokens)
        docs = program.documents(c)
        log_w, terms = load(s.x.log_w) * LOG2_E, (s.u, s.k, s.b)
        put_terms(terms, log_w)
        plgpu.commit_smem()
        g = decays(docs, terms, dot)
        enter, leave = borders(docs, terms, dot)
        a = (load_float32(s.x.a) * jnp.exp2(g - log_w)).astype(jnp.bfloat16)
        r = (load_float32(s.x.r) * jnp.exp2(g)).astype(jnp.bfloat16)
        put(s.b, load_float32(s.x.b) * jnp.exp2(-g))
        put(s.k, load_float32(s.x.k) * jnp.exp2(-g))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last chunk's y has left its tile
        if out.entering is not None:
            put(s.entering, state)
        state = state * enter
        put(s.state, state)
        plgpu.commit_smem()
        fetch_tokens(c + 1)

        before, upto = triangles(docs)
        ab = dot((a, s.b.T)).astype(jnp.bfloat16) * before
        inverse = unit_inverse(ab, (s.lower, s.u, *s.sides), dot)
        ak = dot((a, s.k.T)).astype(jnp.bfloat16) * before
        plgpu.barrier_wait(s.values)
        put(s.u, dot((docs.first(a), s.state.T), (ak, s.x.v)))
        plgpu.commit_smem()
        put(s.u, dot((inverse, s.u)))
        plgpu.commit_smem()

        rb = dot((r, s.b.T)).astype(jnp.bfloat16) * upto
        rk = dot((r, s.k.T)).astype(jnp.bfloat16) * upto
        y = dot((docs.first(r), s.state.T), (rb, s.u), (rk, s.x.v))
        program.send(y, s.state, tokens(out.y, c))
        if out.entering is not None:
            plgpu.copy_smem_to_gmem(s.entering, out.entering.at[(c, *at)])
        written = dot((docs.final(s.u.T, 1), s.b), (docs.final(s.x.v.T, 1), s.k))
        plgpu.commit_smem()
        fetch_values(c + 1)
        return (docs.carried(state) + written) * leave

    fetch_tokens(0)
    fetch_values(0)
    after = lax.fori_loop(0, program.chunks, chunk, load(inputs.state.at[at]))
    plgpu.wait_smem_to_gmem(0)
    out.after[at] = after


def _backward(program: Program, inputs: Backward, out: Gradients) -> None:
    """One warpgroup, `solve`, has the tokens a and b and the triangular system; the other, `carry`,
    r and k and the state. They meet seven times a chunk, to see what the other has put."""
    s, dot, tokens, at = program.tiles, program.dot, program.tokens, program.at
    x, chunks = inputs.x, program.chunks
    terms = (s.u, s.z, s.rk)  # of the log decays, before those tiles are needed

    def fetch_decays(c: Array | int) -> None:
        program.fetch(s.decays, c, (tokens(x.log_w, c), s.x.log_w), *program.counts(c))

    def fetch_tokens(c: Array | int) -> None:
        pairs = ((tokens(getattr(x, name), c), getattr(s.x, name)) for name in "rkab")
        program.fetch(s.tokens, c, *pairs)

    def fetch_values(c: Array | int) -> None:
        pairs = (tokens(x.v, c), s.x.v), (tokens(inputs.dy, c), s.dy)
        program.fetch(s.values, c, *pairs, (inputs.entering.at[(c, *at)], s.entering))

    def meet() -> None:
        plgpu.commit_smem()
        plgpu.barrier_arrive(s.meeting)
        plgpu.barrier_wait(s.meeting)

    def scores(seen: Array, left: Any, right: Any) -> Array:
        return dot((left, right)).astype(jnp.bfloat16) * seen

    def sums(*parts: tuple[Array, Array, tuple]) -> Array:
        """Of (which [t, s], x, two tiles): the rows of x that `which` has for each row."""
        for _, x, refs in parts:
            put_terms(refs, x)
        plgpu.commit_smem()
        return dot(*(pair for which, _, refs in parts for pair in each(which, refs)))

    def later(docs: Documents) -> tuple[Array, Array, Array]:
        """[t, s]: tokens after a token, from it on, and any, for those that reach the end."""
        row, lane = places()
        after, since = docs.same(ones(row < lane)), docs.same(ones(row <= lane))
        return after, since, docs.final(ones(row >= 0))

    def solve(i: Array, _: None) -> None:
        c = chunks - 1 - i
        plgpu.barrier_wait(s.decays)
        docs = program.documents(c)
        log_w = load(s.x.log_w) * LOG2_E
        put_terms(terms, log_w)
        meet()  # the terms of the decays
        g = decays(docs, terms, dot)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last chunk's gradients have left
        put(s.g, g)
        plgpu.barrier_wait(s.tokens)
        put(s.a, load_float32(s.x.a) * jnp.exp2(g - log_w))
        put(s.b, load_float32(s.x.b) * jnp.exp2(-g))
        meet()  # the scaled tokens
        fetch_tokens(c - 1)
        before, upto = triangles(docs)
        ab = scores(before, s.a, s.b.T)
        inverse = unit_inverse(ab, (s.out[0], s.ab, *s.sides), dot)
        put(s.ab, inverse)
        meet()  # the inverse, the right sides and r's scores
        put(s.u, dot(*each(inverse, (s.u, s.out[1]))))
        meet()  # U and Z
        plgpu.barrier_wait(s.values)
        put(s.ab, scores(before, s.z, s.u.T))  # the cotangents of scores, in their places
        put(s.rb, scores(upto, s.dy, s.u.T))
        meet()  # the scores' cotangents
        da = dot((s.ab, s.b), (s.ak, s.k), (docs.first(s.z), s.state))
        flow_a = da * load_float32(s.a)
        da = da * jnp.exp2(load(s.g) - load(s.x.log_w) * LOG2_E)
        program.send(da, s.out[0], tokens(out.x.a, c))
        fetch_decays(c - 1)
        db_end = dot((docs.final(s.u), s.dstate))
        db = db_end + dot((s.ab.T, s.a), (s.rb.T, s.r))
        b = load_float32(s.b)
        flow, flow_end = -db * b, db_end * b
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        program.send(db * jnp.exp2(-load(s.g)), s.out[0], tokens(out.x.b, c))
        meet()  # nobody reads tokens and states any more
        fetch_values(c - 1)
        after, since, end = later(docs)
        dlog_w = sums(
            (after, flow_a, (s.a, s.b)), (since, flow, (s.u, s.z)), (end, flow_end, (s.ab, s.ak))
        )
        meet()  # r's and k's share of dlog_w
        program.send(dlog_w + load(s.g), s.g, tokens(out.x.log_w, c))

    def carry(i: Array, dstate: Array) -> Array:
        c = chunks - 1 - i
        plgpu.barrier_wait(s.decays)
        docs = program.documents(c)
        meet()
        g = decays(docs, terms, dot)
        plgpu.barrier_wait(s.tokens)
        put(s.r, load_float32(s.x.r) * jnp.exp2(g))
        put(s.k, load_float32(s.x.k) * jnp.exp2(-g))
        meet()
        enter, leave = borders(docs, terms, dot)
        plgpu.barrier_wait(s.values)
        put(s.state, load_float32(s.entering) * enter)
        dend = dstate * leave
        put(s.dstate, dend)
        plgpu.commit_smem()
        before, upto = triangles(docs)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last chunk's gradients have left
        ak = scores(before, s.a, s.k.T)
        put(s.ak, ak)
        # The right sides of the system in two terms: rounded to one, they would leave da and db
        # wrong by 2 % where a key repeats.
        put_terms((s.u, s.out[1]), dot((docs.first(s.a), s.state.T), (ak, s.x.v)))
        put(s.rb, scores(upto, s.r, s.b.T))
        put(s.rk, scores(upto, s.r, s.k.T))
        plgpu.commit_smem()
        put_terms((s.z, s.out[2]), dot((docs.final(s.b), s.dstate.T), (s.rb.T, s.dy)))
        meet()
        put(s.z, dot(*each(s.ab.T, (s.z, s.out[2]))))
        meet()
        dv = dot((docs.final(s.k), s.dstate.T), (s.rk.T, s.dy), (s.ak.T, s.z))
        put(s.ak, scores(before, s.z, s.x.v.T))
        put(s.rk, scores(upto, s.dy, s.x.v.T))
        meet()
        program.send(dv, s.out[1], tokens(out.x.v, c))
        dk_end = dot((docs.final(s.x.v), s.dstate))
        dk = dk_end + dot((s.ak.T, s.a), (s.rk.T, s.r))
        k = load_float32(s.k)
        flow, flow_end = -dk * k, dk_end * k
        program.send(dk * jnp.exp2(-load(s.g)), s.out[2], tokens(out.x.k, c))
        dr = dot((s.rb, s.b), (s.rk, s.k), (docs.first(s.dy), s.state))
        flow = flow + dr * load_float32(s.r)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        program.send(dr * jnp.exp2(load(s.g)), s.out[1], tokens(out.x.r, c))
        dkept = docs.carried(dend)
        flow_end = flow_end + dkept * load_float32(s.state)
        dstate = dkept + dot((docs.first(s.z.T, 1), s.a), (docs.first(s.dy.T, 1), s.r))
        meet()
        _, since, end = later(docs)
        put(s.g, sums((since, flow, (s.r, s.k)), (end, flow_end, (s.state, s.dstate))))
        meet()
        return dstate * enter

    @pl.when(lax.axis_index("warpgroup") == 0)
    def _() -> None:
        fetch_decays(chunks - 1)
        fetch_tokens(chunks - 1)
        fetch_values(chunks - 1)
        lax.fori_loop(0, chunks, solve, None)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(lax.axis_index("warpgroup") == 1)
    def _() -> None:
        dstate = lax.fori_loop(0, chunks, carry, load(inputs.dstate.at[at]))
        plgpu.wait_smem_to_gmem(0)
        out.state[at] = dstate
