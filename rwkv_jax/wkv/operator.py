"""The operators as they are called: everything around a form, done once for all of them.

Arguments are checked, a mesh gives each device its shards, padding is masked, the form is chosen,
and inputs are cast to the precision it computes in.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rwkv_jax.sharding import axes_of, check_axis, is_explicit, is_manual, mapped
from rwkv_jax.typing import Array, Bool, Callable, Float, Int
from rwkv_jax.wkv import default, pallas, sequence, v4, v6, v7
from rwkv_jax.wkv.form import Form, compute_dtype, in_compute_dtype
from rwkv_jax.wkv.v4.recurrence import Inputs as Inputs4
from rwkv_jax.wkv.v4.recurrence import Wkv4State
from rwkv_jax.wkv.v6.recurrence import Inputs as Inputs6
from rwkv_jax.wkv.v7.recurrence import Inputs as Inputs7

IMPLEMENTATIONS = ("scan", "chunked", "associative")
"""The names that `implementation=` takes on any device."""
KERNELS = ("pallas_gpu", "pallas_tpu")
"""The names that it takes on one kind of device; interpreted on a CPU."""

_PLATFORMS = {"pallas_gpu": "cuda", "pallas_tpu": "tpu"}


class Operator(NamedTuple):
    """What the operators differ in."""

    name: str
    axes: dict[str, str]
    """The inputs' axes, one letter each (`rwkv_jax.typing`)."""
    state: str
    """The state's axes."""
    forms: dict[str, Form]
    on_part: Callable[..., tuple[Array, Any]]
    """(form, mesh axis, x, state, reset): one device's tokens, where time is sharded."""


_AXES4 = {"log_w": "c", "k": "btc", "v": "btc", "u": "c"}
_AXES6 = dict.fromkeys(("r", "log_w", "k", "v"), "bthn") | {"u": "hn", "initial": "hnn"}
_AXES7 = dict.fromkeys(Inputs7._fields, "bthn")

