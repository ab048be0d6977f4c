"""Recurrent states as values: all that a model remembers of its input, in constant size.

    take, join            select and concatenate rows of a batch
    interpolate, compare  two states
    save, load            a safetensors file; tuned states (`time_state`) load too
    save_tuned            a tuned state, as a `.pth` or safetensors file of `time_state`
    to_pypi, from_pypi    the lists of tensors of PyPI `rwkv`

A state is a pytree of float32 arrays that names its version (`rwkv_jax.models.State`). It can be
copied, saved and resumed from any number of times, and `jax.tree.map` works on it. Functions here
take states in either layout (stacked or unstacked) and return stacked ones.

>>> import jax.numpy as jnp
>>> from rwkv_jax import ModelConfig, forward, init_params, init_state, states
>>> cfg = ModelConfig(version="7", layers=1, width=64, vocab_size=9)
>>> first, second = init_state(cfg, 2), init_state(cfg, 1)
>>> states.join([states.take(first, [1]), second]).blocks.wkv.shape  # layers, rows, heads, v, k
(1, 2, 1, 64, 64)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax.checkpoint.errors import WeightsError, shown
from rwkv_jax.checkpoint.files import check_writable
from rwkv_jax.checkpoint.pth import read_pth, write_pth
from rwkv_jax.checkpoint.safetensors import read_metadata, read_safetensors, write_safetensors
from rwkv_jax.config import ModelConfig
from rwkv_jax.errors import remark
from rwkv_jax.models import VERSIONS, BlockState, State, check_state, init_state, stack
from rwkv_jax.renamed import renamed
from rwkv_jax.typing import Array, Float
from rwkv_jax.wkv import Wkv4State

FORMAT, SUFFIX, PTH, WEB_RWKV = "rwkv_jax state 1", ".safetensors", ".pth", ".st"

__getattr__ = renamed(
    __name__,
    {"check_place": "check_save_path", "rows": "batch_size", "stacked": "as_stacked"},
)


def as_stacked(state: State) -> State:
    """The state in stacked layout, layers on a leading axis."""
    return stack(state) if isinstance(state.blocks, tuple) else state


def batch_size(state: State) -> int:
    """Number of rows, one text each."""
    return jax.tree.leaves(as_stacked(state).blocks)[0].shape[1]


def take(state: State, index: int | Sequence[int] | slice | np.ndarray | Array) -> State:
    """The selected rows of a batch, in the order given; negative indices count from the end, and a
    single index gives a batch of one.

    Raises `IndexError` for a row out of range, `ValueError` if no row is selected.
    """
    state = as_stacked(state)
    if not isinstance(index, slice):
        index = np.asarray(index).reshape(-1)
        index = index if index.size else slice(0)  # an empty list has the type of floats
    rows = np.arange(batch_size(state))[index]  # JAX would clamp an index out of range
    if not rows.size:
        raise ValueError("no row is selected: a state has at least one")
    return jax.tree.map(lambda x: x[:, rows], state)


def join(parts: Sequence[State]) -> State:
    """Concatenates states along the batch.

    Raises `ValueError` for no states, or for states of different models.
    """
    if not parts:
        raise ValueError("no states to join: give at least one")
    return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), *_of_one_model(parts))


def interpolate(first: State, second: State, weight: float | Float[Array, ""]) -> State:
    """`(1 - weight) * first + weight * second`.

    Version 4 stores its sums as mantissa and exponent; the sums themselves are interpolated. Raises
    `ValueError` for states of different models or batch sizes.
    """
    first, second = _of_one_model([first, second], same_batch=True)

    def mix(x: Any, y: Any) -> Any:
        if not isinstance(x, Wkv4State):
            return x + weight * (y - x)
        top = jnp.maximum(x.max_exp, y.max_exp)
        one, other = (1 - weight) * jnp.exp(x.max_exp - top), weight * jnp.exp(y.max_exp - top)
        return Wkv4State(one * x.num + other * y.num, one * x.den + other * y.den, top)

    return jax.tree.map(mix, first, second, is_leaf=lambda x: isinstance(x, Wkv4State))


class Difference(NamedTuple):
    """Distance between two states in one array of one layer."""

    layer: int
    part: str
    """Name of the array: `att_x`, `wkv` (version 4: `wkv.num`, `wkv.den`) or `ffn_x`."""
    relative: float
    """RMS of the difference, divided by the RMS of the first state's array."""


