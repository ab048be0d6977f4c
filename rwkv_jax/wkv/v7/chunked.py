"""RWKV-7's WKV by chunks: matrix products inside a chunk, and a loop that carries the state from
chunk to chunk.

The backward pass recomputes each chunk from its inputs and the state that entered it, so that one
state a chunk is kept, not one a token. The algebra is in `algebra.py`.
"""

from rwkv_jax.typing import Array, Float
from rwkv_jax.wkv.chunks import DocumentIds, scan_chunks, scan_chunks_back
from rwkv_jax.wkv.form import Output, Starts, State
from rwkv_jax.wkv.gradient import outputs_of, with_gradient
from rwkv_jax.wkv.v7 import algebra
from rwkv_jax.wkv.v7.recurrence import Inputs, Tokens

CHUNK = 32


def forward(
    x: Tokens,
    initial: Float[Array, "h v k"] | None,
    state: Float[Array, "b h v k"],
    reset: Starts,
    size: int = CHUNK,
) -> tuple[tuple[Array, Array], Array]:
    """(`y`, the state after), and the states that enter the chunks of `size` tokens."""

    def chunk(x: Tokens, ids: DocumentIds | None, state: Array) -> tuple[Array, Array]:
        docs = algebra.documents(ids, state.dtype)
        return algebra.forward(x, initial, algebra.relate(x, docs), state, docs)

    return scan_chunks(chunk, x, state, reset, size)


def backward(
    args: tuple[Tokens, Array | None, Array, Array | None],
    entering: Float[Array, "chunks b h v k"],
    cotangents: tuple[Array, Array],
    size: int = CHUNK,
) -> tuple[Tokens, Array | None, Array, None]:
    """Gradients of the arguments of `forward`, from those of `y` and the state after."""
    x, initial, _, reset = args

    def chunk(
        x: Tokens, ids: DocumentIds | None, state: Array, dy: Array, dstate: Array
    ) -> tuple[Tokens, Array | None, Array]:
        docs = algebra.documents(ids, state.dtype)
        scores = algebra.relate(x, docs)
        return algebra.backward(x, initial, scores, state, dy, dstate, docs)

    return *scan_chunks_back(chunk, x, initial, reset, entering, cotangents, size), None


_by_chunks = with_gradient(outputs_of(forward), forward, backward)


def wkv7(x: Inputs, state: State, reset: Starts) -> tuple[Output, State]:
    """The form by chunks of 32 tokens."""
    return _by_chunks(x.tokens, x.initial, state, reset)
