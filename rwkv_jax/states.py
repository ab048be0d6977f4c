"""States as values: everything a model remembers of what it has read, of constant size.

    take, join            rows of a batch
    interpolate, compare  between two states
    save, load            a safetensors file; tuned states (`.pth` with `time_state`) load too
    to_pypi, from_pypi    the lists of tensors of PyPI `rwkv`

A state is a pytree of float32 arrays that names its version (`rwkv_jax.models.State`); all of it
is here to be kept, copied and gone on from, and `jax.tree.map` works on it as on any tree.

>>> import jax.numpy as jnp
>>> from rwkv_jax import ModelConfig, forward, init_params, init_state, states
>>> cfg = ModelConfig(version="7", layers=1, width=64, vocab_size=9)
>>> first, second = init_state(cfg, 2), init_state(cfg, 1)
>>> states.join([states.take(first, [1]), second]).blocks.wkv.shape  # layers, rows, heads, v, k
(1, 2, 1, 64, 64)
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax.checkpoint.errors import WeightsError, shown
from rwkv_jax.checkpoint.files import check_writable
from rwkv_jax.checkpoint.pth import read_pth
from rwkv_jax.checkpoint.safetensors import read_metadata, read_safetensors, write_safetensors
from rwkv_jax.config import ModelConfig
from rwkv_jax.models import BlockState, State, check_state, init_state, stack
from rwkv_jax.typing import Array, Float
from rwkv_jax.wkv import Wkv4State

FORMAT, SUFFIX = "rwkv_jax state 1", ".safetensors"


def stacked(state: State) -> State:
    """The state with its layers on a leading axis, whichever way it had them."""
    return stack(state) if isinstance(state.blocks, tuple) else state


def rows(state: State) -> int:
    """How many texts the state is of."""
    return jax.tree.leaves(stacked(state).blocks)[0].shape[1]


def take(state: State, index: int | Sequence[int] | slice | np.ndarray | Array) -> State:
    """Some rows of a batch, in the order asked for, negative ones from the end; the result is a
    batch too, also of one row.

    Raises `IndexError` for a row that is not there, `ValueError` if none is left.
    """
    state = stacked(state)
    chosen = np.arange(rows(state))
    if isinstance(index, slice):
        chosen = chosen[index]
    else:
        index = np.atleast_1d(np.asarray(index))
        if index.dtype == bool and index.shape != chosen.shape:
            raise IndexError(f"a mask of shape {list(index.shape)}: the state has {len(chosen)}")
        if index.size and index.dtype != bool:
            index = np.array([_row(state, row) for row in index])
        chosen = chosen[index] if index.size else index
    if not chosen.size:
        raise ValueError("no row is asked for: a state is of at least one")
    return jax.tree.map(lambda x: x[:, chosen], state)


def _row(state: State, row: Any) -> int:
    """Counted from the first. Raises `IndexError`: JAX would take the nearest that is there."""
    count, row = rows(state), operator.index(row)
    if not -count <= row < count:
        raise IndexError(f"row {row}: the state has {count}, the last of them {count - 1}")
    return row % count


def join(parts: Sequence[State]) -> State:
    """One batch of the rows of several. Raises `ValueError` for none, or for states of different
    models."""
    if not parts:
        raise ValueError("no states to join: give at least one")
    parts = [stacked(part) for part in parts]
    _check_alike(*parts)
    return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), *parts)


def interpolate(first: State, second: State, weight: float | Float[Array, ""]) -> State:
    """`(1 - weight) * first + weight * second`, of what the states stand for: version 4 keeps its
    sums as mantissa and exponent, and it is the sums that are mixed.

    Raises `ValueError` for states of different models or numbers of rows.
    """
    first, second = stacked(first), stacked(second)
    _check_alike(first, second)
    _check_as_many(first, second)

    def mix(x: Any, y: Any) -> Any:
        if not isinstance(x, Wkv4State):
            return x + weight * (y - x)
        top = jnp.maximum(x.max_exp, y.max_exp)
        one, other = (1 - weight) * jnp.exp(x.max_exp - top), weight * jnp.exp(y.max_exp - top)
        return Wkv4State(one * x.num + other * y.num, one * x.den + other * y.den, top)

    return jax.tree.map(mix, first, second, is_leaf=lambda x: isinstance(x, Wkv4State))


class Difference(NamedTuple):
    """How far two states are apart in one part of one layer."""

    layer: int
    part: str
    relative: float
    """RMS of the difference, over the RMS of the first."""


def compare(first: State, second: State) -> list[Difference]:
    """Layer by layer and part by part; version 4's sums in common exponents.

    Raises `ValueError` for states of different models or numbers of rows.
    """
    first, second = stacked(first), stacked(second)
    _check_alike(first, second)
    _check_as_many(first, second)
    parts = [_parts(state.blocks) for state in _with_one_scale(first, second)]
    found = []
    for name, x in parts[0].items():
        if name == "wkv.max_exp":
            continue
        x, y = np.asarray(x, np.float64), np.asarray(parts[1][name], np.float64)
        for layer in range(len(x)):
            size = np.sqrt(np.mean(x[layer] ** 2))
            error = np.sqrt(np.mean((y[layer] - x[layer]) ** 2))
            found.append(Difference(layer, name, float(error / size if size else error)))
    return sorted(found)


def _with_one_scale(first: State, second: State) -> list[State]:
    """Version 4's sums with the larger exponent of the two; other versions as they are."""
    if first.version != "4":
        return [first, second]
    top = jnp.maximum(first.blocks.wkv.max_exp, second.blocks.wkv.max_exp)
    scaled = []
    for state in (first, second):
        factor = jnp.exp(state.blocks.wkv.max_exp - top)
        wkv = Wkv4State(state.blocks.wkv.num * factor, state.blocks.wkv.den * factor, top)
        scaled.append(replace(state, blocks=replace(state.blocks, wkv=wkv)))
    return scaled


