"""The recurrences with their time axis spread over the devices of a mesh axis.

Each device runs its part of the sequence as if nothing had come before, and sums it up as a map of
the state that enters it, whose size does not depend on the length. The maps are joined from device
to device: each learns what enters its own part.

    version   the map of a part                what y still lacks
    4         (e^D, numerator, denominator)    a second pass, from the state that enters
    5, 6      S -> S diag(P) + X               S (r_t * decay since the part began)
    7         S -> S M + X                     S Q_t, Q_t the same recurrence of the unit matrix

Versions 5 to 7 are linear in the state, so that one pass is enough: y is the part's own plus what
is read from the state that enters. Version 7 finds M and Q_t in the same pass, by n more rows of
the state, which start as the unit matrix and are fed nothing.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from rwkv_jax.sharding import check_axis, is_manual, names_of
from rwkv_jax.typing import Array, Bool, Callable, Float, Int
from rwkv_jax.wkv.v4 import associative as v4
from rwkv_jax.wkv.v4.recurrence import Wkv4State
from rwkv_jax.wkv.v6 import associative as v6
from rwkv_jax.wkv.v7 import associative as v7


def over_devices(
    operator: str,
    run: Callable,
    mesh_axis: str | None,
    dims: dict[str, str],
    given: dict[str, Any],
    each: bool = False,
) -> Any:
    """`run(**given)`, (y, state), on every device of its part; None where there is nothing to part.

    `dims` has a letter for each axis of each array, as `rwkv_jax.typing`; y's are those of v. Time,
    "t", is parted over `mesh_axis`, unless the caller runs there already. Over explicit mesh axes
    arrays are parted as v is, and where v is whole as any other is: a loop's carry must be what its
    type says, which shapes with a name inside are not. `each`: over explicit axes that part nothing
    too, every device then doing the same.

    Raises `ValueError` if there is no such mesh axis, it does not divide the length, or arrays are
    parted along an axis that recurrences run over or look along.
    """
    axes: dict[str, Axis] = {}
    for name in ("v", *given):  # v first: where they differ, the others are brought to it
        for x in jax.tree.leaves(given[name]):
            axes = _explicit(dims[name], x) | axes
    if mesh_axis and not is_manual(mesh_axis):
        check_axis(operator, mesh_axis, given["v"].shape[1])
        axes["t"] = mesh_axis
    elif "t" in axes:
        raise ValueError(
            f"{operator}: time is sharded over {axes['t']!r}; say so, by mesh_axis={axes['t']!r}"
        )
    explicit = set(jax.sharding.get_abstract_mesh().explicit_axes)
    if not axes and not (each and explicit):
        return None
    if "n" in axes:
        raise ValueError(
            f"{operator}: heads are sharded inside over {axes['n']!r}; shard whole ones"
        )

    def spec(name: str) -> PartitionSpec:
        return PartitionSpec(*(axes.get(letter) for letter in dims[name]))

    specs = {name: jax.tree.map(lambda _, n=name: spec(n), x) for name, x in given.items()}
    if explicit:
        given = jax.tree.map(partial(_reshard, explicit), given, specs)
    spread = jax.shard_map(
        lambda given: run(**given),
        in_specs=(specs,),
        out_specs=(spec("v"), spec("state")),
        # Every explicit axis: without a `jit`, JAX maps over all of them or none.
        axis_names=explicit | {name for axis in axes.values() for name in names_of(axis)},
        check_vma=False,
    )
    return spread(given)


Axis = str | tuple[str, ...]


def _explicit(dims: str, x: Array) -> dict[str, Axis]:
    """The explicit mesh axes that an array's type says it is parted over, by letter."""
    spec = jax.typeof(x).sharding.spec
    return {letter: axis for letter, axis in zip(dims, spec, strict=False) if names_of(axis)}


def _reshard(explicit: set[str], x: Array, spec: PartitionSpec) -> Array:
    """`x` parted so; where axes are explicit nobody else does it."""
    mine = list(jax.typeof(x).sharding.spec) + [None] * x.ndim
    wanted = [
        axis if set(names_of(axis)) and set(names_of(axis)) <= explicit else mine[i]
        for i, axis in enumerate(spec)
    ]
    return jax.reshard(x, PartitionSpec(*wanted, *mine[len(wanted) : x.ndim]))


def mask_of(
    lengths: Int[Array, " b"] | None, time: int, axis: str | None
) -> Bool[Array, "b t"] | None:
    """Where tokens are real, given how many of each row are."""
    if lengths is None:
        return None
    first = 0 if axis is None else lax.axis_index(axis) * time
    return first + jnp.arange(time)[None] < lengths[:, None]


