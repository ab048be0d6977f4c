"""The few layers every RWKV version is made of, as pure functions over arrays.

Parameters are float32; each function casts them to the dtype of its input, which is the compute
dtype. Normalisations compute in float32 whatever the input is, or in float64 if it is.
"""

from functools import partial
from typing import Any, Generic

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from rwkv_jax import sharding
from rwkv_jax.containers import container, static
from rwkv_jax.remat import save_for_backward
from rwkv_jax.typing import Array, Bool, Callable, Float, Int, Leaf, PyTree

LAYER_NORM_EPS = 1e-5
"""Of every layer norm (the default of torch's `nn.LayerNorm`)."""
GROUP_NORM_EPS = 64e-5
"""Of every group norm, whatever the head size: the official 1e-5 on y / 8."""


@container
class Norm(Generic[Leaf]):
    """Scale and shift of a normalisation."""

    weight: Leaf
    bias: Leaf


@container
class LowRank(Generic[Leaf]):
    """A change `scale * down @ up` of a linear map (LoRA, arXiv:2106.09685 §4.1)."""

    down: Leaf  # [i, rank]
    up: Leaf  # [rank, o]
    scale: float = static()


@container
class Adapted(Generic[Leaf]):
    """The weight of a linear map with a change beside it, which `linear` adds to the result."""

    weight: Any  # an array, or `Adapted` itself
    change: LowRank[Leaf]


def unadapted(tree: PyTree) -> PyTree:
    """The tree with the weights that were adapted."""

    def weight(x: Any) -> Any:
        return weight(x.weight) if isinstance(x, Adapted) else x

    return jax.tree.map(weight, tree, is_leaf=lambda x: isinstance(x, Adapted))


def precise(x: Float[Array, "..."], like: Array | None = None) -> Float[Array, "..."]:
    """`x` in the type of norms, decays and states, for the compute type of `like`, or of `x`."""
    return x.astype(precise_dtype((x if like is None else like).dtype))