def compare(first: State, second: State) -> list[Difference]:
    """Differences of two states by layer and array; version 4's sums are compared with a common
    exponent.

    Raises `ValueError` for states of different models or batch sizes.
    """
    first, second = _of_one_model([first, second], same_batch=True)
    ours, theirs = (_named_arrays(x.blocks) for x in _with_one_scale(first, second))
    found = []
    for name in ours.keys() - {"wkv.max_exp"}:
        x, y = (np.asarray(arrays[name], np.float64) for arrays in (ours, theirs))
        for layer in range(len(x)):
            size = np.sqrt(np.mean(x[layer] ** 2))
            error = np.sqrt(np.mean((y[layer] - x[layer]) ** 2))
            found.append(Difference(layer, name, float(error / size if size else error)))
    return sorted(found)


def _with_one_scale(first: State, second: State) -> list[State]:
    """Version 4's sums rescaled to the larger of the two exponents; other versions unchanged."""
    if not isinstance(first.blocks.wkv, Wkv4State):
        return [first, second]
    top = jnp.maximum(first.blocks.wkv.max_exp, second.blocks.wkv.max_exp)
    scaled = []
    for state in (first, second):
        factor = jnp.exp(state.blocks.wkv.max_exp - top)
        wkv = Wkv4State(state.blocks.wkv.num * factor, state.blocks.wkv.den * factor, top)
        scaled.append(replace(state, blocks=replace(state.blocks, wkv=wkv)))
    return scaled


def _of_one_model(states: Sequence[State], same_batch: bool = False) -> list[State]:
    """The states, stacked. Raises `ValueError` if their models (or batch sizes) differ."""
    states = [as_stacked(state) for state in states]

    def signature(state: State) -> tuple:
        shapes = [x.shape for x in jax.tree.leaves(state)]
        return state.version, [(layers, *shape) for layers, _, *shape in shapes]

    for state in states[1:]:
        if signature(state) != signature(states[0]):
            raise ValueError(
                f"a state of version {state.version} and one of version {states[0].version}, or of"
                " different sizes: give states of one model"
            )
    sizes = [batch_size(state) for state in states]
    if same_batch and len(set(sizes)) > 1:
        raise ValueError(f"states of {sizes[0]} and {sizes[1]} rows: give as many rows of each")
    return states


@dataclass(frozen=True)
class Saved:
    """Contents of a state file."""

    state: State = field(repr=False)
    logits: Float[Array, "b V"] | None = field(default=None, repr=False)
    """Logits of the next token; None if the file has none, as in that of a tuned state."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """The caller's metadata."""
    weights: str = ""
    """The fingerprint of the model's weights; empty if it was not saved."""


def save(
    path: Path | str,
    state: State,
    *,
    logits: Float[Array, "b V"] | None = None,
    notes: Mapping[str, str] | None = None,
    weights: str = "",
) -> None:
    """Writes a state as safetensors, with the logits of the next token, the caller's metadata, and
    the fingerprint of the model's weights (`rwkv_jax.fingerprint`).

    An existing file is replaced atomically. Raises `WeightsError` if it cannot be written, and
    `ValueError` for logits of another batch size or notes that are not text.
    """
    check_save_path(Path(path))
    state = as_stacked(state)
    tensors = {f"state.{name}": np.asarray(x) for name, x in _named_arrays(state.blocks).items()}
    if logits is not None:
        tensors["logits"] = np.asarray(logits)
        if logits.ndim != 2 or len(logits) != batch_size(state):
            raise ValueError(
                f"logits of shape {list(logits.shape)}, but the state has {batch_size(state)} rows:"
                " give those of the next token, [b, V]"
            )
    for name, text in (notes or {}).items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(f"the note {name!r} is {text!r}: names and values must be text")
    notes = {f"note.{name}": text for name, text in (notes or {}).items()}
    metadata = {"format": FORMAT, "version": state.version, **notes}
    metadata |= {"weights": weights} if weights else {}
    write_safetensors(Path(path).expanduser(), tensors, metadata)


