"""The training objective: cross entropy of `hidden @ head`, and a pull of the largest logit to 0.

The logits of a batch are the largest array of a training step (2,048 tokens x 65,536 words in
float32 are 512 MiB), so they never exist at once: head, softmax and their gradients are computed
for one chunk of time after the other. With a chunk's logits at hand, their gradient is one
subtraction away. The forward pass therefore saves the gradients of `hidden` and `head` instead of
logits, and the backward pass only scales them. A head that is not differentiated has none. On two
CPU cores at 2,048 tokens and width 512, forward and backward took 3.2 s with a vocabulary of
65,536, against 4.9 s when the backward pass recomputes the logits (`jax.checkpoint`) and 5.4 s with
all logits at once; with a vocabulary of 4,096, 0.17 s against 0.24 s and 0.40 s.

For a token with logits z, log-partition Z = logsumexp z and largest logit m:

    loss = mean(Z - z[target]) + z_loss mean(Z^2)
    gradient of L2Wrap = l2wrap m / (b t), added at the largest logit (the value is unchanged)

A token's weight scales all of its terms. The mean's 1 / (b t) is part of every term, so that the
average over the parts of an accumulated batch is that of the whole batch. (The official `L2Wrap`
does not scale: its weight grows with the number of parts.) Softmax, loss and accumulation are
float32, matrix products are in the dtype of `hidden`.

Where a mesh shards tokens or vocabulary, each device computes the chunks of its own tokens and the
logits of its own words. Per chunk, devices exchange a few numbers a token and sum their parts of
d_hidden; the gradient of the head is summed once per batch.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rwkv_jax import sharding
from rwkv_jax.nn import precise_dtype
from rwkv_jax.typing import Array, Callable, Float, Int

CHUNK_LOGITS = 1 << 21
"""Logits that exist at once: 8 MiB of float32, which fits caches, the fastest on CPU."""
CHUNK_TOKENS = 512
"""Tokens that a chunk has at least, or a large `head` and its gradient are read too often."""


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

    `weight` scales all terms of a token (None: 1); the mean is over all b t tokens always.
    `chunk_tokens` is the number of tokens whose logits exist at once; None chooses. Differentiable
    in reverse mode only, with respect to `hidden` and `head`.
    """
    wide = precise_dtype(hidden.dtype)
    weight = jnp.ones(targets.shape, wide) if weight is None else weight.astype(wide)
    terms = _Terms(targets.size, l2wrap, z_loss, chunk_tokens)
    outputs: Any = _objective(hidden, sharding.gather(head), targets, weight, terms)
    loss, metrics = outputs
    return loss, jax.tree.map(lax.stop_gradient, metrics)


def token_nats(
    hidden: Float[Array, "b t c"],
    head: Float[Array, "c V"],
    targets: Int[Array, "b t"],
    *,
    chunk_tokens: int | None = None,
) -> Float[Array, "b t"]:
    """-log p(target) of every token, in nats. Differentiable in reverse mode, with respect to
    `hidden` and `head`; the backward pass computes the logits again."""
    return _nats(hidden, sharding.gather(head), targets, chunk_tokens)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _nats(hidden, head, targets, chunk_tokens):
    def run(hidden, head, targets, tokens, words):
        def chunk(_, inputs):
            hidden, targets = inputs
            nats, _, _ = _token_terms(_logits(hidden, head), targets, words)
            return None, nats

        return _over_chunks(chunk, None, head, (hidden, targets), chunk_tokens)[1]

    return _on_shards(run, "bt", hidden, head, targets)


def _nats_forward(hidden, head, targets, chunk_tokens):
    frozen, hidden, head, targets = not head.perturbed, hidden.value, head.value, targets.value
    # A tree without leaves says that the head is frozen: numbers would be traced.
    return _nats(hidden, head, targets, chunk_tokens), (hidden, head, targets, {} if frozen else ())


def _nats_backward(chunk_tokens, saved, d_nats):
    hidden, head, targets, kind = saved
    terms = _Terms(1, 0.0, 0.0, chunk_tokens)
    return *_gradients(terms, hidden, head, targets, d_nats, kind == {})[1:], None


_nats.defvjp(_nats_forward, _nats_backward, symbolic_zeros=True)