def precise_dtype(dtype: Any) -> Any:
    """float64 if `dtype` is, else float32: of norms, decays and states."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def expand(vector: Float[Array, " c"], x: Float[Array, "*shape c"]) -> Float[Array, "*ones c"]:
    """A parameter vector with the rank and dtype of `x`, to broadcast along its last axis."""
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + vector.shape)


def embed(
    table: Float[Array, "*layers V c"], tokens: Int[Array, "b t"], dtype: Any = None
) -> Float[Array, "*layers b t c"]:
    """The table's rows of these tokens, sharded as the tokens are, in `dtype` (None: the table's).

    Where a mesh shards the table, it does so by columns: what travels grows with the batch, not
    with the vocabulary.
    """
    dtype = dtype or table.dtype

    def look_up(table: Array, tokens: Array) -> Array:
        return table[..., tokens, :].astype(dtype)

    if not sharding.is_explicit():
        return look_up(table, tokens)
    layers = "l" * (table.ndim - 2)
    axes = sharding.axes_of(("bt", layers + "Vk"), (tokens, table))
    columns = sharding.names_of(axes.get("k"))
    by_fsdp, others = sharding.FSDP in columns, tuple(x for x in columns if x != sharding.FSDP)

    def exchange(table: Array, tokens: Array) -> Array:
        if by_fsdp:  # this device's columns for all rows, then all columns of this device's rows
            mine = look_up(table, lax.all_gather(tokens, sharding.FSDP, axis=0, tiled=True))
            mine = lax.all_to_all(mine, sharding.FSDP, table.ndim - 2, table.ndim, tiled=True)
        else:
            mine = look_up(table, tokens)
        return lax.all_gather(mine, others, axis=table.ndim, tiled=True) if others else mine

    if not columns or (by_fsdp and sharding.FSDP not in sharding.names_of(axes.get("b"))):
        table, exchange, axes = sharding.replicate(table), look_up, axes | {"k": None}
    return sharding.mapped(exchange, (layers + "Vk", "bt"), layers + "btc", axes)(table, tokens)


def linear(
    x: Float[Array, "*shape i"], weight: Float[Array, "i o"] | Adapted
) -> Float[Array, "*shape o"]:
    """`x @ weight`; weights are stored [in, out].

    One matrix product over all tokens: with several token axes, XLA's CPU backend transposes both
    operands of the gradient first, a sixth of a training step. Where time is sharded, batch and
    time do not merge into one axis.
    """
    if any(jax.typeof(x).sharding.spec[1:-1]):
        return save_for_backward(_mapped(x, weight))
    return save_for_backward(_mapped(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], -1))


def _mapped(x: Float[Array, "*m i"], weight: Float[Array, "i o"] | Adapted) -> Float[Array, "*m o"]:
    """`x @ weight`, and what a change adds."""
    if not isinstance(weight, Adapted):
        return _product(x, weight.astype(x.dtype))
    change = weight.change
    hidden = save_for_backward(_product(x, change.down.astype(x.dtype)))
    return _mapped(x, weight.weight) + _product(hidden * change.scale, change.up.astype(x.dtype))


def _product(x: Float[Array, "*m i"], weight: Float[Array, "i o"]) -> Float[Array, "*m o"]:
    """`x @ weight`. If the mesh shards the summed axis of both, each device has a partial sum, and
    `out_sharding` adds them up."""
    *m, i = jax.typeof(x).sharding.spec
    summed, o = jax.typeof(weight).sharding.spec
    out = PartitionSpec(*m, o) if i and i == summed else None
    return lax.dot_general(x, weight, (((x.ndim - 1,), (0,)), ((), ())), out_sharding=out)


@jax.checkpoint
def squared_relu_linear(
    x: Float[Array, "*shape f"], weight: Float[Array, "f o"] | Adapted
) -> Float[Array, "*shape o"]:
    """`relu(x)^2 @ weight`, saving only `x` for the gradient: the widest array of a layer once, not
    three times."""
    return linear(jnp.square(jax.nn.relu(x)), weight)


def lora(
    x: Float[Array, "*shape i"],
    down: Float[Array, "i rank"],
    up: Float[Array, "rank o"],
    activation: Callable[[Array], Array] = lambda hidden: hidden,
) -> Float[Array, "*shape o"]:
    """A low-rank map, `activation(x @ down) @ up`."""
    return linear(activation(linear(x, down)), up)


def layer_norm(x: Float[Array, "*shape c"], norm: Norm[Array]) -> Float[Array, "*shape c"]:
    """Layer norm over the last axis, epsilon 1e-5, in float32 or more."""
    wide = precise(x)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    y = centred * lax.rsqrt(variance + LAYER_NORM_EPS)
    return (y * expand(norm.weight, y) + expand(norm.bias, y)).astype(x.dtype)


def group_norm(
    x: Float[Array, "*shape h n"], norm: Norm[Array], eps: float = GROUP_NORM_EPS
) -> Float[Array, "*shape h*n"]:
    """Normalises each head in float32 or more, then joins the heads; `norm` spans all channels."""
    wide = precise(x)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    y = join_heads(centred * lax.rsqrt(variance + eps))
    return (y * expand(norm.weight, y) + expand(norm.bias, y)).astype(x.dtype)


def split_heads(x: Float[Array, "*shape c"], head_size: int) -> Float[Array, "*shape h n"]:
    """[..., c] -> [..., c // head_size, head_size]."""
    return x.reshape(*x.shape[:-1], -1, head_size)


def join_heads(x: Float[Array, "*shape h n"]) -> Float[Array, "*shape c"]:
    """[..., h, n] -> [..., h * n]."""
    return x.reshape(*x.shape[:-2], -1)


def token_shift(
    x: Float[Array, "b t c"],
    last: Float[Array, "b c"],
    reset: Bool[Array, "b t"] | None = None,
    lengths: Int[Array, " b"] | None = None,
    mesh_axis: str | None = None,
) -> tuple[Float[Array, "b t c"], Float[Array, "b c"]]:
    """Every token's predecessor in `x`, and the last token, for the next call.

    `last` (float32) is the predecessor of the first token. Where `reset` is true a document starts:
    that token's predecessor is zero. `lengths` counts the valid tokens of each row, the
    rest is right padding. `mesh_axis` is the explicit or manual mesh axis that shards time: a
    shard's first token gets its predecessor from the device before.
    """
    if mesh_axis and not sharding.is_manual(mesh_axis):
        axes = sharding.axes_of("btc", x) | {"t": mesh_axis}
        shift = partial(token_shift, mesh_axis=mesh_axis)
        run = sharding.mapped(shift, ("btc", "bc", "bt", "b"), ("btc", "bc"), axes)
        return run(x, last, reset, lengths)
    before, after = last.astype(x.dtype), x[:, -1]
    if lengths is not None or mesh_axis:
        after = _last_valid(x, last, lengths, mesh_axis)
    if mesh_axis:
        ring = [(i, i + 1) for i in range(lax.axis_size(mesh_axis) - 1)]
        neighbour = lax.ppermute(x[:, -1], mesh_axis, ring)
        before = jnp.where(lax.axis_index(mesh_axis) == 0, before, neighbour)
    previous = jnp.concatenate([before[:, None], x[:, :-1]], axis=1)
    if reset is not None:
        previous = jnp.where(reset[:, :, None], jnp.zeros((), x.dtype), previous)
    return previous, after.astype(last.dtype)


def _last_valid(
    x: Float[Array, "b t c"],
    last: Float[Array, "b c"],
    lengths: Int[Array, " b"] | None,
    mesh_axis: str | None,
) -> Float[Array, "b c"]:
    """The last valid token of each row, on whichever shard it is; `last` for an empty row."""
    time, devices, mine = x.shape[1], 1, 0
    if mesh_axis:
        devices, mine = lax.axis_size(mesh_axis), lax.axis_index(mesh_axis)
    whole = jnp.full(x.shape[:1], time * devices, jnp.int32)
    count = whole if lengths is None else lengths.astype(jnp.int32)
    place = (count - 1 - mine * time)[:, None]
    found = jnp.take_along_axis(x, jnp.clip(place, 0, time - 1)[:, :, None], axis=1)[:, 0]
    found = jnp.where((place >= 0) & (place < time), found, jnp.zeros_like(found))
    if mesh_axis:
        found = lax.psum(found, mesh_axis)
    return jnp.where(count[:, None] > 0, found, last.astype(x.dtype))