WKV4 = Operator("wkv4", _AXES4, "bc", v4.FORMS, sequence.wkv4)
WKV6 = Operator("wkv6", _AXES6, "bhnn", v6.FORMS, sequence.wkv6)
WKV7 = Operator("wkv7", _AXES7, "bhnn", v7.FORMS, sequence.wkv7)


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
    """The WKV of version 4: `y` in the dtype of `v`, and the state after the last token.

    `log_w <= 0` is the log of the decay per token (official `-exp(time_decay)`), `u` the bonus of
    the current token (`time_first`). Computes in float32, or float64 if any input is. The gradient
    of the final state flows through `num` and `den`; `max_exp` is only their scale. The other
    arguments are common to all versions (`rwkv_jax.wkv`).

    Raises `ValueError` for an unknown implementation, shapes that do not match, and a mesh axis
    that does not exist or does not divide the length.
    """
    _check_shapes("wkv4", k.ndim == 3 and k.shape == v.shape, k=k, v=v)
    _check_shapes("wkv4", log_w.shape == u.shape == k.shape[2:], log_w=log_w, u=u, k=k)
    x, shape = Inputs4(log_w, k, v, u), (k.shape[0], k.shape[2])
    if state is None:
        state = Wkv4State.empty(shape, compute_dtype(x))
    for z in state:
        _check_shapes("wkv4", z.shape == shape, state=z, k=k)
    return _apply(WKV4, x, Wkv4State(*state), reset, lengths, mesh_axis, implementation)


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
    """The WKV of versions 5 and 6: `y` in the dtype of `v`, and the state after the last token.

    `log_w <= 0` is the log of the decay: of each token in version 6, `[h, k]` for all tokens in
    version 5. Every implementation is exact for any decay. `u` is the bonus of the current token.
    Documents start from the state `initial` (state tuning), or from zero. Computes in float32, or
    float64 if any input is. The other arguments are common to all versions (`rwkv_jax.wkv`).

    Raises `ValueError` for an unknown implementation, shapes that do not match, and a mesh axis
    that does not exist or does not divide the length.
    """
    same = r.ndim == 4 and r.shape == k.shape and log_w.shape in (r.shape, r.shape[2:])
    _check_shapes("wkv6", same, r=r, log_w=log_w, k=k)
    _check_shapes("wkv6", v.ndim == 4 and v.shape[:3] == r.shape[:3], r=r, v=v)
    _check_shapes("wkv6", u.shape == r.shape[2:], u=u, r=r)
    x = Inputs6(r, log_w, k, v, u)
    dtype = compute_dtype(x, state, initial)
    shape = (r.shape[0], r.shape[2], v.shape[3], r.shape[3])
    if initial is not None:
        _check_shapes("wkv6", initial.shape == shape[1:], initial=initial, r=r, v=v)
        x = x._replace(initial=initial.astype(dtype))
    if state is None:
        state = jnp.zeros(shape, dtype)
        state = state if x.initial is None else state + x.initial[None]
    _check_shapes("wkv6", state.shape == shape, state=state, r=r, v=v)
    return _apply(WKV6, x, state, reset, lengths, mesh_axis, implementation)


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
    mesh_axis: str | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h v k"]]:
    """The WKV of version 7: `y` in the dtype of `v`, and the state after the last token.

    `log_w <= 0` is the log of the decay, in (-0.6066, 0) in the model; the chunked forms are exact
    down to -4 a token, `scan` for any decay. The model passes `a = -kk` and `b = kk * (learning
    rate)` with |kk| = 1. Computes in float32, or float64 if any input is. The other arguments are
    common to all versions (`rwkv_jax.wkv`).

    Raises `ValueError` for an unknown implementation, shapes that do not match, and a mesh axis
    that does not exist or does not divide the length.
    """
    same = r.ndim == 4 and r.shape == log_w.shape == k.shape == a.shape == b.shape
    _check_shapes("wkv7", same, r=r, log_w=log_w, k=k, a=a, b=b)
    _check_shapes("wkv7", v.ndim == 4 and v.shape[:3] == r.shape[:3], r=r, v=v)
    x = Inputs7(r, log_w, k, v, a, b)
    shape = (r.shape[0], r.shape[2], v.shape[3], r.shape[3])
    if state is None:
        state = jnp.zeros(shape, compute_dtype(x))
    _check_shapes("wkv7", state.shape == shape, state=state, r=r, v=v)
    return _apply(WKV7, x, state, reset, lengths, mesh_axis, implementation)


