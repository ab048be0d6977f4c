"""The WKV of RWKV-5 and 6 by chunks: matrix products inside a chunk, and a loop that carries the
state from chunk to chunk.

The backward pass recomputes each chunk from its inputs and the state that entered it, so that one
state a chunk is kept, not one a token. The algebra is in `algebra.py`.
"""

from rwkv_jax.typing import Array, Float
from rwkv_jax.wkv.chunks import DocumentIds, documents, scan_chunks, scan_chunks_back, transpose
from rwkv_jax.wkv.form import Output, Starts, State
from rwkv_jax.wkv.gradient import outputs_of, with_gradient
from rwkv_jax.wkv.v6 import algebra
from rwkv_jax.wkv.v6.recurrence import Heads, Inputs, Tokens

CHUNK = 32


def forward(
    x: Tokens, heads: Heads, state: Float[Array, "b h k v"], reset: Starts, size: int = CHUNK
) -> tuple[tuple[Array, Array], Array]:
    """(`y`, the state after), and the states that enter the chunks of `size` tokens; all states
    transposed, as in `algebra.py`."""

    def chunk(x: Tokens, ids: DocumentIds | None, state: Array) -> tuple[Array, Array]:
        docs = documents(ids, state.dtype)
        return algebra.forward(x, heads, algebra.relate(x, heads, docs), state, docs)

    return scan_chunks(chunk, x, state, reset, size)


def backward(
    args: tuple[Tokens, Heads, Array, Array | None],
    entering: Float[Array, "chunks b h k v"],
    cotangents: tuple[Array, Array],
    size: int = CHUNK,
) -> tuple[Tokens, Heads, Array, None]:
    """Gradients of the arguments of `forward`, from those of `y` and the state after."""
    x, heads, _, reset = args

    def chunk(
        x: Tokens, ids: DocumentIds | None, state: Array, dy: Array, dstate: Array
    ) -> tuple[Tokens, Heads, Array]:
        docs = documents(ids, state.dtype)
        scores = algebra.relate(x, heads, docs)
        return algebra.backward(x, heads, scores, state, dy, dstate, docs)

    return *scan_chunks_back(chunk, x, heads, reset, entering, cotangents, size), None


_by_chunks = with_gradient(outputs_of(forward), forward, backward)


def wkv6(x: Inputs, state: State, reset: Starts) -> tuple[Output, State]:
    """The form by chunks of 32 tokens."""
    y, after = _by_chunks(x.tokens, x.heads, transpose(state), reset)
    return y, transpose(after)