def exchange(axis: str, compose: Callable, act: Callable, part: Any, state: Any) -> tuple[Any, Any]:
    """The state that enters this device's part, and the one after the last device's.

    `compose(first, second)` is the map of two parts in a row, `act(state, part)` the state after
    one. Maps go from device to device, twice as far each time, so that one receives as many as
    there are doublings, whatever the length; a gathering of all of them XLA would make whole over
    the rows and heads that automatic axes shard. The doublings are not a loop: XLA's runtime for
    CPUs lets permutes inside of one run beside those outside, and takes them for the same.
    """
    mine, count = lax.axis_index(axis), lax.axis_size(axis)

    def from_before(x: Any, distance: int) -> Any:
        pairs = [(i, i + distance) for i in range(count - distance)]
        return jax.tree.map(lambda x: lax.ppermute(x, axis, pairs), x)

    distance = 1
    while distance < count:
        longer = compose(from_before(part, distance), part)
        part, distance = _where(mine >= distance, longer, part), 2 * distance
    after = act(state, part)
    entering = _where(mine == 0, state, from_before(after, 1))
    last = _where(mine == count - 1, after, jax.tree.map(jnp.zeros_like, after))
    return entering, lax.psum(last, axis)


def _where(condition: Array, x: Any, y: Any) -> Any:
    return jax.tree.map(partial(jnp.where, condition), x, y)


def wkv4(
    run: Callable,
    axis: str,
    log_w: Float[Array, " c"],
    k: Float[Array, "b t c"],
    v: Float[Array, "b t c"],
    u: Float[Array, " c"],
    state: Wkv4State,
    reset: Bool[Array, "b t"] | None,
    mask: Bool[Array, "b t"] | None,
) -> tuple[Float[Array, "b t c"], Wkv4State]:
    """A device's part of `rwkv_jax.wkv.wkv4`; `run` is the implementation that it uses."""
    empty = Wkv4State.empty(state.num.shape, state.num.dtype)
    _, part = run(log_w, k, v, u, empty, reset, mask)
    count = k.shape[1] if mask is None else jnp.sum(mask, 1, dtype=state.num.dtype)[:, None]
    begun = None if reset is None else jnp.any(reset, 1)[:, None]
    log_decay = log_w.astype(state.num.dtype)[None]
    decay = jnp.broadcast_to(v4.part_decay(log_decay, count, begun), state.num.shape)

    def act(state: Wkv4State, part: tuple[Array, Wkv4State]) -> Wkv4State:
        return v4.combine(state, *part)

    entering, last = exchange(axis, v4.compose, act, (decay, part), state)
    y, _ = run(log_w, k, v, u, entering, reset, mask)
    return y, last


def wkv6(
    run: Callable,
    axis: str,
    r: Float[Array, "b t h k"],
    log_w: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    u: Float[Array, "h k"],
    state: Float[Array, "b h v k"],
    reset: Bool[Array, "b t"] | None,
    initial: Float[Array, "h v k"] | None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h v k"]]:
    """A device's part of `rwkv_jax.wkv.wkv6`."""
    y, added = run(r, log_w, k, v, u, jnp.zeros_like(state), reset, initial)
    upto = jnp.cumsum(log_w.astype(state.dtype), axis=1)
    seen = jnp.exp(jnp.pad(upto[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0))))
    kept = jnp.exp(upto[:, -1])[:, :, None]
    if reset is not None:
        begun = jnp.cumsum(reset, axis=1) > 0
        seen = jnp.where(begun[:, :, None, None], 0, seen)
        kept = jnp.where(begun[:, -1, None, None, None], 0, kept)

    entering, last = exchange(axis, v6.compose, v6.act, (kept, added), state)
    return add(y, read(entering, r.astype(state.dtype) * seen)), last


def wkv7(
    run: Callable,
    axis: str,
    r: Float[Array, "b t h k"],
    log_w: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    a: Float[Array, "b t h k"],
    b: Float[Array, "b t h k"],
    state: Float[Array, "b h v k"],
    reset: Bool[Array, "b t"] | None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h v k"]]:
    """A device's part of `rwkv_jax.wkv.wkv7`."""
    rows, n = state.shape[-2:]
    unit = jnp.broadcast_to(jnp.eye(n, dtype=state.dtype), (*state.shape[:-2], n, n))
    start = jnp.concatenate([jnp.zeros_like(state), unit], -2)
    both = jnp.concatenate([v, jnp.zeros(r.shape, v.dtype)], -1)
    y, after = run(r, log_w, k, both, a, b, start, reset)
    part = (after[..., rows:, :], after[..., :rows, :])
    entering, last = exchange(axis, v7.compose, v7.act, part, state)
    return add(y[..., :rows], read(entering, y[..., rows:].astype(state.dtype))), last


def add(y: Float[Array, "b t h v"], more: Float[Array, "b t h v"]) -> Float[Array, "b t h v"]:
    """Their sum, in the type of y."""
    return (y.astype(more.dtype) + more).astype(y.dtype)


def read(state: Float[Array, "b h v k"], with_: Float[Array, "b t h k"]) -> Float[Array, "b t h v"]:
    """What every token reads from one state."""
    return jnp.einsum("bhvk,bthk->bthv", state, with_, precision=lax.Precision.HIGHEST)
