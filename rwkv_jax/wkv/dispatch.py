"""The front of each operator: checks arguments, fills in defaults, picks the implementation."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rwkv_jax.typing import Array, Bool, Callable, Float, Int
from rwkv_jax.wkv import default, kernels, sharded
from rwkv_jax.wkv.device import accelerator
from rwkv_jax.wkv.precision import computed, precision
from rwkv_jax.wkv.v4 import associative as v4_associative
from rwkv_jax.wkv.v4 import chunked as v4_chunked
from rwkv_jax.wkv.v4 import pallas_gpu as v4_pallas_gpu
from rwkv_jax.wkv.v4 import pallas_tpu as v4_pallas_tpu
from rwkv_jax.wkv.v4 import recurrence as v4_scan
from rwkv_jax.wkv.v4.recurrence import Wkv4State
from rwkv_jax.wkv.v6 import associative as v6_associative
from rwkv_jax.wkv.v6 import chunked as v6_chunked
from rwkv_jax.wkv.v6 import pallas_gpu as v6_pallas_gpu
from rwkv_jax.wkv.v6 import pallas_tpu as v6_pallas_tpu
from rwkv_jax.wkv.v6 import recurrence as v6_scan
from rwkv_jax.wkv.v7 import associative as v7_associative
from rwkv_jax.wkv.v7 import chunked as v7_chunked
from rwkv_jax.wkv.v7 import pallas_gpu as v7_pallas_gpu
from rwkv_jax.wkv.v7 import pallas_tpu as v7_pallas_tpu
from rwkv_jax.wkv.v7 import recurrence as v7_scan

IMPLEMENTATIONS = ("scan", "chunked", "associative")
"""Names that `implementation=` takes on any device."""
KERNELS = ("pallas_gpu", "pallas_tpu")
"""Those that it takes besides: of one kind of device, and interpreted on a CPU."""


class Table(NamedTuple):
    """What there is of one operator. All take inputs of any type and give `y` in that of `v`."""

    forms: dict[str, Callable[..., Any]]
    fastest: Callable[..., Any]
    """What `implementation=None` is."""
    part: Callable[..., Any]
    """(form, mesh axis, ...): a device's part of the sequence."""
    v: int
    """Which argument is v."""


_WKV4 = Table(
    {
        "scan": computed(v4_scan.wkv4, v=2),
        "chunked": computed(v4_chunked.wkv4, v=2),
        "associative": computed(v4_associative.wkv4, v=2),
        "pallas_gpu": v4_pallas_gpu.wkv4,
        "pallas_tpu": v4_pallas_tpu.wkv4,
    },
    default.wkv4,
    sharded.wkv4,
    v=2,
)
_WKV6 = Table(
    {
        "scan": computed(v6_scan.wkv6, v=3),
        "chunked": computed(v6_chunked.wkv6, v=3),
        "associative": computed(v6_associative.wkv6, v=3),
        "pallas_gpu": v6_pallas_gpu.wkv6,
        "pallas_tpu": v6_pallas_tpu.wkv6,
    },
    default.wkv6,
    sharded.wkv6,
    v=3,
)
_WKV7 = Table(
    {
        "scan": computed(v7_scan.wkv7, v=3),
        "chunked": computed(v7_chunked.wkv7, v=3),
        "associative": computed(v7_associative.wkv7, v=3),
        "pallas_gpu": v7_pallas_gpu.wkv7,
        "pallas_tpu": v7_pallas_tpu.wkv7,
    },
    default.wkv7,
    sharded.wkv7,
    v=3,
)


