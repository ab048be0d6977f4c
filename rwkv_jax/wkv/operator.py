"""The operators as they are called: everything around a form, done once for all of them.

Arguments are checked, a mesh gives each device its shards, padding is masked, the form is chosen,
and inputs are cast to the precision it computes in.
"""

import contextlib
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax

from rwkv_jax.sharding import axes_of, check_axis, is_explicit, is_manual, mapped
from rwkv_jax.typing import Array, Bool, Callable, Float, Int
from rwkv_jax.wkv import default, pallas, sequence, v4, v6, v7
from rwkv_jax.wkv.form import Form, check_lengths, compute_dtype, in_compute_dtype, is_concrete
from rwkv_jax.wkv.v4.recurrence import Inputs as Inputs4
from rwkv_jax.wkv.v4.recurrence import Wkv4State
from rwkv_jax.wkv.v6.recurrence import Inputs as Inputs6
from rwkv_jax.wkv.v7.recurrence import Inputs as Inputs7

IMPLEMENTATIONS = ("scan", "chunked", "associative")
"""The names that `implementation=` takes on any device."""
KERNELS = ("pallas_gpu", "pallas_tpu")
"""The names that it takes on one kind of device; interpreted on a CPU."""
HOPPER = "mosaic_gpu"
"""The same, of `wkv7` only, and never the default: no device has run it yet."""
_KERNELS = {"pallas_gpu": "cuda", "pallas_tpu": "tpu", HOPPER: HOPPER}
"""Their names in `pallas.table`."""

with contextlib.suppress(ValueError):  # the module is reloaded, and the name is taken
    export.register_namedtuple_serialization(Wkv4State, serialized_name="rwkv_jax.wkv.Wkv4State")


class Operator(NamedTuple):
    """What the operators differ in."""

    name: str
    axes: dict[str, str]
    """The axes of inputs, state and masks, one letter each (`rwkv_jax.typing`)."""
    forms: Mapping[str, Form]
    on_time_shard: Callable[..., tuple[Array, Any]]
    """(form, mesh axis, x, state, reset): one device's tokens, where time is sharded."""
    widen: Callable[[Form], Form] = lambda form: form
    """Wraps a form so that it is exact for any values of the inputs."""
    empty: Callable[..., Any] = jnp.zeros
    """(shape, dtype): the state that remembers nothing."""


_MASKS = {"reset": "bt", "lengths": "b"}
_AXES4 = _MASKS | {"log_w": "c", "k": "btc", "v": "btc", "u": "c", "state": "bc"}
_AXES7 = (
    _MASKS
    | dict.fromkeys(("r", "log_w", "k", "a", "b"), "bthk")
    | {"v": "bthv", "state": "bhvk", "initial": "hvk"}
)
_AXES6 = _AXES7 | {"u": "hk"}

WKV4 = Operator("wkv4", _AXES4, v4.FORMS, sequence.wkv4, empty=Wkv4State.empty)
WKV5 = Operator("wkv6", _AXES6 | {"log_w": "hk"}, v6.FORMS, sequence.wkv6)
WKV6 = Operator("wkv6", _AXES6, v6.FORMS, sequence.wkv6)
WKV7_BOUNDED = Operator("wkv7", _AXES7, v7.FORMS, sequence.wkv7)
WKV7 = WKV7_BOUNDED._replace(widen=v7.for_any_decay)


