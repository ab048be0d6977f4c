"""The chunked loss equals the plain one, in value and gradient, L2Wrap and z-loss included."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax.loss import cross_entropy, token_nats

by_both = partial(jax.value_and_grad, argnums=(0, 1))


@partial(jax.jit, static_argnames=("b", "t", "c", "vocab", "dtype"))
def example(b=3, t=7, c=5, vocab=11, scale=2.0, dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (b, t, c), dtype)
    head = scale * jax.random.normal(keys[1], (c, vocab))
    return hidden, head, jax.random.randint(keys[2], (b, t), 0, vocab)


@jax.jit
def plain(hidden, head, targets, l2wrap, z_loss):
    logits = hidden @ head
    partition = jax.nn.logsumexp(logits, -1)
    nats = partition - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    pull = 0.5 * l2wrap * jnp.mean(jnp.max(logits, -1) ** 2)
    penalty = z_loss * jnp.mean(partition**2)
    return jnp.mean(nats) + penalty + pull - jax.lax.stop_gradient(pull)


plain_and_gradients = jax.jit(by_both(plain))


@pytest.mark.parametrize("chunk_tokens", [None, 1, 6, 9, 12])
@pytest.mark.parametrize("l2wrap, z_loss", [(0.0, 0.0), (0.3, 0.0), (0.3, 0.2)])
def test_value_and_gradients_are_those_of_all_logits_at_once(chunk_tokens, l2wrap, z_loss):
    hidden, head, targets = example()

    def chunked(hidden, head):
        # A factor behind the loss: the gradients must be scaled by what arrives from there.
        loss, _ = cross_entropy(
            hidden, head, targets, l2wrap=l2wrap, z_loss=z_loss, chunk_tokens=chunk_tokens
        )
        return 3.0 * loss

    value, gradients = plain_and_gradients(hidden, head, targets, l2wrap, z_loss)
    expected = jax.tree.map(lambda x: 3 * np.asarray(x), (value, gradients))
    actual = jax.jit(by_both(chunked))(hidden, head)
    undifferentiated = jax.jit(chunked)(hidden, head)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(undifferentiated, expected[0], rtol=1e-6)


def test_l2wrap_pulls_the_largest_logit_by_its_size_over_the_tokens():
    # With an identity head the gradient of `hidden` is that of the logits themselves.
    _, _, targets = example(c=11)
    hidden, head = example(c=11)[0], jnp.eye(11)

    @partial(jax.jit, static_argnums=0)
    def with_gradient(l2wrap):
        return jax.value_and_grad(lambda h: cross_entropy(h, head, targets, l2wrap=l2wrap)[0])(
            hidden
        )

    (value, gradient), (other, pulled) = with_gradient(0.0), with_gradient(1e-4)
    pull = np.asarray(pulled) - np.asarray(gradient)
    largest = np.asarray(hidden).max(-1)
    at_largest = np.asarray(hidden) == largest[..., None]
    np.testing.assert_allclose(pull[at_largest], 1e-4 * largest.ravel() / targets.size, atol=2e-9)
    np.testing.assert_array_equal(pull[~at_largest], 0.0)
    assert value == other


def test_token_nats_are_the_terms_of_the_mean():
    hidden, head, targets = example(t=8)
    nats = jax.jit(partial(token_nats, chunk_tokens=9))(hidden, head, targets)
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    expected = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(
        logits, np.asarray(targets)[..., None], -1
    ).squeeze(-1)
    np.testing.assert_allclose(nats, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_products_leave_a_float32_loss_that_survives_large_logits():
    hidden, head, targets = example(scale=2000.0, dtype="bfloat16")
    both = jax.value_and_grad(partial(cross_entropy, l2wrap=1e-4), argnums=(0, 1), has_aux=True)
    (loss, metrics), (d_hidden, d_head) = jax.jit(both)(hidden, head, targets)
    assert loss.dtype == jnp.float32
    assert jnp.isfinite(loss)
    assert (d_hidden.dtype, d_head.dtype) == (jnp.bfloat16, jnp.float32)
    rounded = head.astype(jnp.bfloat16).astype(jnp.float32)
    expected = plain(hidden.astype(jnp.float32), rounded, targets, 1e-4, 0.0)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["cross_entropy"], loss)


def test_logits_never_exist_all_at_once():
    b, t, c, vocab = 2, 1024, 16, 65536
    shapes = (
        jax.ShapeDtypeStruct((b, t, c), jnp.float32),
        jax.ShapeDtypeStruct((c, vocab), jnp.float32),
        jax.ShapeDtypeStruct((b, t), jnp.int32),
    )
    gradient = jax.grad(lambda h, w, y: cross_entropy(h, w, y, l2wrap=1e-4)[0], argnums=(0, 1))
    compiled = jax.jit(gradient).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.7 * 4 * b * t * vocab
