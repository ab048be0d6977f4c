"""Reading a prompt and writing on from it, on the device.

`prefill` runs prompts through the model in chunks; `decode` is one jitted loop that samples a
token, feeds it and goes on, so that nothing but tokens travels to the host. Everything a text
depends on is in `Rows`, a value: keep one and decode from it again, and the same tokens come.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Generic

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Key

from rwkv_jax.config import ModelConfig
from rwkv_jax.models import Model, State, backbone, forward, head, init_state, specs, unstack
from rwkv_jax.nn import Transposed
from rwkv_jax.params import ParamSpec, is_spec
from rwkv_jax.sampling.compiler import jit_for_decoding
from rwkv_jax.sampling.transforms import (
    Counts,
    Settings,
    Vocabulary,
    apply_penalties,
    count_tokens,
    no_counts,
    sample,
)
from rwkv_jax.typing import Array, Bool, Float, Int, Leaf

CHUNKS = (256, 16, 1)
"""Lengths that are compiled: a prompt is cut into these, longest first, as there is no padding."""

BLOCK = 64
"""The most tokens a call of `decode` writes."""

NO_TOKEN = -1
"""Stands in `decode`'s output after the end of a row."""

NOT_FINITE = -2
"""Stands in `decode`'s output, as the last of a row, where the model predicts NaN or infinity: no
token can be drawn then."""


@struct.dataclass
class Rows(Generic[Leaf]):
    """A batch of texts being written: one row each, independent of its neighbours."""

    state: State
    """After the last token read or written; `blocks` is a tuple of layers."""
    logits: Leaf
    """[b, V], of the next token, before penalties."""
    counts: Counts[Leaf]
    key: Leaf
    """[b], from the row's seed. The draw of a token is keyed by this and `written`."""
    written: Leaf
    """[b], tokens drawn so far."""
    ended: Leaf
    """[b], whether the row is complete: no more is written in it."""


def decoding_dtype() -> Any:
    """float32 on CPU, whose bfloat16 products are 15 to 25 times slower; bfloat16 elsewhere."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def decoding_layout(params: Model[Array], cfg: ModelConfig, dtype: Any = None) -> Model[Array]:
    """The parameters as decoding wants them: layers unstacked, matrices stored in `dtype` and, on
    CPU, the large ones transposed. Unstacked already, they come back as they are.

    None is `decoding_dtype()`. Logits are those of the parameters given, computed in `dtype`: a
    matrix is cast once instead of at each use. All else stays float32.
    """
    dtype = decoding_dtype() if dtype is None else dtype
    return params if isinstance(params.blocks, tuple) else _lay_out(params, cfg, dtype)


@partial(jax.jit, static_argnums=(1, 2))
def _lay_out(params: Model[Array], cfg: ModelConfig, dtype: Any) -> Model[Array]:
    def store(spec: ParamSpec, value: Array) -> Array | Transposed:
        matrix = spec.layout in ("linear", "table", "factor")  # not a decay per head and channel
        value = value.astype(dtype if matrix else jnp.float32)
        turned = spec.layout == "linear" and jax.default_backend() == "cpu"
        return Transposed(value.swapaxes(-1, -2)) if turned else value

    return unstack(jax.tree.map(store, specs(cfg), params, is_leaf=is_spec))


def prefill(
    params: Model[Array],
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    cfg: ModelConfig,
    end: int,
    start: State | None = None,
    start_logits: Float[Array, "1 V"] | None = None,
) -> Rows[Array]:
    """Rows that have read their prompts; `params` in `decoding_layout`.

    Each prompt is read by itself, so rows may differ in length and none depends on its neighbours.
    An empty one starts a document: it reads `end`, the token between documents, from a fresh state,
    as every document does in training. `start` is a state of one row to read every prompt from; an
    empty prompt then reads nothing, and `start_logits` say what may come next.
    """
    fresh = _fresh_state(params, cfg, 1) if start is None else start
    logits, states = [], []
    for prompt in prompts:
        if start_logits is not None and not prompt:
            row_logits, state = start_logits, fresh
        else:
            row_logits, state = _read(params, prompt or [end], fresh, cfg)
        logits.append(row_logits)
        states.append(state)
    return _side_by_side(logits, states, _keys(seeds))


@partial(jax.jit, static_argnums=(1, 2))
def _fresh_state(params: Model[Array], cfg: ModelConfig, batch: int) -> State:
    return unstack(init_state(cfg, batch, params))


@jax.jit
def _side_by_side(
    logits: list[Float[Array, "1 V"]], states: list[State], keys: Key[Array, " b"]
) -> Rows[Array]:
    batch, vocab_size = len(logits), logits[0].shape[1]
    return Rows(
        state=jax.tree.map(lambda *rows: jnp.concatenate(rows), *states),
        logits=jnp.concatenate(logits),
        counts=no_counts(batch, vocab_size),
        key=keys,
        written=jnp.zeros(batch, jnp.int32),
        ended=jnp.zeros(batch, bool),
    )


def extend(
    params: Model[Array], rows: Rows[Array], tokens: Sequence[int], *, cfg: ModelConfig
) -> Rows[Array]:
    """A single row that has read at least one more token, and goes on even if it had ended."""
    logits, state = _read(params, tokens, rows.state, cfg)
    return replace(rows, logits=logits, state=state, ended=jnp.zeros_like(rows.ended))


def forget(
    params: Model[Array], rows: Rows[Array], *, cfg: ModelConfig, start: State | None = None
) -> Rows[Array]:
    """A row that has read and written nothing, or what `start` is after, but doesn't draw the same
    numbers once more."""
    batch, vocab_size = rows.logits.shape
    state = _fresh_state(params, cfg, batch) if start is None else start
    return replace(rows, state=state, counts=no_counts(batch, vocab_size))


def reseed(rows: Rows[Array], seeds: Sequence[int]) -> Rows[Array]:
    """Rows whose next token is the first that their new seed draws."""
    return replace(rows, key=_keys(seeds), written=jnp.zeros_like(rows.written))


def _keys(seeds: Sequence[int]) -> Key[Array, " b"]:
    return jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32))


def _read(
    params: Model[Array], tokens: Sequence[int], state: State, cfg: ModelConfig
) -> tuple[Float[Array, "1 V"], State]:
    ids = np.asarray(tokens, np.int32)[None]
    start, logits = 0, None
    for chunk in CHUNKS:
        while ids.shape[1] - start >= chunk:
            logits, state = _chunk(params, ids[:, start : start + chunk], state, cfg=cfg)
            start += chunk
    assert logits is not None, "callers pass at least one token"
    return logits, state


@jit_for_decoding
def _chunk(
    params: Model[Array], tokens: Int[Array, "b t"], state: State, *, cfg: ModelConfig
) -> tuple[Float[Array, "b V"], State]:
    """Logits after the last token only: a whole prompt's would be the largest array around."""
    hidden, state = backbone(params, tokens, state, cfg=cfg, dtype=params.head.dtype)
    return head(params, hidden[:, -1]), state