def _check_alike(*parts: State) -> None:
    def shape(state: State) -> tuple:
        leaves = [x.shape for x in jax.tree.leaves(state)]
        return state.version, [(size[0], *size[2:]) for size in leaves]

    for part in parts[1:]:
        if shape(part) != shape(parts[0]):
            raise ValueError(
                f"a state of version {part.version} and one of version {parts[0].version}, or of"
                " other sizes: only states of one model go together"
            )


def _check_as_many(first: State, second: State) -> None:
    if rows(first) != rows(second):
        raise ValueError(f"states of {rows(first)} and {rows(second)} rows: take as many of each")


@dataclass(frozen=True)
class Saved:
    """What a file of states holds."""

    state: State
    logits: Float[Array, "b V"] | None = None
    """Of the next token; None if the file doesn't have them: then at least a token must be read."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Whatever was saved beside it."""


def save(
    path: Path | str,
    state: State,
    *,
    logits: Float[Array, "b V"] | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Writes a state as safetensors; `logits` of the next token and `notes` go with it.

    What was there before is replaced when all is written. Raises `WeightsError`; and `ValueError`
    for logits of other rows than the state's, or notes that are not text.
    """
    check_place(Path(path))
    state = stacked(state)
    tensors = {f"state.{name}": np.asarray(x) for name, x in _parts(state.blocks).items()}
    if logits is not None:
        tensors["logits"] = np.asarray(logits)
        if logits.ndim != 2 or len(logits) != rows(state):
            raise ValueError(
                f"logits of shape {list(logits.shape)}, and the state is of {rows(state)} rows:"
                " give those of the next token, [b, V]"
            )
    for name, text in (notes or {}).items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(f"the note {name!r} is {text!r}: notes and their names are text")
    notes = {f"note.{name}": text for name, text in (notes or {}).items()}
    metadata = {"format": FORMAT, "version": state.version, **notes}
    write_safetensors(Path(path).expanduser(), tensors, metadata)


def check_place(path: Path) -> None:
    """Raises `WeightsError` unless a state can be saved under this name."""
    if path.suffix != SUFFIX:
        raise WeightsError(f"{path}: a state is kept in a file named *{SUFFIX}; name it so")
    check_writable(path)


def load(path: Path | str, cfg: ModelConfig) -> Saved:
    """The state in a file that `save` wrote, or, from a `.pth`, the tuned one of versions 6 and 7:
    `blocks.N.att.time_state`, [h, v, k], with fresh token shifts.

    Raises `WeightsError`, one line, for a file that is neither, or a state of another model than
    `cfg`'s.
    """
    path = Path(path).expanduser()
    ours = path.suffix == SUFFIX
    saved = _saved(path, cfg) if ours else Saved(_tuned(path, read_pth(path), cfg))
    try:
        check_state(saved.state, cfg, rows(saved.state))
    except (ValueError, IndexError) as error:
        raise WeightsError(f"{path}: {error}; take one that this model wrote") from error
    return saved


def _saved(path: Path, cfg: ModelConfig) -> Saved:
    tensors, metadata = read_safetensors(path), read_metadata(path)
    if metadata.get("format") != FORMAT:
        told = shown(metadata.get("format") or "nothing")
        raise WeightsError(f"{path}: no state of a model (format: {told}); weights are not states")
    version = metadata.get("version", "")
    if version != cfg.version:
        raise WeightsError(
            f"{path}: a state of version {shown(version)}, and the model is of {cfg.version};"
            " take one that this model wrote"
        )
    parts = {name: x for name, x in tensors.items() if name != "logits"}
    fresh = jax.eval_shape(lambda: _fresh(cfg, 1))
    names = {f"state.{name}" for name in _parts(fresh.blocks)}
    if parts.keys() != names:
        odd = sorted(names ^ parts.keys())[0]
        raise WeightsError(f"{path}: {shown(odd)} is missing or has no place; save it again")
    blocks = jax.tree.unflatten(
        jax.tree.structure(fresh.blocks),
        [jnp.asarray(parts[f"state.{name}"], jnp.float32) for name in _parts(fresh.blocks)],
    )
    logits = jnp.asarray(tensors["logits"]) if "logits" in tensors else None
    batch = jax.tree.leaves(blocks)[0].shape[1]
    if logits is not None and logits.shape != (batch, cfg.vocab_size):
        raise WeightsError(
            f"{path}: logits of shape {list(logits.shape)}, and the state is of {batch:,} rows and"
            f" the model of {cfg.vocab_size:,} tokens; take one that this model wrote"
        )
    notes = {k.removeprefix("note."): x for k, x in metadata.items() if k.startswith("note.")}
    return Saved(State(blocks, version), logits, notes)


def _tuned(path: Path, tensors: Mapping[str, np.ndarray], cfg: ModelConfig) -> State:
    names = [f"blocks.{layer}.att.time_state" for layer in range(cfg.layers)]
    if set(tensors) != set(names):
        odd = sorted(set(tensors) ^ set(names))[0]
        raise WeightsError(
            f"{path}: {shown(odd)} is missing or has no place in a tuned state of {cfg.layers}"
            " layers; take the one that was tuned for this model"
        )
    fresh, shape = _fresh(cfg, 1), (cfg.heads, cfg.head_size, cfg.head_size)
    if cfg.version == "4" or any(tensors[name].shape != shape for name in names):
        raise WeightsError(
            f"{path}: {names[0]} is {list(tensors[names[0]].shape)}, and heads of this model have"
            f" {list(shape)}; take the one that was tuned for this model"
        )
    wkv = np.stack([np.asarray(tensors[name], np.float32) for name in names])[:, None]
    return replace(fresh, blocks=replace(fresh.blocks, wkv=jnp.asarray(wkv)))


def _fresh(cfg: ModelConfig, batch: int) -> State:
    """Zeros, also of a state-tuned model."""
    return init_state(replace(cfg, state_tuned=False), batch)


def _parts(blocks: BlockState) -> dict[str, Any]:
    """The leaves by name, in the order of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(blocks)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def to_pypi(state: State, row: int = 0) -> list[np.ndarray]:
    """One row as the list that PyPI `rwkv` 0.8.32 takes (`torch.from_numpy` each).

    Per layer: version 4 has the time mix's last token, numerator, denominator, exponent, the
    channel mix's last token; later versions the time mix's, the matrices and the channel mix's. The
    matrices are [h, k, v] for versions 5 and 6, [h, v, k] for 7.

    Raises `IndexError` for a row that is not there.
    """
    out, row = [], _row(state, row)
    blocks = jax.tree.map(lambda x: np.array(x[:, row]), stacked(state).blocks)
    for layer in range(len(blocks.att_x)):
        wkv = jax.tree.map(lambda x, layer=layer: x[layer], blocks.wkv)
        if state.version[0] in "56":
            wkv = np.ascontiguousarray(np.swapaxes(wkv, -1, -2))
        middle = list(wkv) if isinstance(wkv, Wkv4State) else [wkv]
        out += [blocks.att_x[layer], *middle, blocks.ffn_x[layer]]
    return out


def from_pypi(tensors: Sequence[Any], cfg: ModelConfig) -> State:
    """The state, of one row, in a list of PyPI `rwkv` (arrays, or tensors on the CPU).

    Raises `ValueError` if the list is not one of `cfg`'s model.
    """
    each = 5 if cfg.version == "4" else 3
    if len(tensors) != each * cfg.layers:
        raise ValueError(
            f"a list of {len(tensors)}: version {cfg.version} has {each} tensors for each of"
            f" {cfg.layers} layers"
        )
    given = (x.float() if hasattr(x, "float") else x for x in tensors)  # numpy has no bfloat16
    arrays = [np.asarray(x, np.float32)[None] for x in given]

    def column(index: int) -> Array:
        return jnp.asarray(np.stack(arrays[index::each]))

    wkv: Any = column(1)
    if cfg.version == "4":
        wkv = Wkv4State(*(column(index) for index in (1, 2, 3)))
    elif cfg.version[0] in "56":
        wkv = jnp.swapaxes(wkv, -1, -2)
    state = State(BlockState(att_x=column(0), wkv=wkv, ffn_x=column(each - 1)), cfg.version)
    check_state(state, cfg, 1)
    return state
