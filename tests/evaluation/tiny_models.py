"""Tiny models to evaluate, and what they predict, computed one token at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from official_weights import checkpoint

from rwkv_jax import models
from rwkv_jax.checkpoint.keymaps import from_official
from rwkv_jax.config import ModelConfig
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.nn import Norm

EOD = ByteTokenizer.eod


@functools.cache
def model(version, tuned=False):
    """(params, cfg) of a tiny random model of bytes."""
    size = {"layers": 2, "width": 32, "head": 16, "vocab": ByteTokenizer.vocab_size}
    return from_official(checkpoint(version, **size, tuned=tuned))


@functools.cache
def _reader(version, tuned):
    params, cfg = model(version, tuned)

    def step(state, token):
        logits, state = models.forward(params, token[None, None], state, cfg=cfg)
        return state, logits[0, 0]

    return jax.jit(lambda ids: lax.scan(step, models.init_state(cfg, 1, params), ids)[1])


def log_p_of_next(version, ids, tuned=False):
    """float64 [t, V]: log p of every token after `eod`, and after each id but the last."""
    read = np.zeros(128, np.int32)  # one length serves all, as what comes after does not matter
    read[: len(ids)] = [EOD, *ids[:-1]]
    logits = np.float64(_reader(version, tuned)(read)[: len(ids)])
    logits -= logits.max(1, keepdims=True)
    return logits - np.log(np.sum(np.exp(logits), 1, keepdims=True))


def nats(version, ids, tuned=False):
    """float64 [t]: what each id of a document costs."""
    return -log_p_of_next(version, ids, tuned)[np.arange(len(ids)), ids]


def guesser(shares):
    """(params, cfg) of a model that always predicts the same: these bytes in these shares, and the
    other tokens alike in what is left."""
    cfg = ModelConfig(version="4", layers=1, width=32, vocab_size=ByteTokenizer.vocab_size)
    p = np.full(cfg.vocab_size, (1 - sum(shares.values())) / (cfg.vocab_size - len(shares)))
    p[[1 + ord(letter) for letter in shares]] = list(shares.values())
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), models.abstract_params(cfg))
    ones = jnp.ones(cfg.width)
    head = jnp.asarray(np.tile(np.log(p) / cfg.width, (cfg.width, 1)), jnp.float32)
    return params.replace(head=head, ln_out=Norm(0 * ones, ones)), cfg
