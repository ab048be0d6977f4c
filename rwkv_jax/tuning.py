"""What tuning changes in a model, as a value beside its parameters.

An `Adapter` is a pytree: `jax.grad`, `vmap`, optimizers and meshes treat it as they treat
parameters. `on(params, adapter)` are parameters that every function of the package takes, and is
differentiable; `merge` adds the change to the weights for good.

    low_rank   W + scale down up, for matrices of layers (LoRA, arXiv:2106.09685), or a `Dora`
    whole      parameters in place of the model's
    state      the WKV state that documents start from (state tuning; versions 5 to 7)

Layers are stacked, as in the model: `down` is [layers, in, rank].
"""

from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Generic

import jax
import jax.numpy as jnp
from jax import lax

from rwkv_jax import models
from rwkv_jax import params as tables
from rwkv_jax.config import ModelConfig, TuneConfig
from rwkv_jax.containers import container
from rwkv_jax.models import Model
from rwkv_jax.nn import Adapted, LowRank
from rwkv_jax.params import ParamSpec, is_spec, path_name, uniform, zeros
from rwkv_jax.typing import Array, Callable, Leaf, PRNGKeyArray

STATE = "blocks.att.time_state"
"""The path of the state that documents start from."""


@container
class Dora(LowRank[Leaf]):
    """A change of a matrix W to `magnitude (W + scale down up) / norm`, the norm of each output's
    column (DoRA, arXiv:2402.09353 §4.1). Read from files and merged, not trained."""

    magnitude: Leaf  # [o]; 0 in layers that are not changed


@container
class Adapter(Generic[Leaf]):
    """A change of a model. Keys are paths of parameters, `blocks.att.key`."""

    low_rank: Any  # {path: LowRank}
    whole: Any  # {path: array}
    state: Leaf | None = None  # [layers, h, v, k]


def specs(cfg: ModelConfig, tune: TuneConfig) -> Adapter[ParamSpec]:
    """The table of an adapter's arrays: initial values, axes of a mesh, groups of the optimizer.

    `down` starts uniform in +-1 / sqrt(in), as `peft` has it, and `up` at zero, so that the model
    starts unchanged. Neither decays. Raises `ValueError` for a target that is not in the model.
    """
    if tune.method == "state":
        return Adapter({}, {}, _state_spec(cfg))
    table = parameters(cfg)
    matrices = {path: spec for path, spec in table.items() if adaptable(path, spec)}
    scale = tune.alpha / (tune.rank**0.5 if tune.rslora else tune.rank)
    low_rank = {
        path: _low_rank_spec(matrices[path], tune, scale)
        for path in _chosen(tune.targets, matrices, "tune.targets")
    }
    rest = {path: spec for path, spec in table.items() if path not in low_rank}
    whole = {path: rest[path] for path in _chosen(tune.also, rest, "tune.also")}
    return Adapter(low_rank, whole)


def _state_spec(cfg: ModelConfig) -> ParamSpec:
    if cfg.version == "4":
        raise ValueError("version 4 has no state that can be tuned: its sums share an exponent")
    h, n = cfg.heads, cfg.head_size
    return ParamSpec((h, n, n), zeros, cfg.layers, ("heads", None, None))


def _low_rank_spec(matrix: ParamSpec, tune: TuneConfig, scale: float) -> LowRank[ParamSpec]:
    (i, o), (inside, outside) = matrix.shape, matrix.axes
    down = ParamSpec(
        (i, tune.rank), uniform(i**-0.5), matrix.layers, (inside, None), layout=matrix.layout
    )
    up = ParamSpec(
        (tune.rank, o), zeros, matrix.layers, (None, outside), tune.lora_plus, layout=matrix.layout
    )
    return LowRank(down, up, scale)


def parameters(cfg: ModelConfig) -> dict[str, ParamSpec]:
    """The model's table by path."""
    leaves = jax.tree_util.tree_leaves_with_path(models.specs(cfg), is_leaf=is_spec)
    return {path_name(path): spec for path, spec in leaves}


