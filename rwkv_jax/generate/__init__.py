"""Sampling: prefill, the jitted decode loop, and the transforms of logits."""

from rwkv_jax.generate.session import (
    Piece,
    Sampling,
    Session,
    Writer,
    generate,
    generate_with,
)

__all__ = ["Piece", "Sampling", "Session", "Writer", "generate", "generate_with"]
