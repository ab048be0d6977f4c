"""RWKV language models in JAX: train like a transformer, run like an RNN.

`import rwkv_jax` loads nothing heavy: each name below is imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rwkv_jax import states, wkv
    from rwkv_jax.checkpoint.weights import load, save
    from rwkv_jax.config import ModelConfig
    from rwkv_jax.models import forward, init_params, init_state, stack, unstack
    from rwkv_jax.wkv import wkv4, wkv6, wkv7

_HOMES = {
    "ModelConfig": "rwkv_jax.config",
    "forward": "rwkv_jax.models",
    "init_params": "rwkv_jax.models",
    "init_state": "rwkv_jax.models",
    "stack": "rwkv_jax.models",
    "unstack": "rwkv_jax.models",
    "wkv4": "rwkv_jax.wkv",
    "wkv6": "rwkv_jax.wkv",
    "wkv7": "rwkv_jax.wkv",
    "load": "rwkv_jax.checkpoint.weights",
    "save": "rwkv_jax.checkpoint.weights",
}
_ROOMS = ("states", "wkv")
"""Modules that are named as such: `rwkv_jax.states.take`."""

__all__ = [
    "ModelConfig",
    "forward",
    "init_params",
    "init_state",
    "load",
    "save",
    "stack",
    "states",
    "unstack",
    "wkv",
    "wkv4",
    "wkv6",
    "wkv7",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"rwkv_jax.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
