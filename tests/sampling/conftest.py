"""A tiny model of each version whose random weights make it write varied text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax import models
from rwkv_jax.config import ModelConfig
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.sampling import Generator

VOCAB = 260  # three more than the tokenizer has


def config(version, **changes):
    own = {} if version == "4" else {"head_size": 16}
    own |= {"rank_embed": 4} if version == "7a" else {}
    sizes = {"layers": 2, "width": 32, "vocab_size": VOCAB} | own | changes
    return ModelConfig(version=version, **sizes)


def weights(version, **changes):
    """Random, with a head that strongly prefers a token that the tokenizer lacks."""
    rng = np.random.default_rng(int(version[0]))
    shapes = models.abstract_params(config(version, **changes))
    params = jax.tree.map(
        lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32), shapes
    )
    params.ln_out.bias[:] = 1
    params.head[:, VOCAB - 2] = 1
    return jax.tree.map(jnp.asarray, params)


@pytest.fixture(scope="session", params=["4", pytest.param("6", marks=pytest.mark.slow), "7a"])
def generator(request):
    """A model of each recurrence, and one with tables indexed by token, that writes bytes."""
    return Generator(weights(request.param), config(request.param), ByteTokenizer())


@pytest.fixture(scope="session")
def generator7():
    """Version 7 alone, for tests in which the version makes no difference."""
    return Generator(weights("7"), config("7"), ByteTokenizer())
