"""The models: one file a version, and `model.py` for what they share."""

from rwkv_jax.models.model import (
    VERSIONS,
    Model,
    State,
    abstract_params,
    backbone,
    forward,
    head,
    init_params,
    init_state,
    specs,
    stack,
    unstack,
)

__all__ = [
    "VERSIONS",
    "Model",
    "State",
    "abstract_params",
    "backbone",
    "forward",
    "head",
    "init_params",
    "init_state",
    "specs",
    "stack",
    "unstack",
]
