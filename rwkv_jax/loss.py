"""The training objective: cross entropy of `hidden @ head`, the largest logit pulled towards zero.

The logits of a batch are the largest array of a training step (2,048 tokens x 65,536 words in
float32 are 512 MiB), so they never exist at once: the head, the softmax and their gradients are
made for one stretch of time after the other. Once a stretch's logits are there, their gradient is
one subtraction away; the forward pass therefore leaves the gradients of `hidden` and `head` behind
instead of logits, and the backward pass only scales them. Measured on two CPU cores at 2,048
tokens, width 512, forward and backward: vocabulary 65,536: 3.2 s, against 4.9 s when the backward
pass recomputes the logits (`jax.checkpoint`) and 5.4 s with all logits at once; vocabulary 4,096:
0.17 s against 0.24 s and 0.40 s.

For a token with logits z, log-partition Z = logsumexp z and largest logit m:

    loss = mean(Z - z[target]) + z_loss mean(Z^2)
    gradient of L2Wrap = l2wrap m / (b t), added at the largest logit (the value is unchanged)

A token's weight scales all of its terms. The mean's 1 / (b t) is part of every term, so the average
over the equal parts of an accumulated batch is that of the whole batch. (The official `L2Wrap` does
not scale so: there its weight grows with the number of parts.) Softmax, loss and accumulation are
float32, the matrix products are in the dtype of `hidden`.

Where types say that tokens or words are parted over devices, each makes the stretches of its own
tokens and the logits of its own words. What they have to tell each other: of each stretch a few
numbers a token, and the part of d_hidden that each has found; of the whole batch, once, the
gradient of the head.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from rwkv_jax import sharding
from rwkv_jax.typing import Array, Callable, Float, Int

CHUNK_LOGITS = 1 << 21
"""Logits that exist at once: 8 MiB of float32, which caches hold (measured best on CPU) ..."""
CHUNK_TOKENS = 512
"""... but no fewer tokens than this, or a large `head` and its gradient are read too often."""


def cross_entropy(
    hidden: Float[Array, "b t c"],
    head: Float[Array, "c V"],
    targets: Int[Array, "b t"],
    *,
    weight: Float[Array, "b t"] | None = None,
    l2wrap: float = 0.0,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss to differentiate, and its parts: `cross_entropy` (nats), `z_loss`, mean `max_logit`.

    `weight`: how much a token counts, in all terms (1 where None); the mean is over all b t tokens
    whatever it is. `chunk_tokens`: tokens whose logits exist at once; None chooses. Only
    reverse-mode derivatives exist, and only of the loss with respect to `hidden` and `head`.
    """
    if weight is None:
        weight = jnp.ones(targets.shape, jnp.float32)
    head = sharding.gather(head)
    outputs: Any = _objective(hidden, head, targets, weight, l2wrap, z_loss, chunk_tokens)
    loss, metrics = outputs
    return loss, jax.tree.map(lax.stop_gradient, metrics)


def token_nats(
    hidden: Float[Array, "b t c"],
    head: Float[Array, "c V"],
    targets: Int[Array, "b t"],
    *,
    chunk_tokens: int | None = None,
) -> Float[Array, "b t"]:
    """-log p(target) of every token, in nats: what evaluation sums."""

    def run(hidden, head, targets, tokens, words):
        chunks = _chunks(hidden, head, chunk_tokens)

        def stretch(_, inputs):
            hidden, targets = inputs
            nats, _, _ = _token_terms(_logits(hidden, head), targets, words)
            return None, nats

        _, nats = lax.scan(stretch, None, (_split(hidden, chunks), _split(targets, chunks)))
        return _join(nats, targets.shape[1])

    return _over_devices(run, "bt", hidden, head, targets)