def check_save_path(path: Path) -> None:
    """Raises `WeightsError` unless a state can be saved under this name."""
    if path.suffix != SUFFIX:
        raise WeightsError(f"{path}: the name of a state file must end in {SUFFIX}")
    check_writable(path)


def load(path: Path | str, cfg: ModelConfig, *, weights: str = "") -> Saved:
    """Reads a file written by `save`, or a tuned state (versions 5 to 7), whose token shifts are
    zero: `blocks.N.att.time_state`, [h, v, k] in a `.pth` or `.safetensors`, [h, k, v] in a `.st`
    of web-rwkv.

    `weights` is the fingerprint of the model's; `check_weights` compares it. Raises `WeightsError`,
    one line, for any other file or a state of another model than `cfg`'s.
    """
    path = Path(path).expanduser()
    if path.suffix == SUFFIX:
        saved = _saved(path, cfg)
    elif path.suffix == WEB_RWKV:
        turned = {name: x.swapaxes(-1, -2) for name, x in read_safetensors(path).items()}
        saved = Saved(_tuned(path, turned, cfg))
    else:
        saved = Saved(_tuned(path, read_pth(path), cfg))
    try:
        check_state(saved.state, cfg, batch_size(saved.state))
    except (ValueError, IndexError) as error:
        raise WeightsError(f"{path}: {error}; use a state of this model") from error
    check_weights(path, saved, weights)
    return saved


def save_tuned(path: Path | str, wkv: Float[Array, "layers h v k"]) -> None:
    """Writes a tuned state, float32 or bfloat16, as trainers do: `blocks.N.att.time_state`,
    [h, v, k], of every layer. `path` ends in `.pth` or `.safetensors`.

    An existing file is replaced atomically. Raises `WeightsError` if it cannot be written, and
    `ValueError` for an array of another type or shape.
    """
    path = Path(path).expanduser()
    if path.suffix not in (PTH, SUFFIX):
        raise WeightsError(f"{path}: the name of a tuned state must end in {PTH} or {SUFFIX}")
    if wkv.ndim != 4 or wkv.shape[-1] != wkv.shape[-2]:
        raise ValueError(
            f"a tuned state of shape {list(wkv.shape)}: give [layers, h, v, k], as the stacked"
            " parameter blocks.att.time_state is"
        )
    if wkv.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"a tuned state of {wkv.dtype}: convert it to float32 or bfloat16")
    check_writable(path)
    tensors = dict(zip(_tuned_names(len(wkv)), np.asarray(wkv), strict=True))
    if path.suffix == PTH:
        write_pth(path, tensors)
    else:
        write_safetensors(path, tensors)


def _tuned_names(layers: int) -> list[str]:
    return [f"blocks.{layer}.att.time_state" for layer in range(layers)]


def check_weights(path: Path | str, saved: Saved, weights: str) -> None:
    """Warns if a state was saved with another fingerprint than `weights`: it means nothing to other
    weights. An empty fingerprint is not known."""
    if weights and saved.weights and weights != saved.weights:
        remark(
            f"{path}: a state of other weights (their fingerprint is {shown(saved.weights)}, the"
            f" model's is {weights}; inspect prints that of a file): the model will misread it"
        )


def _saved(path: Path, cfg: ModelConfig) -> Saved:
    tensors, metadata = read_safetensors(path), read_metadata(path)
    if tensors and all(name.endswith(".att.time_state") for name in tensors):
        return Saved(_tuned(path, tensors, cfg))
    if metadata.get("format") != FORMAT:
        found = shown(metadata.get("format") or "none")
        raise WeightsError(
            f"{path}: not a state file (format: {found}); a file of weights is not a state"
        )
    version = metadata.get("version", "")
    if version != cfg.version:
        raise WeightsError(
            f"{path}: a state of version {shown(version)}, but the model is version {cfg.version};"
            " use a state of this model"
        )
    logits = jnp.asarray(tensors.pop("logits")) if "logits" in tensors else None
    fresh = jax.eval_shape(lambda: _fresh(cfg, 1)).blocks
    names = [f"state.{name}" for name in _named_arrays(fresh)]
    if odd := sorted(tensors.keys() ^ set(names)):
        raise WeightsError(
            f"{path}: {shown(odd[0])} is missing or unexpected; save the state again"
        )
    arrays = [jnp.asarray(tensors[name], jnp.float32) for name in names]
    blocks = jax.tree.unflatten(jax.tree.structure(fresh), arrays)
    batch = arrays[0].shape[1]
    if logits is not None and logits.shape != (batch, cfg.vocab_size):
        raise WeightsError(
            f"{path}: logits of shape {list(logits.shape)}, but the state has {batch:,} rows and"
            f" the model {cfg.vocab_size:,} tokens; use a state of this model"
        )
    notes = {k.removeprefix("note."): x for k, x in metadata.items() if k.startswith("note.")}
    return Saved(State(blocks, version), logits, notes, metadata.get("weights", ""))


