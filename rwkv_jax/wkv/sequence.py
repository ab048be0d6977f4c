"""The recurrences with time sharded over a mesh axis: what one device computes of its own tokens.

Each device runs its tokens as if nothing came before them, and summarises them as a map of the
state that enters, whose size does not depend on the length. The devices' maps are combined, which
gives each device the state that enters its tokens.

    version   the map of a device's tokens     what y still lacks
    4         (e^D, numerator, denominator)    a second pass, from the state that enters
    5, 6      S -> S diag(P) + X               S (r_t * decay since the first token)
    7         S -> S M + X                     S Q_t, Q_t the same recurrence of the identity

Versions 5 to 7 are linear in the state, so one pass is enough: y is the device's own plus what it
reads from the state that enters. Version 7 computes M and Q_t in the same pass, by n more rows of
the state that start as the identity and have no values to write.

Every function runs inside a `jax.shard_map` over `axis` and takes one device's tokens; states are
replicated. `form` is the implementation (`rwkv_jax.wkv.form`).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rwkv_jax.typing import Array, Callable, Float
from rwkv_jax.wkv.form import Form, Output, Starts, State
from rwkv_jax.wkv.v4 import associative as v4
from rwkv_jax.wkv.v4.recurrence import Inputs as Inputs4
from rwkv_jax.wkv.v4.recurrence import Wkv4State
from rwkv_jax.wkv.v6 import associative as v6
from rwkv_jax.wkv.v6.recurrence import Inputs as Inputs6
from rwkv_jax.wkv.v7 import associative as v7
from rwkv_jax.wkv.v7.recurrence import Inputs as Inputs7


def wkv4(
    form: Form, axis: str, x: Inputs4, state: Wkv4State, reset: Starts
) -> tuple[Float[Array, "b t c"], Wkv4State]:
    """`y` of this device's tokens, and the state after the last device's."""
    shape, dtype = state.num.shape, state.num.dtype
    _, added = form(x, Wkv4State.empty(shape, dtype), reset)
    count = x.k.shape[1] if x.mask is None else jnp.sum(x.mask, 1, dtype=dtype)[:, None]
    restarts = None if reset is None else jnp.any(reset, 1)[:, None]
    decay = v4.decay_over(x.log_w.astype(dtype)[None], count, restarts)

    def act(state: Wkv4State, map_: tuple[Array, Wkv4State]) -> Wkv4State:
        return v4.combine(state, *map_)

    map_ = (jnp.broadcast_to(decay, shape), added)
    entering, last = exchange(axis, v4.compose, act, map_, state)
    y, _ = form(x, entering, reset)
    return y, last


def wkv6(form: Form, axis: str, x: Inputs6, state: State, reset: Starts) -> tuple[Output, State]:
    """`y` of this device's tokens, and the state after the last device's."""
    y, added = form(x, jnp.zeros_like(state), reset)
    upto = jnp.cumsum(x.log_w.astype(state.dtype), axis=1)
    since_first = jnp.exp(jnp.pad(upto[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0))))
    decay = jnp.exp(upto[:, -1])[:, :, None]
    if reset is not None:
        restarted = jnp.cumsum(reset, axis=1) > 0
        since_first = jnp.where(restarted[:, :, None, None], 0, since_first)
        decay = jnp.where(restarted[:, -1, None, None, None], 0, decay)

    entering, last = exchange(axis, v6.compose, v6.act, (decay, added), state)
    return _add(y, _read(entering, x.r.astype(state.dtype) * since_first)), last


def wkv7(form: Form, axis: str, x: Inputs7, state: State, reset: Starts) -> tuple[Output, State]:
    """`y` of this device's tokens, and the state after the last device's."""
    rows, n = state.shape[-2:]
    identity = jnp.broadcast_to(jnp.eye(n, dtype=state.dtype), (*state.shape[:-2], n, n))
    start = jnp.concatenate([jnp.zeros_like(state), identity], -2)
    wide = x._replace(v=jnp.concatenate([x.v, jnp.zeros(x.r.shape, x.v.dtype)], -1))
    if x.initial is not None:  # the rows of the identity start again from zero
        wide = wide._replace(initial=jnp.pad(x.initial, ((0, 0), (0, n), (0, 0))))
    y, after = form(wide, start, reset)
    map_ = (after[..., rows:, :], after[..., :rows, :])
    entering, last = exchange(axis, v7.compose, v7.act, map_, state)
    return _add(y[..., :rows], _read(entering, y[..., rows:].astype(state.dtype))), last


def exchange(axis: str, compose: Callable, act: Callable, map_: Any, state: Any) -> tuple[Any, Any]:
    """The state that enters this device's tokens, and the one after the last device's.

    `map_` maps the state that enters a range of tokens to the one that leaves it: for this device's
    tokens, and from the first device's `state` on. `compose(first, second)` is the map of two
    ranges in a row, `act(state, map_)` applies one.
    """
    # Maps travel from device to device, twice as far each time: each device receives log2(devices)
    # maps, whatever the length. An all-gather of them would be replicated over the rows and heads
    # that automatic mesh axes shard. The doublings are no loop, because XLA's CPU runtime lets
    # permutes inside a loop run beside those outside of it and mistakes one for the other.
    mine, count = lax.axis_index(axis), lax.axis_size(axis)

    def from_before(x: Any, distance: int) -> Any:
        pairs = [(i, i + distance) for i in range(count - distance)]
        return jax.tree.map(lambda x: lax.ppermute(x, axis, pairs), x)

    distance = 1
    while distance < count:
        longer = compose(from_before(map_, distance), map_)
        map_, distance = _where(mine >= distance, longer, map_), 2 * distance
    after = act(state, map_)
    entering = _where(mine == 0, state, from_before(after, 1))
    last = _where(mine == count - 1, after, jax.tree.map(jnp.zeros_like, after))
    return entering, lax.psum(last, axis)


def _where(condition: Array, x: Any, y: Any) -> Any:
    return jax.tree.map(partial(jnp.where, condition), x, y)


def _add(y: Output, more: Output) -> Output:
    """Their sum, in the type of `y`, which a kernel has already rounded."""
    return (y.astype(more.dtype) + more).astype(y.dtype)


def _read(state: State, key: Float[Array, "b t h k"]) -> Output:
    """`state @ key` of every token."""
    return jnp.einsum("bhvk,bthk->bthv", state, key, precision=lax.Precision.HIGHEST)
