"""RWKV language models in JAX: train like a transformer, run like an RNN.

`import rwkv_jax` loads nothing heavy: each name below is imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rwkv_jax.lazily import submodules

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rwkv_jax import adapters as adapters
    from rwkv_jax import evaluation as evaluation
    from rwkv_jax import models as models
    from rwkv_jax import sampling as sampling
    from rwkv_jax import states as states
    from rwkv_jax import wkv as wkv
    from rwkv_jax.checkpoint.fingerprint import fingerprint as fingerprint
    from rwkv_jax.checkpoint.weights import load as load
    from rwkv_jax.checkpoint.weights import load_with_tokenizer as load_with_tokenizer
    from rwkv_jax.checkpoint.weights import save as save
    from rwkv_jax.config import ModelConfig as ModelConfig
    from rwkv_jax.models import backbone as backbone
    from rwkv_jax.models import forward as forward
    from rwkv_jax.models import head as head
    from rwkv_jax.models import init_params as init_params
    from rwkv_jax.models import init_state as init_state
    from rwkv_jax.models import log_probs as log_probs
    from rwkv_jax.models import stack as stack
    from rwkv_jax.models import unstack as unstack
    from rwkv_jax.sampling import generate as generate
    from rwkv_jax.wkv import wkv4 as wkv4
    from rwkv_jax.wkv import wkv6 as wkv6
    from rwkv_jax.wkv import wkv7 as wkv7

_NAMES = {
    "checkpoint.fingerprint": ("fingerprint",),
    "checkpoint.weights": ("load", "load_with_tokenizer", "save"),
    "config": ("ModelConfig",),
    "models": (
        *("backbone", "forward", "head", "init_params", "init_state", "log_probs"),
        *("stack", "unstack"),
    ),
    "sampling": ("generate",),
    "wkv": ("wkv4", "wkv6", "wkv7"),
}
_MODULES = ("adapters", "evaluation", "models", "sampling", "states", "wkv")
"""Public ones; every other module is an attribute too."""
_HOMES = {name: f"rwkv_jax.{home}" for home, names in _NAMES.items() for name in names}
__all__ = (*_HOMES, *_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    return submodules(__name__)(name)


def __dir__() -> list[str]:
    return sorted((*__all__, "__version__"))
