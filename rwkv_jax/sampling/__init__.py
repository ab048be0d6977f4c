"""Sampling: prefill, the jitted decode loop, and the transforms of logits."""

from rwkv_jax.sampling.session import (
    Piece,
    Sampling,
    Session,
    Start,
    Writer,
    generate,
    generate_with,
)

__all__ = ["Piece", "Sampling", "Session", "Start", "Writer", "generate", "generate_with"]
