"""What a run trains: a model's parameters but for what `train.freeze` names, or an adapter.

What is frozen has no gradient and no moments. Of a parameter that is frozen in some layers only,
the others' gradients and moments are kept.
"""

import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial

import jax
import jax.numpy as jnp

from rwkv_jax import models, tuning
from rwkv_jax.checkpoint.keymaps import names_of, table
from rwkv_jax.config import Config
from rwkv_jax.params import is_spec
from rwkv_jax.training.folder import RunError
from rwkv_jax.typing import PyTree


def specs(cfg: Config) -> PyTree:
    """The table of a run's `TrainState.params`: the model's, or that of its adapter."""
    if cfg.tune.method == "full":
        return models.specs(cfg.model)
    try:
        tuning.tuned_layers(cfg.model, cfg.tune)
        return tuning.specs(cfg.model, cfg.tune)
    except ValueError as error:
        raise RunError(str(error)) from None


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


def trained_by(cfg: Config) -> Trainable:
    """What a run trains: all of its parameters, or of its adapter, but for those whose official
    names match one of the patterns in `train.freeze`.

    Raises `RunError` for a pattern that matches none, and if nothing is left to train.
    """
    parts, freeze = specs(cfg), cfg.train.freeze
    leaves, tree = jax.tree.flatten(parts, is_leaf=is_spec)
    names = _names(cfg, parts)
    every = [name for some in names for name in some if name]
    for pattern in freeze:
        if not any(map(partial(_matches, pattern), every)):
            near = get_close_matches(pattern, every, n=1) or [every[0]]
            raise RunError(
                f"train.freeze: no parameter matches {pattern!r}; names are like {near[0]}"
                " (rwkv-jax inspect MODEL --tensors lists them)"
            )
    chosen, left = [], []
    for spec, official in zip(leaves, names, strict=True):
        layers = tuple(
            layer
            for layer, name in enumerate(official)
            if name and not any(_matches(pattern, name) for pattern in freeze)
        )
        whole = len(layers) == len(official)
        chosen.append(None if whole else layers)
        left.append(spec if whole else replace(spec, layers=len(layers)) if layers else None)
    if not any(left):
        raise RunError(f"train.freeze = {list(freeze)} leaves nothing to train; freeze less")
    return Trainable(tuple(chosen), tree.unflatten(left))


def _names(cfg: Config, parts: PyTree) -> list[list[str]]:
    """The official names, one for each layer, of what a table's leaves are, or are a change of;
    empty for layers that `tune.layers` leaves out."""
    model, tune = cfg.model, cfg.tune
    if tune.method == "full":
        return [names_of(path, spec) for path, spec in table(model).items()]
    known, layers = table(model), tuning.tuned_layers(model, tune)

    def named(path: str, change: PyTree) -> PyTree:
        is_low_rank = path in parts.low_rank
        names = names_of(path, known.get(path) or change)
        tuned = [x if i in layers or not is_low_rank else "" for i, x in enumerate(names)]
        return jax.tree.map(lambda _: tuned, change, is_leaf=is_spec)

    found = tuning.mapped(named, parts)
    return jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, list))


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
