"""RWKV language models in JAX: train like a transformer, run like an RNN.

`import rwkv_jax` loads nothing heavy: each name below is imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rwkv_jax.renamed import renamed

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rwkv_jax import sampling as sampling
    from rwkv_jax import states as states
    from rwkv_jax import wkv as wkv
    from rwkv_jax.checkpoint.fingerprint import fingerprint as fingerprint
    from rwkv_jax.checkpoint.weights import load as load
    from rwkv_jax.checkpoint.weights import save as save
    from rwkv_jax.config import ModelConfig as ModelConfig
    from rwkv_jax.models import forward as forward
    from rwkv_jax.models import init_params as init_params
    from rwkv_jax.models import init_state as init_state
    from rwkv_jax.models import stack as stack
    from rwkv_jax.models import unstack as unstack
    from rwkv_jax.sampling import generate as generate
    from rwkv_jax.wkv import wkv4 as wkv4
    from rwkv_jax.wkv import wkv6 as wkv6
    from rwkv_jax.wkv import wkv7 as wkv7

_NAMES = {
    "checkpoint.fingerprint": ("fingerprint",),
    "checkpoint.weights": ("load", "save"),
    "config": ("ModelConfig",),
    "models": ("forward", "init_params", "init_state", "stack", "unstack"),
    "sampling": ("generate",),
    "wkv": ("wkv4", "wkv6", "wkv7"),
}
_MODULES = ("sampling", "states", "wkv")
_HOMES = {name: f"rwkv_jax.{home}" for home, names in _NAMES.items() for name in names}
__all__ = (*_HOMES, *_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"rwkv_jax.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    renamed(__name__, {})(name)


def __dir__() -> list[str]:
    return sorted((*__all__, "__version__"))