_ROWS = {"reset": "bt", "lengths": "b"}
_DIMS4 = _ROWS | {"log_w": "c", "k": "btc", "v": "btc", "u": "c", "state": "bc"}
_DIMS7 = _ROWS | dict.fromkeys(("r", "log_w", "k", "v", "a", "b"), "bthn") | {"state": "bhnn"}
_DIMS6 = _DIMS7 | {"u": "hn", "initial": "hnn"}
"""The axes of what the operators are given, for their parts on devices."""


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
    """The WKV of version 4: `y` in `v`'s dtype, and the state after the last token.

    `log_w <= 0` is the log of the decay per token (official `-exp(time_decay)`), `u` the bonus of
    the current token (`time_first`). Computes in float32, or float64 for float64 inputs. The
    gradient of the final state flows through `num` and `den`; `max_exp` is their scale, not a
    quantity of its own. The other arguments are those of all versions (`rwkv_jax.wkv`).

    Raises `ValueError` for an unknown implementation, shapes that do not belong together, or a mesh
    axis that is not there or does not divide the length.
    """
    _check_shapes("wkv4", k.ndim == 3 and k.shape == v.shape, k=k, v=v)
    b, t, c = k.shape
    _check_shapes("wkv4", log_w.shape == u.shape == (c,), log_w=log_w, u=u, k=k)
    _check_inputs("wkv4", (log_w, k, v, u), reset, lengths)
    run = _choose(_WKV4, implementation, mesh_axis)
    dtype = precision(log_w, k, v, u, state)
    state = Wkv4State.empty((b, c), dtype) if state is None else Wkv4State(*state)
    for x in state:
        _check_shapes("wkv4", x.shape == (b, c), state=x, k=k)
    options: Any = {"mesh_axis": mesh_axis, "implementation": implementation}
    given = {"log_w": log_w, "k": k, "v": v, "u": u, "state": state}
    given |= {"reset": reset, "lengths": lengths}
    parts = sharded.over_devices(
        "wkv4", partial(wkv4, **options), mesh_axis, _DIMS4, given, kernels.mapped(implementation)
    )
    if parts is not None:
        return parts
    state = Wkv4State(*(x.astype(dtype) for x in state))
    reset, mask = _masks(reset, lengths, t, mesh_axis)
    k, v = _erase(mask, k, v)
    return run(log_w, k, v, u, state, reset, mask)


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
    """The WKV of versions 5 and 6: `y` in `v`'s dtype, and the state after the last token.

    `log_w <= 0` is the log of the decay, of every token in version 6, of all tokens alike (`[h,
    k]`) in version 5; every implementation is exact for any decay. `u` is the bonus of the current
    token. Documents start from `initial` (state tuning), or from zero. Computes in float32, or
    float64 for float64 inputs. The other arguments are those of all versions (`rwkv_jax.wkv`).

    Raises `ValueError` for an unknown implementation, shapes that do not belong together, or a mesh
    axis that is not there or does not divide the length.
    """
    same = r.ndim == 4 and r.shape == k.shape and log_w.shape in (r.shape, r.shape[2:])
    _check_shapes("wkv6", same, r=r, log_w=log_w, k=k)
    _check_shapes("wkv6", v.ndim == 4 and v.shape[:3] == r.shape[:3], r=r, v=v)
    _check_shapes("wkv6", u.shape == r.shape[2:], u=u, r=r)
    _check_inputs("wkv6", (v, r, log_w, k, u), reset, lengths)
    batch, t, h, n = r.shape
    run = _choose(_WKV6, implementation, mesh_axis)
    dtype = precision(r, log_w, k, v, u, state, initial)
    shape = (batch, h, v.shape[-1], n)
    if initial is not None:
        _check_shapes("wkv6", initial.shape == shape[1:], initial=initial, r=r, v=v)
        initial = initial.astype(dtype)
    if state is None:
        state = jnp.zeros(shape, dtype)
        state = state if initial is None else state + initial[None]
    _check_shapes("wkv6", state.shape == shape, state=state, r=r, v=v)
    options: Any = {"mesh_axis": mesh_axis, "implementation": implementation}
    given = {"r": r, "log_w": log_w, "k": k, "v": v, "u": u, "state": state}
    given |= {"reset": reset, "lengths": lengths, "initial": initial}
    dims = _DIMS6 if log_w.ndim == 4 else _DIMS6 | {"log_w": "hn"}
    parts = sharded.over_devices(
        "wkv6", partial(wkv6, **options), mesh_axis, dims, given, kernels.mapped(implementation)
    )
    if parts is not None:
        return parts
    if log_w.ndim == 2:
        log_w = jnp.broadcast_to(log_w[None, None], r.shape)
    reset, mask = _masks(reset, lengths, t, mesh_axis)
    r, log_w, k, v = _erase(mask, r, log_w, k, v)
    return run(r, log_w, k, v, u, state.astype(dtype), reset, initial)


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
    """The WKV of version 7: `y` in `v`'s dtype, and the state after the last token.

    `log_w <= 0` is the log of the decay, in (-0.6066, 0) in the model; the chunked forms are exact
    down to -4 a token, `scan` for any decay. The model passes `a = -kk` and `b = kk * (learning
    rate)` with |kk| = 1. Computes in float32, or float64 for float64 inputs. The other arguments
    are those of all versions (`rwkv_jax.wkv`).

    Raises `ValueError` for an unknown implementation, shapes that do not belong together, or a mesh
    axis that is not there or does not divide the length.
    """
    same = r.ndim == 4 and r.shape == log_w.shape == k.shape == a.shape == b.shape
    _check_shapes("wkv7", same, r=r, log_w=log_w, k=k, a=a, b=b)
    _check_shapes("wkv7", v.ndim == 4 and v.shape[:3] == r.shape[:3], r=r, v=v)
    _check_inputs("wkv7", (v, r, log_w, k, a, b), reset, lengths)
    batch, t, h, n = r.shape
    run = _choose(_WKV7, implementation, mesh_axis)
    dtype = precision(r, log_w, k, v, a, b, state)
    shape = (batch, h, v.shape[-1], n)
    if state is None:
        state = jnp.zeros(shape, dtype)
    _check_shapes("wkv7", state.shape == shape, state=state, r=r, v=v)
    options: Any = {"mesh_axis": mesh_axis, "implementation": implementation}
    given = {"r": r, "log_w": log_w, "k": k, "v": v, "a": a, "b": b, "state": state}
    given |= {"reset": reset, "lengths": lengths}
    parts = sharded.over_devices(
        "wkv7", partial(wkv7, **options), mesh_axis, _DIMS7, given, kernels.mapped(implementation)
    )
    if parts is not None:
        return parts
    reset, mask = _masks(reset, lengths, t, mesh_axis)
    r, log_w, k, v, a, b = _erase(mask, r, log_w, k, v, a, b)
    return run(r, log_w, k, v, a, b, state.astype(dtype), reset)