def _tuned(path: Path, tensors: Mapping[str, np.ndarray], cfg: ModelConfig) -> State:
    names = _tuned_names(cfg.layers)
    if odd := sorted(set(tensors) ^ set(names)):
        raise WeightsError(
            f"{path}: {shown(odd[0])} is missing or unexpected in a tuned state of {cfg.layers}"
            " layers; use the one tuned for this model"
        )
    fresh, shape = _fresh(cfg, 1), (cfg.heads, cfg.head_size, cfg.head_size)
    tunable = not isinstance(fresh.blocks.wkv, Wkv4State)
    if not tunable or any(tensors[name].shape != shape for name in names):
        raise WeightsError(
            f"{path}: {names[0]} is {list(tensors[names[0]].shape)}, but heads of this model are"
            f" {list(shape)}; use the one tuned for this model"
        )
    wkv = np.stack([np.asarray(tensors[name], np.float32) for name in names])[:, None]
    return replace(fresh, blocks=replace(fresh.blocks, wkv=jnp.asarray(wkv)))


def _fresh(cfg: ModelConfig, batch: int) -> State:
    """Zeros, also for a state-tuned model."""
    return init_state(replace(cfg, state_tuned=False), batch)


def _named_arrays(blocks: BlockState) -> dict[str, Any]:
    """The leaves by name, in tree order."""
    leaves = jax.tree_util.tree_leaves_with_path(blocks)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def to_pypi(state: State, row: int = 0) -> list[np.ndarray]:
    """One row as the list of arrays that PyPI `rwkv` 0.8.32 takes (`torch.from_numpy` each).

    Per layer: the time mix's last token; the WKV state; the channel mix's last token. The WKV state
    is numerator, denominator and exponent in version 4, one array [h, k, v] in versions 5 and 6,
    [h, v, k] in version 7.

    Raises `IndexError` for a row out of range.
    """
    blocks = _pypi_layout(take(state, row).blocks, state.version)
    parts = [np.array(x[:, 0]) for x in jax.tree.leaves(blocks)]
    return [x[layer] for layer in range(len(parts[0])) for x in parts]


def from_pypi(tensors: Sequence[Any], cfg: ModelConfig) -> State:
    """The one-row state in a list of PyPI `rwkv` (arrays, or CPU tensors).

    Raises `ValueError` if the list does not fit `cfg`'s model.
    """
    fresh = jax.eval_shape(lambda: _fresh(cfg, 1)).blocks
    each = len(jax.tree.leaves(fresh))
    if len(tensors) != each * cfg.layers:
        raise ValueError(
            f"a list of {len(tensors)}: version {cfg.version} needs {each} tensors for each of"
            f" {cfg.layers} layers"
        )
    given = (x.float() if hasattr(x, "float") else x for x in tensors)  # numpy has no bfloat16
    arrays = [np.asarray(x, np.float32)[None] for x in given]
    parts = [jnp.asarray(np.stack(arrays[index::each])) for index in range(each)]
    blocks = jax.tree.unflatten(jax.tree.structure(fresh), parts)
    state = State(_pypi_layout(blocks, cfg.version), cfg.version)
    check_state(state, cfg, 1)
    return state


def _pypi_layout(blocks: BlockState, version: str) -> BlockState:
    """From our layout to that of PyPI `rwkv`, and back."""
    if not VERSIONS[version].pypi_transposed:
        return blocks
    return replace(blocks, wkv=jnp.swapaxes(blocks.wkv, -1, -2))
