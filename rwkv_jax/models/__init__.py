"""The models: one file a version, and `model.py` for what they share."""

from rwkv_jax.models.model import (
    VERSIONS,
    Model,
    abstract_params,
    backbone,
    check_state,
    forward,
    head,
    init_params,
    init_state,
    specs,
    stack,
    unstack,
)
from rwkv_jax.models.state import BlockState, State

__all__ = [
    "VERSIONS",
    "BlockState",
    "Model",
    "State",
    "abstract_params",
    "backbone",
    "check_state",
    "forward",
    "head",
    "init_params",
    "init_state",
    "specs",
    "stack",
    "unstack",
]