@jit_for_decoding
def decode(
    params: Model[Array],
    rows: Rows[Array],
    settings: Settings[Array],
    vocabulary: Vocabulary[Array],
    tokens: int | Int[Array, ""],
    *,
    cfg: ModelConfig,
    end: int | Int[Array, ""],
) -> tuple[Int[Array, "b BLOCK"], Rows[Array]]:
    """Writes up to `tokens` (at most `BLOCK`) tokens in every row: these, and the rows after them.

    A row ends with the token `end`, which is its last, or with `NOT_FINITE` where the model's
    logits are no numbers to draw from; after it come `NO_TOKEN`s. The loop stops
    early when all rows have ended, so a single row's state is that after its last token (a row that
    ended beside others still being written has a state of no use). `tokens` and `end` are traced:
    one program for all of them.
    """

    def unfinished(carry: tuple[Array, Array, Rows[Array]]) -> Array:
        step, _, rows = carry
        return (step < tokens) & ~jnp.all(rows.ended)

    def step(carry: tuple[Array, Array, Rows[Array]]) -> tuple[Array, Array, Rows[Array]]:
        index, written, rows = carry
        with jax.named_scope("sample"):
            token, finite = _next_token(rows, settings, vocabulary)
        output = jnp.where(rows.ended, NO_TOKEN, jnp.where(finite, token, NOT_FINITE))
        counts = count_tokens(rows.counts, token, settings, vocabulary)
        logits, state = forward(
            params, token[:, None], rows.state, cfg=cfg, dtype=params.head.dtype
        )
        rows = Rows(
            state=state,
            logits=logits[:, 0],
            counts=counts,
            key=rows.key,
            written=rows.written + 1,
            ended=rows.ended | (token == end) | ~finite,
        )
        return index + 1, lax.dynamic_update_index_in_dim(written, output, index, 1), rows

    written = jnp.full((rows.ended.shape[0], BLOCK), NO_TOKEN, jnp.int32)
    _, written, rows = lax.while_loop(unfinished, step, (jnp.int32(0), written, rows))
    return written, rows


def _next_token(
    rows: Rows[Array], settings: Settings[Array], vocabulary: Vocabulary[Array]
) -> tuple[Int[Array, " b"], Bool[Array, " b"]]:
    """A token for each row, and whether it could be drawn."""
    logits = apply_penalties(rows.logits, rows.counts, settings)
    logits = jnp.where(vocabulary.allowed[None], logits, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in)(rows.key, rows.written)
    # The largest is NaN if any is, and drawing needs it in any case.
    return sample(logits, keys, settings), jnp.isfinite(jnp.max(logits, axis=-1))
