"""The models: one file for each version, and `model.py` for what they share."""

from rwkv_jax.models.model import (
    VERSIONS,
    Model,
    abstract_params,
    as_tuned,
    backbone,
    check_params,
    check_state,
    forward,
    head,
    init_params,
    init_state,
    log_probs,
    specs,
    stack,
    state_rms,
    unstack,
)
from rwkv_jax.models.state import BlockState, State
from rwkv_jax.models.version import Block, Version, block

__all__ = [
    "VERSIONS",
    "Block",
    "BlockState",
    "Model",
    "State",
    "Version",
    "abstract_params",
    "as_tuned",
    "backbone",
    "block",
    "check_params",
    "check_state",
    "forward",
    "head",
    "init_params",
    "init_state",
    "log_probs",
    "specs",
    "stack",
    "state_rms",
    "unstack",
]
