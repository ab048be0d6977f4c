"""The part of a model's parameters that is trained: all but what `train.freeze` names.

A frozen parameter has no gradient and no moments. Of a parameter that is frozen in some layers
only, the others' gradients and moments are kept.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial

import jax
import jax.numpy as jnp

from rwkv_jax import models
from rwkv_jax.checkpoint.keymaps import names_of, table
from rwkv_jax.config import ModelConfig
from rwkv_jax.params import is_spec
from rwkv_jax.training.folder import RunError
from rwkv_jax.typing import PyTree


@dataclass(frozen=True)
class Trainable:
    """What of each parameter is trained, in the order of the parameters' leaves: all (None), or
    these layers."""

    layers: tuple[tuple[int, ...] | None, ...]
    specs: PyTree
    """The `ParamSpec`s of the trained part, a tree as `take` returns it."""

    def take(self, params: PyTree) -> PyTree:
        """The trained part: a tree of the same structure, with None for frozen parameters and the
        trained layers of those that are frozen in part."""
        leaves, tree = jax.tree.flatten(params)
        return tree.unflatten(map(_chosen, leaves, self.layers))

    def put(self, params: PyTree, trained: PyTree) -> PyTree:
        """The parameters with another trained part."""
        leaves, tree = jax.tree.flatten(params)
        parts = zip(leaves, tree.flatten_up_to(trained), self.layers, strict=True)
        return tree.unflatten([_with_part(*part) for part in parts])


def trainable(model: ModelConfig, freeze: Sequence[str] = ()) -> Trainable:
    """All parameters but those whose official names match one of the patterns.

    Raises `RunError` for a pattern that matches none, and if nothing is left to train.
    """
    specs = table(model)
    names = {path: names_of(path, spec) for path, spec in specs.items()}
    for pattern in freeze:
        every = [name for some in names.values() for name in some]
        if not any(map(partial(_matches, pattern), every)):
            near = get_close_matches(pattern, every, n=1) or [every[0]]
            raise RunError(
                f"train.freeze: no parameter matches {pattern!r}; names are like {near[0]}"
                " (rwkv-jax inspect MODEL --tensors lists them)"
            )
    chosen, parts = [], []
    for path, spec in specs.items():
        left = [
            layer
            for layer, name in enumerate(names[path])
            if not any(_matches(pattern, name) for pattern in freeze)
        ]
        whole = len(left) == len(names[path])
        chosen.append(None if whole else tuple(left))
        parts.append(spec if whole else replace(spec, layers=len(left)) if left else None)
    if not any(parts):
        raise RunError(f"train.freeze = {list(freeze)} leaves nothing to train; freeze less")
    tree = jax.tree.structure(models.specs(model), is_leaf=is_spec)
    return Trainable(tuple(chosen), tree.unflatten(parts))


def _matches(pattern: str, name: str) -> bool:
    """As `fnmatch`, but `[2-11]` is any of these numbers."""
    found = re.search(r"\[(\d+)-(\d+)\]", pattern)
    if not found:
        return fnmatchcase(name, pattern)
    start, end = found.span()
    numbers = range(int(found[1]), int(found[2]) + 1)
    return any(_matches(f"{pattern[:start]}{i}{pattern[end:]}", name) for i in numbers)


def _chosen(x: jax.Array, layers: tuple[int, ...] | None) -> jax.Array | None:
    if layers is None:
        return x
    return _joined([x[layer : layer + 1] for layer in layers]) if layers else None


def _with_part(
    x: jax.Array, part: jax.Array | None, layers: tuple[int, ...] | None
) -> jax.Array | None:
    if layers is None:
        return part
    if part is None:
        return x
    # Slices, as a scatter into a sharded array has no gradient.
    places = {layer: i for i, layer in enumerate(layers)}
    picked = [(part, places[i]) if i in places else (x, i) for i in range(len(x))]
    return _joined([source[i : i + 1] for source, i in picked])


def _joined(slices: list[jax.Array]) -> jax.Array:
    return slices[0] if len(slices) == 1 else jnp.concatenate(slices)