def _over_chunks(chunk, carry, head, arrays, chunk_tokens):
    """`lax.scan(chunk, carry, arrays)` over chunks of the time of `arrays` [b, t, ...].

    Time is split, not the flattened tokens, so that a sharded batch axis stays as it is. Zeros pad
    the last chunk.
    """
    b, t = arrays[0].shape[:2]
    chunk_tokens = chunk_tokens or max(CHUNK_TOKENS, CHUNK_LOGITS // head.shape[1])
    chunks = min(t, -(-b * t // chunk_tokens))
    size = -(-t // chunks)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, chunks * size - t)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, chunks, size, *x.shape[2:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(b, -1, *x.shape[3:])[:, :t]

    carry, out = lax.scan(chunk, carry, jax.tree.map(split, arrays))
    return carry, jax.tree.map(join, out)


def _logits(hidden, head):
    return jnp.einsum(
        "btc,cV->btV",
        hidden,
        head.astype(hidden.dtype),
        preferred_element_type=precise_dtype(hidden.dtype),
    )


def _token_terms(logits, targets, words):
    """Per token: -log p(target), the log-partition and the largest logit. The mesh axes `words`
    shard the logits by vocabulary."""
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
    """The id of the first word of this device's shard."""
    return lax.axis_index(words) * logits.shape[-1] if words else 0


def _on_shards(run: Callable, out_axes: Any, hidden: Array, head: Array, *more: Array) -> Any:
    """`run(hidden, head, *more, tokens=, words=)` on every device of its shards; `tokens` and
    `words` are the mesh axes that shard the tokens (b, t) and the vocabulary (V)."""
    axes = sharding.axes_of(("btc", "cV"), (hidden, head))
    names = {letter: sharding.names_of(axes.get(letter)) for letter in "btV"}
    run = partial(run, tokens=names["b"] + names["t"], words=names["V"])
    if sharding.is_explicit():
        run = sharding.mapped(run, ("btc", "cV", *["bt"] * len(more)), out_axes, axes)
    return run(hidden, head, *more)


class _Terms(NamedTuple):
    """The objective's constants; `tokens` is the number of the whole batch."""

    tokens: int
    l2wrap: float
    z_loss: float
    chunk_tokens: int | None


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _objective(hidden, head, targets, weight, settings):
    """Without derivatives: one pass over the chunks that sums three numbers."""

    def run(hidden, head, targets, weight, tokens, words):
        def chunk(sums, inputs):
            hidden, targets, weight = inputs
            terms = _token_terms(_logits(hidden, head), targets, words)
            return _add_terms(sums, terms, weight), None

        arrays = hidden, targets, weight
        sums, _ = _over_chunks(chunk, _no_terms(weight.dtype), head, arrays, settings.chunk_tokens)
        return lax.psum(sums, tokens) if tokens else sums

    outputs = dict.fromkeys(TERMS, "")
    return _value(_on_shards(run, outputs, hidden, head, targets, weight), settings)


def _objective_forward(hidden, head, targets, weight, settings):
    arrays = (x.value for x in (hidden, head, targets, weight))
    sums, d_hidden, d_head = _gradients(settings, *arrays, frozen=not head.perturbed)
    return _value(sums, settings), (d_hidden, d_head)


def _gradients(settings, hidden, head, targets, weight, frozen):
    """The sums over all tokens, and the gradients of the mean with respect to `hidden` and `head`;
    None for a head that is frozen."""
    outputs = (dict.fromkeys(TERMS, ""), "btc", None if frozen else "cV")
    run = partial(_with_gradients, settings, frozen)
    sums, d_hidden, d_head = _on_shards(run, outputs, hidden, head, targets, weight)
    return sums, d_hidden, None if frozen else d_head.astype(head.dtype)


def _with_gradients(settings, frozen, hidden, head, targets, weight, tokens, words):
    """`_gradients` of one device's tokens and words."""
    total, l2wrap, z_loss, chunk_tokens = settings
    wide = weight.dtype

    def chunk(carry, inputs):
        sums, d_head = carry
        hidden, targets, weight = inputs
        logits = _logits(hidden, head)
        terms = _token_terms(logits, targets, words)
        _, partition, largest = (term[..., None] for term in terms)
        ids = lax.broadcasted_iota(targets.dtype, logits.shape, 2) + _first_word(logits, words)
        d_logits = jnp.exp(logits - partition) * (1 + 2 * z_loss * partition)
        d_logits -= (ids == targets[..., None]).astype(logits.dtype)
        if l2wrap:
            # Equal largest logits, rare in float32, are all pulled: an argmax costs a tenth more.
            d_logits += jnp.where(logits == largest, l2wrap * largest, 0.0)
        d_logits = (d_logits * (weight / total)[..., None]).astype(hidden.dtype)
        d_hidden = jnp.einsum("btV,cV->btc", d_logits, head.astype(hidden.dtype))
        d_hidden = lax.psum(d_hidden, words) if words else d_hidden
        if not frozen:
            d_head += jnp.einsum("btc,btV->cV", hidden, d_logits, preferred_element_type=wide)
        return (_add_terms(sums, terms, weight), d_head), d_hidden

    d_head = None if frozen else jnp.zeros(head.shape, wide)
    carry, arrays = (_no_terms(wide), d_head), (hidden, targets, weight)
    carry, d_hidden = _over_chunks(chunk, carry, head, arrays, chunk_tokens)
    sums, d_head = lax.psum(carry, tokens) if tokens else carry
    return sums, d_hidden, d_head


def _objective_backward(settings, gradients, cotangents):
    scale, _ = cotangents
    return *jax.tree.map(lambda x: x * scale.astype(x.dtype), gradients), None, None


_objective.defvjp(_objective_forward, _objective_backward, symbolic_zeros=True)


TERMS = ("cross_entropy", "z_loss", "max_logit")


def _no_terms(dtype):
    return {name: jnp.zeros((), dtype) for name in TERMS}


def _add_terms(sums, terms, weight):
    nats, partition, largest = terms
    return {
        "cross_entropy": sums["cross_entropy"] + jnp.sum(nats * weight),
        "z_loss": sums["z_loss"] + jnp.sum(jnp.square(partition) * weight),
        "max_logit": sums["max_logit"] + jnp.sum(largest * weight),
    }


def _value(sums, settings):
    means = jax.tree.map(lambda x: x / settings.tokens, sums)
    means["z_loss"] = settings.z_loss * means["z_loss"]
    return means["cross_entropy"] + means["z_loss"], means
