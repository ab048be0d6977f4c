"""Floating-point operations of a training step: those that the model needs, those of a program.

A product of [m, k] and [k, n] has 2 m k n. The model needs for a token, forward and backward:

    6 x (entries of its matrices, without the embedding) + 3 x (products of the recurrence)

where the recurrence has, for each channel of a head of size n, in version 7: 8 n (S a, its product
with b, v k, S r), in versions 5 and 6: 4 n, in version 4: none. MFU is computed from this number,
whatever a program computes. A frozen matrix has no gradient: 4 for 6, and 6 for each number beside
it that is trained. A program computes more: chunked forms trade products for parallelism,
and rematerialisation computes some twice.
"""

import math
from typing import Any

import jax

from rwkv_jax import models, tuning
from rwkv_jax.config import Config, ModelConfig
from rwkv_jax.params import is_spec


def model_flops(cfg: ModelConfig) -> int:
    """Operations per token in training, by the formula above."""
    per_channel = models.VERSIONS[cfg.version].recurrence_flops * cfg.head_size
    recurrence = per_channel * cfg.width * cfg.layers
    return 6 * _entries(cfg) + 3 * recurrence


def _entries(cfg: ModelConfig) -> int:
    """Of the matrices, without the embedding."""
    table = models.specs(cfg)
    matrices = [
        math.prod(spec.full_shape)
        for spec in jax.tree.leaves(table, is_leaf=is_spec)
        if len(spec.shape) > 1
    ]
    return sum(matrices) - math.prod(table.emb.full_shape)


def needed_flops(cfg: Config) -> int:
    """Operations per token of a run's training, by the formula above."""
    if cfg.tune.method == "full":
        return model_flops(cfg.model)
    adapter = tuning.specs(cfg.model, cfg.tune)
    matrices = [
        math.prod(spec.full_shape) for spec in jax.tree.leaves(adapter.low_rank, is_leaf=is_spec)
    ]
    return model_flops(cfg.model) - 2 * _entries(cfg.model) + 6 * sum(matrices)


def program_flops(jaxpr: Any) -> int:
    """Operations of all matrix products of a traced program, on all devices together.

    A loop counts as often as it runs, of branches the most expensive counts, and a kernel counts
    for each of its programs.
    """
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: Any) -> int:
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        depth = math.prod(shape[axis] for axis in contracted)
        return 2 * depth * math.prod(equation.outvars[0].aval.shape)
    inner = [program_flops(jaxpr) for jaxpr in _programs(equation.params)]
    if not inner:
        return 0
    if equation.primitive.name == "cond":
        return max(inner)
    return _times(equation) * sum(inner)


def _programs(params: dict[str, Any]) -> list[Any]:
    """The jaxprs within an equation."""
    found = []
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            program = getattr(one, "jaxpr", one)
            if hasattr(program, "eqns"):
                found.append(program)
    return found


def _times(equation: Any) -> int:
    """How often an equation runs its jaxprs."""
    params = equation.params
    if equation.primitive.name == "scan":
        return params["length"]
    if equation.primitive.name == "shard_map":
        sizes = dict(params["mesh"].shape)
        return math.prod(sizes[name] for name in params["newly_manual_axes"])
    if equation.primitive.name == "pallas_call":
        return math.prod(int(n) for n in params["grid_mapping"].grid)
    return 1
