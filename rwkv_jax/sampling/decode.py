"""Prefill and the decode loop, on the device.

`prefill` runs prompts through the model in chunks. `decode` is one jitted loop that samples a token
and feeds it back, so that only tokens travel to the host. A `DecodeState` holds everything a
continuation depends on: decoding from the same value again gives the same tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Key

from rwkv_jax import models
from rwkv_jax.config import ModelConfig
from rwkv_jax.containers import container
from rwkv_jax.errors import UserError
from rwkv_jax.models import Model, State, backbone, check_state, forward, head, stack, unstack
from rwkv_jax.params import ParamSpec, is_spec
from rwkv_jax.sampling.compiler import jit_by_rows
from rwkv_jax.sampling.transforms import (
    Counts,
    Settings,
    Vocabulary,
    apply_penalties,
    count_tokens,
    no_counts,
    sample,
)
from rwkv_jax.typing import Array, Bool, Callable, Float, Int, Leaf

Tree = TypeVar("Tree")

BLOCK = 64
"""The most tokens per call of `decode`."""

NO_TOKEN = -1
"""In `decode`'s output, after the end of a row."""

NOT_FINITE = -2
"""In `decode`'s output, at the end of a row: the logits have NaN or infinity, and no token can be
drawn."""


@container
class DecodeState(Generic[Leaf]):
    """A batch of texts being written: one row each, independent of the others.

    state   after the last token read or written, unstacked
    logits  [b, V], of the next token, before penalties
    counts  the tokens drawn so far, for penalties
    keys    [b], from the rows' seeds; the draw of a token is keyed by this and `drawn`
    drawn   [b], number of tokens drawn so far
    done    [b], whether the row is complete: no more tokens are drawn in it
    """

    state: State
    logits: Leaf
    counts: Counts[Leaf]
    keys: Leaf
    drawn: Leaf
    done: Leaf


class Prefix:
    """A point to start texts from: the state of one row and, if known, the logits of its next
    token.

    Raises `UserError` unless the state is one row of `cfg`'s model.
    """

    def __init__(self, state: State, cfg: ModelConfig, logits: Float[Array, "1 V"] | None = None):
        try:
            check_state(state, cfg, 1)
        except ValueError as error:
            raise UserError(f"{error}; give one row of a state of this model") from None
        self.unstacked = state if isinstance(state.blocks, tuple) else unstack(state)
        self.logits = logits

    @property
    def state(self) -> State:
        """The state, stacked."""
        return stack(self.unstacked)