def _apply(
    operator: Operator,
    x: Any,
    state: Any,
    reset: Array | None,
    lengths: Array | None,
    mesh_axis: str | None,
    implementation: str | None,
) -> tuple[Array, Any]:
    """The operator on arrays of the whole mesh: `_on_shard` on every device of its shards.

    Shardings are read off the arrays' types, where mesh axes are explicit. All arrays follow `v`,
    and where it is replicated, the first array that is sharded.
    """
    _check_inputs(operator.name, x, reset, lengths)
    if implementation not in (None, *IMPLEMENTATIONS, *KERNELS):
        known = ", ".join(IMPLEMENTATIONS + KERNELS)
        raise ValueError(f"implementation {implementation!r}: one of {known}, or None")
    run = partial(_on_shard, operator, mesh_axis, implementation)
    args = (x, state, reset, lengths)
    arrays = {name: z for name, z in x._asdict().items() if z is not None}
    # Version 5's log_w has no leading axes.
    inputs = type(x)(**{name: operator.axes[name][-z.ndim :] for name, z in arrays.items()})
    letters = (inputs, operator.state, "bt", "b")
    axes = axes_of((inputs.v, letters), (x.v, args))
    if mesh_axis and not is_manual(mesh_axis):
        check_axis(operator.name, mesh_axis, x.v.shape[1])
        axes["t"] = mesh_axis
    elif "t" in axes:
        raise ValueError(
            f"{operator.name}: time is sharded over {axes['t']!r}; pass mesh_axis={axes['t']!r}"
        )
    if "n" in axes:
        raise ValueError(
            f"{operator.name}: the channels of a head are sharded over {axes['n']!r}; shard whole"
            " heads"
        )
    if axes or (is_explicit() and pallas.needs_shard_map(implementation)):
        run = mapped(run, letters, (inputs.v, operator.state), axes)
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
    valid = _valid(lengths, x.v.shape[1], mesh_axis)
    if valid is not None and reset is not None:
        reset = reset & valid
    tokens = {name: getattr(x, name) for name, dims in operator.axes.items() if "t" in dims}
    if x.log_w.ndim == 2:  # version 5
        tokens["log_w"] = jnp.broadcast_to(x.log_w[None, None], x.k.shape)
    if valid is not None:
        # Zeros: no decay, nothing written, nothing removed, even if the padding holds NaN.
        rows = valid.reshape(*valid.shape, *(1,) * (x.k.ndim - 2))
        tokens = {name: jnp.where(rows, z, jnp.zeros_like(z)) for name, z in tokens.items()}
    dtype = compute_dtype(x, state)
    x = x._replace(**tokens)
    state = jax.tree.map(lambda z: z.astype(dtype), state)
    if operator is WKV4:  # whose decay no zeros in the padding can stop
        x = x._replace(mask=valid)

    form, is_kernel = _choose(operator, implementation, x, state)
    run = form if mesh_axis is None else partial(operator.on_part, form, mesh_axis)
    # Kernels take any dtype, and round y themselves.
    return (run if is_kernel else in_compute_dtype(run))(x, state, reset)


def _choose(
    operator: Operator, implementation: str | None, x: Any, state: Any
) -> tuple[Form, bool]:
    """The form, and whether it is a kernel."""
    if implementation is None:
        return default.choose(operator.name, x, state)
    if implementation in KERNELS:
        return pallas.form(operator.name, _PLATFORMS[implementation], named=True), True
    return operator.forms[implementation], False


def _valid(lengths: Array | None, time: int, mesh_axis: str | None) -> Bool[Array, "b t"] | None:
    """Where tokens are valid (not padding); None without `lengths`, which count the whole row."""
    if lengths is None:
        return None
    first = 0 if mesh_axis is None else lax.axis_index(mesh_axis) * time
    return first + jnp.arange(time)[None] < lengths[:, None]


def _check_shapes(operator: str, match: bool, **arrays: Any) -> None:
    if not match:
        shapes = ", ".join(f"{name} {list(z.shape)}" for name, z in arrays.items())
        raise ValueError(f"{operator}: shapes do not match: {shapes}")


def _check_inputs(operator: str, x: Any, reset: Array | None, lengths: Array | None) -> None:
    for z in jax.tree.leaves(x):
        if not jnp.issubdtype(z.dtype, jnp.floating):
            raise ValueError(f"{operator}: inputs are floating-point numbers, not {z.dtype}")
        if jax.typeof(z).manual_axis_type.varying:
            raise ValueError(
                f"{operator}: inside jax.shard_map, pass it check_vma=False; JAX cannot track"
                " values that vary across devices through a hand-written gradient"
            )
    rows = x.k.shape[:2]
    if rows[1] == 0:
        raise ValueError(f"{operator}: no tokens, in inputs of shape {list(x.k.shape)}")
    if reset is not None:
        if reset.dtype != jnp.bool_:
            raise ValueError(f"{operator}: reset is bool, not {reset.dtype}")
        _check_shapes(operator, reset.shape == rows, reset=reset, k=x.k)
    if lengths is not None:
        _check_shapes(operator, lengths.shape == rows[:1], lengths=lengths, k=x.k)