def _choose(table: Table, implementation: str | None, mesh_axis: str | None) -> Callable[..., Any]:
    """The implementation; under a mesh axis, of each device's part."""
    if implementation is None:
        run = table.fastest
    elif implementation in table.forms:
        run = table.forms[implementation]
    else:
        known = ", ".join(table.forms)
        raise ValueError(f"implementation {implementation!r}: one of {known}, or None")
    if mesh_axis is None:
        return run
    part = partial(table.part, run, mesh_axis)
    # What a part lacks is added to its y, which only kernels have rounded before.
    kernel = implementation in KERNELS or (implementation is None and accelerator())
    return part if kernel else computed(part, v=table.v)


def _check_shapes(operator: str, agree: bool, **arrays: Any) -> None:
    if not agree:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in arrays.items())
        raise ValueError(f"{operator}: shapes do not belong together: {shapes}")


def _check_inputs(
    operator: str, inputs: tuple[Array, ...], reset: Array | None, lengths: Array | None
) -> None:
    """That inputs are numbers, there is a token, and rows are as many as everywhere."""
    rows = next(x for x in inputs if x.ndim > 2).shape[:2]
    for x in inputs:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{operator}: inputs are floating-point numbers, not {x.dtype}")
        if jax.typeof(x).manual_axis_type.varying:
            raise ValueError(
                f"{operator}: inside jax.shard_map, give that check_vma=False; JAX cannot follow"
                " what varies over devices through a gradient by hand"
            )
    if rows[1] == 0:
        raise ValueError(f"{operator}: no tokens, in inputs of shape {list(inputs[1].shape)}")
    if reset is not None:
        if reset.dtype != jnp.bool_:
            raise ValueError(f"{operator}: reset is bool, not {reset.dtype}")
        _check_shapes(operator, reset.shape == rows, reset=reset, x=inputs[1])
    if lengths is not None:
        _check_shapes(operator, lengths.shape == rows[:1], lengths=lengths, x=inputs[1])


def _masks(
    reset: Array | None, lengths: Array | None, time: int, mesh_axis: str | None
) -> tuple[Array | None, Array | None]:
    """Where documents start, and where tokens are real: none starts in the padding."""
    mask = sharded.mask_of(lengths, time, mesh_axis)
    return (reset if mask is None or reset is None else reset & mask), mask


def _erase(mask: Array | None, *inputs: Array) -> tuple[Array, ...]:
    """Zeros where tokens are padding: no decay, nothing written, nothing removed; whatever was
    there, were it not a number."""
    if mask is None:
        return inputs
    mask = mask.reshape(*mask.shape, *(1,) * (inputs[0].ndim - 2))
    return tuple(jnp.where(mask, x, jnp.zeros_like(x)) for x in inputs)