def adaptable(path: str, spec: ParamSpec) -> bool:
    """Whether a parameter is a matrix that `rwkv_jax.nn.linear` reads in every layer."""
    return path.startswith("blocks.") and spec.layout == "linear"


def short(path: str) -> str:
    """`att.key` for `blocks.att.key`: official, without the layer."""
    return path.removeprefix("blocks.")


def _chosen(patterns: list[str], among: dict[str, ParamSpec], setting: str) -> list[str]:
    """The paths that patterns name, in the order of the model. Raises `ValueError` for a pattern
    that names none."""
    for pattern in patterns:
        if not any(_named(pattern, path) for path in among):
            known = list(dict.fromkeys(map(short, among)))
            near = get_close_matches(pattern, known, n=1) or [known[0]]
            raise ValueError(
                f"{setting}: nothing is called {pattern!r}; there are {', '.join(_groups(among))},"
                f" and names like {near[0]}"
            )
    return [path for path in among if any(_named(pattern, path) for pattern in patterns)]


def _groups(among: dict[str, ParamSpec]) -> list[str]:
    norms = ["ln"] if any(_named("ln", path) for path in among) else []
    return [*dict.fromkeys(short(path).split(".")[0] for path in among), *norms]


def _named(pattern: str, path: str) -> bool:
    """Whether a pattern (`att`, `ffn.*`, `att.key`, `ln` for all norms) names a parameter."""
    name = short(path)
    if pattern == "ln":
        return any(part.startswith("ln") for part in name.split("."))
    return name.split(".")[0] == pattern or fnmatchcase(name, pattern)


def tuned_layers(cfg: ModelConfig, tune: TuneConfig) -> tuple[int, ...]:
    """The layers whose matrices are adapted. Raises `ValueError` if there are none."""
    if not tune.layers:
        return tuple(range(cfg.layers))
    bounds = [int(x) if x else None for x in tune.layers.split(":")]  # `TuneConfig` checks it
    chosen = tuple(range(cfg.layers))[slice(*bounds)]
    if not chosen:
        raise ValueError(f"tune.layers = {tune.layers}: the model has layers 0 to {cfg.layers - 1}")
    return chosen


def init(
    cfg: ModelConfig,
    key: PRNGKeyArray,
    tune: TuneConfig,
    params: Model[Array] | None = None,
    shardings: Adapter | None = None,
) -> Adapter[Array]:
    """An adapter that changes nothing yet, float32. `params` are those of the model, whose numbers
    `whole` starts from; only `tune.also` needs them. `shardings` places the rest. In layers that
    `tune.layers` leaves out both factors are zero, so that their gradients are too."""
    table = specs(cfg, tune)
    if table.whole and params is None:
        raise ValueError(
            f"tune.also = {tune.also} starts from the model's numbers: give its params"
        )
    fresh = partial(tables.init, replace(table, whole={}))
    if shardings is not None:
        fresh = jax.jit(fresh, out_shardings=replace(shardings, whole={}))
    copied = jax.jit(lambda x: jnp.copy(wide(x)))
    adapter = replace(fresh(key), whole={path: copied(get(params, path)) for path in table.whole})
    chosen = tuned_layers(cfg, tune)
    if len(chosen) == cfg.layers:
        return adapter
    mask = jnp.isin(jnp.arange(cfg.layers), jnp.array(chosen)).astype(jnp.float32)[:, None, None]
    kept = {path: replace(x, down=x.down * mask) for path, x in adapter.low_rank.items()}
    return replace(adapter, low_rank=kept)


def wide(x: Array) -> Array:
    return x.astype(jnp.float32)


def on(params: Model[Array], adapter: Adapter[Array], weight: float = 1.0) -> Model[Array]:
    """The parameters with an adapter, `weight` times its change; stacked or unstacked.

    Differentiable in both. Several adapters may lie on one another: changes of matrices add up,
    whole parameters replace earlier ones. Raises `ValueError` where a `Dora`, which is computed
    from the matrix itself, is not the first.
    """

    def beside(change: LowRank[Array], x: Any) -> Any:
        if not isinstance(change, Dora):
            return Adapted(x, replace(change, scale=change.scale * weight))
        if isinstance(x, Adapted):
            raise ValueError("a DoRA adapter goes on the bare weights: put it on before the others")
        return _merged(change, x, weight)

    return _changed(params, adapter, weight, beside)