def wkv4(
    log_w: Float[Array, " c"],
    k: Float[Array, "b t c"],
    v: Float[Array, "b t c"],
    u: Float[Array, " c"],
    state: Wkv4State | None = None,
    *,
    reset: Bool[Array, "b t"] | None = None,
    lengths: Int[Array, " b"] | None = None,
    mesh_axis: str | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t c"], Wkv4State]:
    """The WKV of version 4: `y` and the state after the last token.

    `log_w <= 0` is the log of the decay per token (official `-exp(time_decay)`), `u` the bonus of
    the current token (`time_first`). The gradient of the final state flows through `num` and `den`;
    `max_exp` is only their scale. The other arguments, and types, are common to all versions
    (`rwkv_jax.wkv`).

    Raises `ValueError` for an unknown implementation, shapes that do not match, and a mesh axis
    that does not exist or does not divide the length.
    """
    x = Inputs4(log_w, k, v, u)
    state = None if state is None else Wkv4State(*state)
    return _apply(WKV4, x, state, reset, lengths, mesh_axis, implementation)


def wkv6(
    r: Float[Array, "b t h k"],
    log_w: Float[Array, "b t h k"] | Float[Array, "h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    u: Float[Array, "h k"],
    state: Float[Array, "b h v k"] | None = None,
    *,
    reset: Bool[Array, "b t"] | None = None,
    lengths: Int[Array, " b"] | None = None,
    initial: Float[Array, "h v k"] | None = None,
    mesh_axis: str | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h v k"]]:
    """The WKV of versions 5 and 6: `y` and the state after the last token.

    `log_w <= 0` is the log of the decay: of each token in version 6, `[h, k]` for all tokens in
    version 5. Every implementation is exact for any decay. `u` is the bonus of the current token.
    Documents start from the state `initial` (state tuning), or from zero. The other arguments, and
    types, are common to all versions (`rwkv_jax.wkv`).

    Raises `ValueError` for an unknown implementation, shapes that do not match, and a mesh axis
    that does not exist or does not divide the length.
    """
    x = Inputs6(r, log_w, k, v, u, initial)
    operator = WKV5 if len(getattr(log_w, "shape", ())) == 2 else WKV6
    return _apply(operator, x, state, reset, lengths, mesh_axis, implementation)


def wkv7(
    r: Float[Array, "b t h k"],
    log_w: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    a: Float[Array, "b t h k"],
    b: Float[Array, "b t h k"],
    state: Float[Array, "b h v k"] | None = None,
    *,
    reset: Bool[Array, "b t"] | None = None,
    lengths: Int[Array, " b"] | None = None,
    initial: Float[Array, "h v k"] | None = None,
    log_w_min: float = -math.inf,
    mesh_axis: str | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h v k"]]:
    """The WKV of version 7: `y` and the state after the last token.

    `log_w <= 0` is the log of the decay, in (-0.6066, 0) in the model. Forms in chunks are exact
    for log decays of -1 and above; where one is below, `scan` runs instead, chosen at run time. A
    `log_w_min` of -1 or more promises that no decay is below it, and removes that check. The model
    passes `a = -kk` and `b = kk * (learning rate)` with |kk| = 1. Documents start from the state
    `initial` (state tuning), or from zero. The other arguments, and types, are common to all
    versions (`rwkv_jax.wkv`).

    Raises `ValueError` for an unknown implementation, shapes that do not match, and a mesh axis
    that does not exist or does not divide the length.
    """
    x = Inputs7(r, log_w, k, v, a, b, initial)
    operator = WKV7_BOUNDED if log_w_min >= v7.STRONGEST else WKV7
    return _apply(operator, x, state, reset, lengths, mesh_axis, implementation)


def _apply(
    operator: Operator,
    x: Any,
    state: Any,
    reset: Array | None,
    lengths: Array | None,
    mesh_axis: str | None,
    implementation: str | None,
) -> tuple[Array, Any]:
    """The operator on arrays of the whole mesh: runs `_on_shard` on each device's shard.

    Shardings are read off the arrays' types, where mesh axes are explicit. All arrays follow `v`,
    and where it is replicated, the first array that is sharded.
    """
    _check_arrays(operator, x, state, reset=reset, lengths=lengths)
    if getattr(x, "initial", None) is not None:
        x = x._replace(initial=x.initial.astype(compute_dtype(x, state)))
    x, state, reset, lengths = jax.tree.map(jnp.asarray, (x, state, reset, lengths))
    sizes = _check_shapes(operator, x, state=state, reset=reset, lengths=lengths)
    _check_types(operator.name, (x, state), reset, lengths)
    _check_values(operator.name, x, lengths, mesh_axis)
    known = (*operator.forms, *KERNELS, *[HOPPER] * (operator.name == "wkv7"))
    if implementation not in (None, *known):
        which = ", which only wkv7 has" if implementation == HOPPER else ""
        raise ValueError(
            f"{operator.name}: implementation must be {', '.join(known)} or None, got"
            f" {implementation!r}{which}"
        )
    if state is None:
        state = _fresh(operator, x, sizes)
    run = partial(_on_shard, operator, mesh_axis, implementation)
    args = (x, state, reset, lengths)
    letters = type(x)._make(map(operator.axes.get, x._fields))
    all_letters = (letters, *map(operator.axes.get, ("state", "reset", "lengths")))
    axes = axes_of((letters.v, all_letters), (x.v, args))
    if mesh_axis is not None and not is_manual(mesh_axis):
        check_axis(operator.name, mesh_axis, x.v.shape[1])
        axes["t"] = mesh_axis
    elif "t" in axes:
        raise ValueError(
            f"{operator.name}: time is sharded over {axes['t']!r}; pass mesh_axis={axes['t']!r}"
        )
    if inside := axes.get("k") or axes.get("v"):
        raise ValueError(
            f"{operator.name}: the channels of a head are sharded, over {inside!r}; shard whole"
            " heads"
        )
    if axes or (is_explicit() and pallas.needs_shard_map(implementation)):
        run = mapped(run, all_letters, (letters.v, operator.axes["state"]), axes)
    return run(*args)


def _on_shard(
    operator: Operator,
    mesh_axis: str | None,
    implementation: str | None,
    x: Any,
    state: Any,
    reset: Array | None,
    lengths: Array | None,
) -> tuple[Array, Any]:
    """The operator on one device: masks padding, chooses the form and runs it."""
    if operator is WKV5:
        operator, x = WKV6, x._replace(log_w=jnp.broadcast_to(x.log_w[None, None], x.k.shape))
    valid = _valid(lengths, x.v.shape[1], mesh_axis)
    if valid is not None and reset is not None:
        reset = reset & valid
    if valid is not None:
        # Zeros: no decay, nothing written, nothing removed, even if the padding holds NaN.
        rows = valid.reshape(*valid.shape, *(1,) * (x.k.ndim - 2))
        tokens = {name: z for name, z in x._asdict().items() if "t" in operator.axes.get(name, "")}
        x = x._replace(**{n: jnp.where(rows, z, jnp.zeros_like(z)) for n, z in tokens.items()})
    if "mask" in x._fields:  # version 4, whose decay no zeros in the padding can stop
        x = x._replace(mask=valid)
    dtype = compute_dtype(x, state)
    state = jax.tree.map(lambda z: z.astype(dtype), state)

    form, is_kernel = _choose(operator, implementation, x, state)
    form = operator.widen(form)
    run = form if mesh_axis is None else partial(operator.on_time_shard, form, mesh_axis)
    # Kernels take any dtype, and round y themselves.
    return (run if is_kernel else in_compute_dtype(run))(x, state, reset)


def _choose(
    operator: Operator, implementation: str | None, x: Any, state: Any
) -> tuple[Form, bool]:
    """The form, and whether it is a kernel."""
    if 0 in x.v.shape:  # there are no numbers, only their shapes
        return operator.forms["scan"], False
    if not isinstance(x.k.shape[1], int):
        if implementation not in (None, "scan"):
            raise ValueError(
                f"{operator.name}: {implementation!r} cuts time into chunks, and its length is a"
                f" symbol ({x.k.shape[1]}); implementation='scan', or None, takes any length"
            )
        return operator.forms["scan"], False
    if implementation is None:
        return default.choose(operator.name, x, state)
    if implementation in _KERNELS:
        return pallas.form(operator.name, _KERNELS[implementation], named=True), True
    return operator.forms[implementation], False


def _valid(lengths: Array | None, time: int, mesh_axis: str | None) -> Bool[Array, "b t"] | None:
    """Where tokens are valid (not padding); None without `lengths`, which count the whole row."""
    if lengths is None:
        return None
    first = 0 if mesh_axis is None else lax.axis_index(mesh_axis) * time
    place = first + jnp.arange(time, dtype=jnp.int32)
    return place[None] < lengths[:, None].astype(jnp.int32)


def _check_arrays(operator: Operator, x: Any, state: Any, **masks: Any) -> None:
    for name, z in (x._asdict() | {"state": state} | masks).items():
        if z is not None and not (hasattr(z, "shape") and hasattr(z, "dtype")):
            if name == "state" and isinstance(z, Wkv4State) and operator is WKV4:
                continue
            dims = ", ".join(operator.axes[name])
            raise ValueError(
                f"{operator.name}: {name} must be an array [{dims}], got {type(z).__name__}"
            )


def _check_shapes(operator: Operator, x: Any, **others: Any) -> dict[str, int]:
    """The size of each axis."""
    sizes: dict[str, int] = {}
    arrays = [
        (name, operator.axes[name], z)
        for name, tree in (x._asdict() | others).items()
        for z in jax.tree.leaves(tree)
    ]
    for _, dims, z in arrays:
        pairs = zip(dims, z.shape, strict=False)
        if z.ndim != len(dims) or any(sizes.setdefault(letter, n) != n for letter, n in pairs):
            shapes = ", ".join(
                f"{name} [{', '.join(dims)}] is {list(z.shape)}" for name, dims, z in arrays
            )
            raise ValueError(f"{operator.name}: shapes do not match: {shapes}")
    if sizes["t"] == 0:
        raise ValueError(f"{operator.name}: no tokens, in inputs of shape {list(x.k.shape)}")
    return sizes


def _check_types(operator: str, x: Any, reset: Array | None, lengths: Array | None) -> None:
    for z in jax.tree.leaves(x):
        if not jnp.issubdtype(z.dtype, jnp.floating):
            raise ValueError(f"{operator}: inputs and state must be floating point, not {z.dtype}")
        if jax.typeof(z).manual_axis_type.varying:
            raise ValueError(
                f"{operator}: inside jax.shard_map, pass it check_vma=False; JAX cannot track"
                " values that vary across devices through a hand-written gradient"
            )
    if reset is not None and reset.dtype != jnp.bool_:
        raise ValueError(f"{operator}: reset must be bool, not {reset.dtype}")
    if lengths is not None and not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"{operator}: lengths must be integers, not {lengths.dtype}")


def _check_values(operator: str, x: Any, lengths: Array | None, mesh_axis: str | None) -> None:
    """Checks values where they are concrete; tracers are skipped."""
    with jax.ensure_compile_time_eval():
        largest = float(jnp.max(x.log_w, initial=0.0)) if is_concrete(x.log_w) else 0.0
    if largest > 0:
        raise ValueError(
            f"{operator}: log_w is up to {largest:.3g}, but the log of a decay is 0 or less; if"
            " these are decays, give jnp.log of them"
        )
    whole = mesh_axis is None or not is_manual(mesh_axis)  # `lengths` count all devices' tokens
    if lengths is not None and whole:
        check_lengths(f"{operator}: lengths", lengths, x.v.shape[1])


def _fresh(operator: Operator, x: Any, sizes: dict[str, int]) -> Any:
    """The state of rows that start a document."""
    shape, dtype = tuple(sizes[letter] for letter in operator.axes["state"]), compute_dtype(x)
    state, initial = operator.empty(shape, dtype), getattr(x, "initial", None)
    return state if initial is None else state + initial[None]
