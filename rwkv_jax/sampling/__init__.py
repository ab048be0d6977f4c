"""Sampling: prefill, the jitted decode loop, the transforms of logits, and text streams."""

from rwkv_jax.renamed import renamed
from rwkv_jax.sampling.decode import Prefix
from rwkv_jax.sampling.presets import PRESETS
from rwkv_jax.sampling.scores import TokenScore
from rwkv_jax.sampling.session import Session
from rwkv_jax.sampling.settings import Sampling
from rwkv_jax.sampling.stream import Generator, TextChunk, generate, generate_with

__all__ = [
    "PRESETS",
    "Generator",
    "Prefix",
    "Sampling",
    "Session",
    "TextChunk",
    "TokenScore",
    "generate",
    "generate_with",
]

__getattr__ = renamed(__name__, {"Piece": "TextChunk", "Start": "Prefix", "Writer": "Generator"})