def _chunks(hidden, head, chunk_tokens):
    """How many stretches of time the batch is cut into."""
    b, t, _ = hidden.shape
    chunk_tokens = chunk_tokens or max(CHUNK_TOKENS, CHUNK_LOGITS // head.shape[1])
    return min(t, -(-b * t // chunk_tokens))


def _split(x, chunks):
    """[b, t, ...] to [chunks, b, ceil(t / chunks), ...]; the last stretch is padded with zeros.

    Time is cut, not the flattened tokens: a batch axis spread over devices stays where it is.
    """
    size = -(-x.shape[1] // chunks)
    x = jnp.pad(x, [(0, 0), (0, chunks * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], chunks, size, *x.shape[2:]), 1, 0)


def _join(x, t):
    """The inverse of `_split`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :t]


def _logits(hidden, head):
    return jnp.einsum(
        "btc,cV->btV", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
    )


def _token_terms(logits, targets, words):
    """Per token: -log p(target), the log-partition and the largest logit, of the logits that are
    parted over the mesh axes `words`."""
    largest = jnp.max(logits, -1)
    largest = lax.pmax(largest, words) if words else largest
    total = jnp.sum(jnp.exp(logits - largest[..., None]), -1)
    place = targets - _first_word(logits, words)
    own = jnp.clip(place, 0, logits.shape[-1] - 1) if words else place
    target = jnp.take_along_axis(logits, own[..., None], -1)[..., 0]
    if words:
        total, target = lax.psum((total, jnp.where(own == place, target, 0.0)), words)
    partition = largest + jnp.log(total)
    return partition - target, partition, largest


def _first_word(logits, words):
    """The id of the first word that this device has."""
    return lax.axis_index(words) * logits.shape[-1] if words else 0


def _over_devices(run: Callable, outputs: Any, hidden: Array, head: Array, *more: Array) -> Any:
    """`run(hidden, head, *more, tokens=, words=)` on every device of its part, where types say that
    there are any; it is told the mesh axes that tokens and words are parted over. `more` and what
    comes out are parted as letters say: a tree of `b`, `t`, `c`, `V` for each axis."""
    if not sharding.is_explicit():
        return run(hidden, head, *more, tokens=(), words=())
    parts = dict(zip("btcV", (*jax.typeof(hidden).sharding.spec, None), strict=True))
    parts["V"] = jax.typeof(head).sharding.spec[1]

    def spec(letters: str) -> PartitionSpec:
        return PartitionSpec(*(parts[letter] for letter in letters))

    names = {letter: sharding.names_of(part) for letter, part in parts.items()}
    run = partial(run, tokens=names["b"] + names["t"], words=names["V"])
    specs = (spec("btc"), spec("cV"), *(spec("bt") for _ in more))
    out_specs = jax.tree.map(spec, outputs)
    return sharding.over_devices(run, specs, out_specs, hidden, head, *more)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _objective(hidden, head, targets, weight, l2wrap, z_loss, chunk_tokens):
    """Without derivatives: one pass over the stretches that keeps three numbers."""

    def run(hidden, head, targets, weight, tokens, words):
        def stretch(sums, inputs):
            hidden, targets, weight = inputs
            terms = _token_terms(_logits(hidden, head), targets, words)
            return _add_terms(sums, terms, weight), None

        chunks = _chunks(hidden, head, chunk_tokens)
        sums, _ = lax.scan(stretch, _no_terms(), _stretches(hidden, targets, weight, chunks))
        return lax.psum(sums, tokens) if tokens else sums

    outputs = dict.fromkeys(TERMS, "")
    sums = _over_devices(run, outputs, hidden, head, targets, weight)
    return _value(sums, targets.size, z_loss)


def _objective_forward(hidden, head, targets, weight, l2wrap, z_loss, chunk_tokens):
    run = partial(_with_gradients, targets.size, l2wrap, z_loss, chunk_tokens)
    outputs = (dict.fromkeys(TERMS, ""), "btc", "cV")
    sums, d_hidden, d_head = _over_devices(run, outputs, hidden, head, targets, weight)
    return _value(sums, targets.size, z_loss), (d_hidden, d_head.astype(head.dtype))


def _with_gradients(
    count, l2wrap, z_loss, chunk_tokens, hidden, head, targets, weight, tokens, words
):
    """The sums over all tokens, and the gradients of the mean's `hidden` and `head`."""

    def stretch(carry, inputs):
        sums, d_head = carry
        hidden, targets, weight = inputs
        logits = _logits(hidden, head)
        terms = _token_terms(logits, targets, words)
        _, partition, largest = (term[..., None] for term in terms)
        ids = lax.broadcasted_iota(jnp.int32, logits.shape, 2) + _first_word(logits, words)
        d_logits = jnp.exp(logits - partition) * (1 + 2 * z_loss * partition)
        d_logits -= (ids == targets[..., None]).astype(jnp.float32)
        if l2wrap:
            # Equal largest logits, rare in float32, are all pulled: an argmax costs a tenth more.
            d_logits += jnp.where(logits == largest, l2wrap * largest, 0.0)
        d_logits = (d_logits * (weight / count)[..., None]).astype(hidden.dtype)
        d_hidden = jnp.einsum("btV,cV->btc", d_logits, head.astype(hidden.dtype))
        d_hidden = lax.psum(d_hidden, words) if words else d_hidden
        d_head += jnp.einsum("btc,btV->cV", hidden, d_logits, preferred_element_type=jnp.float32)
        return (_add_terms(sums, terms, weight), d_head), d_hidden

    carry = (_no_terms(), jnp.zeros(head.shape, jnp.float32))
    chunks = _chunks(hidden, head, chunk_tokens)
    parts = _stretches(hidden, targets, weight, chunks)
    (sums, d_head), d_hidden = lax.scan(stretch, carry, parts)
    sums, d_head = lax.psum((sums, d_head), tokens) if tokens else (sums, d_head)
    return sums, _join(d_hidden, hidden.shape[1]), d_head


def _objective_backward(l2wrap, z_loss, chunk_tokens, gradients, cotangents):
    d_hidden, d_head = gradients
    scale, _ = cotangents
    return d_hidden * scale.astype(d_hidden.dtype), d_head * scale.astype(d_head.dtype), None, None


_objective.defvjp(_objective_forward, _objective_backward)


def _stretches(hidden, targets, weight, chunks):
    """What a scan over time reads; padding has no weight."""
    return _split(hidden, chunks), _split(targets, chunks), _split(weight, chunks)


TERMS = ("cross_entropy", "z_loss", "max_logit")


def _no_terms():
    return {name: jnp.zeros((), jnp.float32) for name in TERMS}


def _add_terms(sums, terms, weight):
    nats, partition, largest = terms
    return {
        "cross_entropy": sums["cross_entropy"] + jnp.sum(nats * weight),
        "z_loss": sums["z_loss"] + jnp.sum(jnp.square(partition) * weight),
        "max_logit": sums["max_logit"] + jnp.sum(largest * weight),
    }


def _value(sums, count, z_loss):
    means = jax.tree.map(lambda x: x / count, sums)
    means["z_loss"] = z_loss * means["z_loss"]
    return means["cross_entropy"] + means["z_loss"], means
