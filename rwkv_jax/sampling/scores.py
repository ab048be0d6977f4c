"""Log-probabilities of the tokens drawn, by the model alone: before penalties, temperature and
truncation, over all of its rows, as `eval` has them."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rwkv_jax.errors import UserError
from rwkv_jax.sampling.settings import check_number
from rwkv_jax.typing import Array, Bool, Float, Int

MOST = 128
"""Alternatives that can be asked for."""


@dataclass(frozen=True)
class TokenScore:
    """A token that was drawn."""

    token: int
    logprob: float
    """log p, in nats."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens at its place and their log p, in descending order."""


def check_alternatives(count: int | None) -> None:
    """Raises `UserError` unless `count` is None or a number of alternatives."""
    if count is None:
        return
    check_number("logprobs", count, whole=True)
    if not 0 <= count <= MOST:
        raise UserError(f"logprobs {count}: between 0 and {MOST} alternatives")


def score(
    logits: Float[Array, "b V"], allowed: Bool[Array, " V"], tokens: np.ndarray, count: int
) -> list[TokenScore | None]:
    """The scores of one token for each row, with `count` alternatives; None for a negative id."""
    count = min(count, int(allowed.sum()))
    found = _score(logits, allowed, jnp.asarray(np.maximum(tokens, 0)), count=count)
    chosen, values, ids = (np.asarray(x) for x in found)
    return [
        None
        if token < 0
        else TokenScore(int(token), float(p), tuple(zip(i.tolist(), v.tolist(), strict=True)))
        for token, p, v, i in zip(tokens, chosen, values, ids, strict=True)
    ]


@partial(jax.jit, static_argnames="count")
def _score(
    logits: Float[Array, "b V"], allowed: Bool[Array, " V"], tokens: Int[Array, " b"], *, count: int
) -> tuple[Float[Array, " b"], Float[Array, "b n"], Int[Array, "b n"]]:
    log_p = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(log_p, tokens[:, None], axis=1)[:, 0]
    return chosen, *lax.top_k(jnp.where(allowed[None], log_p, -jnp.inf), count)