def merge(
    params: Model[Array], adapter: Adapter[Array], weight: float = 1.0, *, dtype: Any = None
) -> Model[Array]:
    """The parameters with `weight` times an adapter's change added to them, in float32, and rounded
    once: to the type that each has, or to `dtype`. bfloat16 loses much of a small change."""
    low_rank = jax.jit(partial(_merged, weight=weight, dtype=dtype))
    return _changed(params, adapter, weight, low_rank, lambda x: dtype or x.dtype)


def _merged(change: LowRank[Array], x: Array, weight: float, dtype: Any = None) -> Array:
    """A matrix, or those of all layers, with `weight` times a change."""

    def layer(parts: tuple[LowRank[Array], Array]) -> Array:
        change, x = parts
        down, up = wide(change.down), wide(change.up)
        product = jnp.matmul(down, up, precision=lax.Precision.HIGHEST)
        return (wide(x) + difference(change, wide(x), product, weight)).astype(dtype or x.dtype)

    # One layer after the other: a float32 copy of a large matrix in all layers need not fit.
    return lax.map(layer, (change, x)) if x.ndim == 3 else layer((change, x))


def difference(change: LowRank, x: Any, product: Any, weight: float = 1.0) -> Any:
    """What `weight` times a change adds to a float32 matrix [i, o]; `product` is down @ up. For
    arrays of JAX and of NumPy."""
    if not isinstance(change, Dora):
        return change.scale * weight * product
    moved, magnitude = x + change.scale * product, change.magnitude[None]
    norm = (moved * moved).sum(0)[None] ** 0.5
    turned = moved * (magnitude / (norm + (norm == 0).astype(x.dtype)))
    return weight * ((magnitude != 0).astype(x.dtype) * (turned - x))


def _changed(
    params: Model[Array],
    adapter: Adapter[Array],
    weight: float,
    low_rank: Callable[..., Any],
    dtype_of: Callable[[Array], Any] = lambda x: jnp.float32,
) -> Model[Array]:
    def whole(value: Array, x: Array) -> Array:
        return _between(weight, value, x).astype(dtype_of(x))

    for path, change in adapter.low_rank.items():
        params = _with(params, path, low_rank, change)
    for path, value in adapter.whole.items():
        params = _with(params, path, whole, value)
    if adapter.state is not None:
        params = _with(params, STATE, partial(_started, weight), adapter.state)
    return params


def _started(weight: float, state: Array, x: Array | None) -> Array:
    """The state that documents start from, beyond one that the model may have."""
    return state * weight if x is None else wide(x) + state * weight


def _between(weight: float, value: Array, x: Array) -> Array:
    if weight == 1.0:
        return value
    return wide(x) + weight * (wide(value) - wide(x))


def _with(params: Any, path: str, change: Callable[[Any, Any], Any], value: Any) -> Any:
    """A tree with `change(value, x)` in place of the x at a path. Where layers are a tuple, each
    has its part of the value."""
    if isinstance(params, tuple):
        parts = [jax.tree.map(lambda z, i=i: z[i], value) for i in range(len(params))]
        pairs = zip(params, parts, strict=True)
        return tuple(_with(layer, path, change, part) for layer, part in pairs)
    if not path:
        return change(value, params)
    name, _, rest = path.partition(".")
    return replace(params, **{name: _with(getattr(params, name), rest, change, value)})


def get(params: Any, path: str) -> Any:
    """The part of a model at a path."""
    for name in path.split("."):
        params = getattr(params, name)
    return params


def mapped(change: Callable[[str, Any], Any], adapter: Adapter) -> Adapter:
    """`change(path, part)` of every part of an adapter, with its path in the model."""
    return Adapter(
        {path: change(path, part) for path, part in adapter.low_rank.items()},
        {path: change(path, part) for path, part in adapter.whole.items()},
        None if adapter.state is None else change(STATE, adapter.state),
    )