def decoding_dtype() -> Any:
    """float32 on CPU, whose bfloat16 products are 15 to 25 times slower; bfloat16 elsewhere."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def chunk_length() -> int:
    """Tokens read at a time, by measurement: on a CPU, longer chunks read a long prompt a tenth
    faster and a short one twice as slowly; elsewhere short ones would wait for memory.

    A text is cut into chunks from where its reading starts, and the last is padded. So a state
    after a multiple of this many tokens resumes to the same bits.
    """
    return 64 if jax.default_backend() == "cpu" else 256


def decoding_layout(params: Model[Array], cfg: ModelConfig, dtype: Any = None) -> Model[Array]:
    """The parameters for decoding: layers unstacked, matrices stored in `dtype`. Unstacked
    parameters are returned unchanged.

    `dtype` None is `decoding_dtype()`. Logits equal those of `params` computed in `dtype`: matrices
    are cast once instead of at each use. Everything else stays float32. Raises `ValueError` for
    parameters that are not of `cfg`'s model.
    """
    dtype = decoding_dtype() if dtype is None else dtype
    models.check_params(params, cfg)
    if isinstance(params.blocks, tuple):
        return params
    return _lay_out(params, models.as_tuned(cfg, params), dtype)


@partial(jax.jit, static_argnums=(1, 2))
def _lay_out(params: Model[Array], cfg: ModelConfig, dtype: Any) -> Model[Array]:
    def store(spec: ParamSpec, value: Array) -> Array:
        return value.astype(stored_type(spec, dtype))

    return unstack(jax.tree.map(store, models.specs(cfg), params, is_leaf=is_spec))


def stored_type(spec: ParamSpec, dtype: Any) -> Any:
    """The type of a parameter in `decoding_layout`."""
    matrix = spec.layout in ("linear", "table", "factor")  # not a decay per head and channel
    return dtype if matrix else jnp.float32


def prefill(
    params: Model[Array],
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    cfg: ModelConfig,
    end: int,
    prefix: Prefix | None = None,
    report: Callable[[int], None] = lambda tokens: None,
) -> DecodeState[Array]:
    """Reads the prompts; `params` in `decoding_layout`, `report` as of `read`.

    Each prompt is read by itself, after `prefix` if given, so prompts may differ in length and no
    row depends on another. An empty prompt reads `end`, the token between documents, as every
    document starts in training; after a prefix with logits it reads nothing.
    """
    start = fresh_state(params, cfg, 1) if prefix is None else prefix.unstacked
    known = None if prefix is None else prefix.logits
    rows = [
        (known, start)
        if known is not None and not prompt
        else read(params, prompt or [end], start, cfg=cfg, report=report)
        for prompt in prompts
    ]
    return _as_batch(rows, _keys(seeds))


@partial(jax.jit, static_argnums=(1, 2))
def fresh_state(params: Model[Array], cfg: ModelConfig, batch: int) -> State:
    """The state before the first token, unstacked."""
    return unstack(models.init_state(cfg, batch, params))


@jax.jit
def join_rows(rows: list[Tree]) -> Tree:
    """One batch of several, in the layout of decoding: their arrays along the first axis."""
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *rows)


@jax.jit
def _as_batch(
    rows: list[tuple[Float[Array, "1 V"], State]], keys: Key[Array, " b"]
) -> DecodeState[Array]:
    logits, state = join_rows(rows)
    return DecodeState(
        state=state,
        logits=logits,
        counts=no_counts(*logits.shape),
        keys=keys,
        drawn=jnp.zeros(len(rows), jnp.int32),
        done=jnp.zeros(len(rows), bool),
    )


def extend(
    params: Model[Array],
    decoding: DecodeState[Array],
    tokens: Sequence[int],
    *,
    cfg: ModelConfig,
    report: Callable[[int], None] = lambda tokens: None,
) -> DecodeState[Array]:
    """A single row after reading at least one more token; it is no longer done. `report` as of
    `read`."""
    logits, state = read(params, tokens, decoding.state, cfg=cfg, report=report)
    return replace(decoding, logits=logits, state=state, done=jnp.zeros_like(decoding.done))


def restart(
    params: Model[Array],
    decoding: DecodeState[Array],
    *,
    cfg: ModelConfig,
    prefix: Prefix | None = None,
) -> DecodeState[Array]:
    """A fresh state, or that of `prefix`, and no penalties; the random numbers continue.

    Unless `prefix` has logits, those of `decoding` remain, and a token has to be read next.
    """
    state = fresh_state(params, cfg, len(decoding.done)) if prefix is None else prefix.unstacked
    logits = decoding.logits if prefix is None or prefix.logits is None else prefix.logits
    return replace(
        decoding,
        state=state,
        logits=logits,
        counts=no_counts(*logits.shape),
        done=jnp.zeros_like(decoding.done),
    )


def reseed(decoding: DecodeState[Array], seeds: Sequence[int]) -> DecodeState[Array]:
    """The same rows with other random numbers, from their first on."""
    return replace(decoding, keys=_keys(seeds), drawn=jnp.zeros_like(decoding.drawn))


def _keys(seeds: Sequence[int]) -> Key[Array, " b"]:
    return jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32))


def read(
    params: Model[Array],
    tokens: Sequence[int],
    state: State,
    *,
    cfg: ModelConfig,
    report: Callable[[int], None] = lambda tokens: None,
) -> tuple[Float[Array, "1 V"], State]:
    """Logits after the last of at least one token, and the state; `params` in `decoding_layout`.

    All that reads a prompt reads it here, so that it gets the same bits everywhere. `report` is
    given the number of tokens of each chunk before the last, once it is read.
    """
    size = chunk_length()
    lengths = np.full(-(-len(tokens) // size), size, np.int32)
    lengths[-1] -= -len(tokens) % size
    ids = np.zeros((len(lengths), size), np.int32)
    ids.flat[: len(tokens)] = tokens
    logits: Any = None
    for chunk, length in zip(ids[:, None], lengths[:, None], strict=True):
        if logits is not None:
            # One chunk is on its way, not all: so progress is known, and Ctrl-C stops the reading.
            logits.block_until_ready()
            report(size)
        logits, state = _chunk(params, chunk, length, state, cfg=cfg)
    return logits, state


@partial(jax.jit, static_argnames="cfg")
def _chunk(
    params: Model[Array],
    tokens: Int[Array, "b t"],
    lengths: Int[Array, " b"],
    state: State,
    *,
    cfg: ModelConfig,
) -> tuple[Float[Array, "b V"], State]:
    """Logits after the last token only: those of a whole prompt would be the largest array."""
    hidden, state = backbone(
        params, tokens, state, cfg=cfg, lengths=lengths, dtype=params.head.dtype
    )
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, 1)[:, 0]
    return head(params, last), state


Carry = tuple[Array, Array, DecodeState[Array]]
"""The carry of the decode loop: its step, the tokens so far, the state."""


@jit_by_rows
def decode(
    params: Model[Array],
    decoding: DecodeState[Array],
    settings: Settings[Array],
    vocabulary: Vocabulary[Array],
    steps: int | Int[Array, ""],
    *,
    cfg: ModelConfig,
    end: int | Int[Array, ""],
) -> tuple[Int[Array, "b BLOCK"], DecodeState[Array]]:
    """Draws up to `steps` (at most `BLOCK`) tokens in every row: the tokens, and the state after.

    A row is done with the token `end`, its last, or with `NOT_FINITE` where its logits are not
    finite; `NO_TOKEN`s follow. The loop stops early when all rows are done, so a single row's state
    is the one after its last token (that of a row done before others is undefined). `steps` and
    `end` are traced: one program serves all values.
    """

    def unfinished(carry: Carry) -> Array:
        step, _, now = carry
        return (step < steps) & ~jnp.all(now.done)

    def step(carry: Carry) -> Carry:
        index, tokens, now = carry
        with jax.named_scope("sample"):
            token, finite = _next_token(now, settings, vocabulary)
        output = jnp.where(now.done, NO_TOKEN, jnp.where(finite, token, NOT_FINITE))
        counts = count_tokens(now.counts, token, settings, vocabulary)
        logits, state = forward(params, token[:, None], now.state, cfg=cfg, dtype=params.head.dtype)
        after = DecodeState(
            state=state,
            logits=logits[:, 0],
            counts=counts,
            keys=now.keys,
            drawn=now.drawn + 1,
            done=now.done | (token == end) | ~finite,
        )
        return index + 1, lax.dynamic_update_index_in_dim(tokens, output, index, 1), after

    tokens = jnp.full((decoding.done.shape[0], BLOCK), NO_TOKEN, jnp.int32)
    _, tokens, decoding = lax.while_loop(unfinished, step, (jnp.int32(0), tokens, decoding))
    return tokens, decoding


def _next_token(
    decoding: DecodeState[Array], settings: Settings[Array], vocabulary: Vocabulary[Array]
) -> tuple[Int[Array, " b"], Bool[Array, " b"]]:
    """A token for each row, and whether it could be drawn."""
    logits = apply_penalties(decoding.logits, decoding.counts, settings)
    logits = jnp.where(vocabulary.allowed[None], logits, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in)(decoding.keys, decoding.drawn)
    # The maximum is NaN if any logit is, and drawing needs it in any case.
    return sample(logits, keys, settings), jnp.isfinite(jnp.max(logits, axis=-1))
