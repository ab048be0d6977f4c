"""The few layers every RWKV version is made of, as pure functions over arrays.

Parameters are float32; each function casts them to the dtype of its input, which is the compute
dtype. Normalisations compute in float32 whatever the input is.
"""

from functools import partial
from typing import Any, Generic

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec

from rwkv_jax import sharding
from rwkv_jax.remat import save_for_backward
from rwkv_jax.typing import Array, Bool, Callable, Float, Int, Leaf

LAYER_NORM_EPS = 1e-5
"""Of every layer norm of every version (official `nn.LayerNorm` default)."""


@struct.dataclass
class Norm(Generic[Leaf]):
    """The affine part of a normalisation: two vectors."""

    weight: Leaf
    bias: Leaf


def expand(vector: Float[Array, " c"], x: Float[Array, "*shape c"]) -> Float[Array, "*ones c"]:
    """A parameter vector shaped and cast to act on the last axis of `x`."""
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + vector.shape)


def embed(
    table: Float[Array, "*layers V c"], tokens: Int[Array, "b t"], dtype: Any = None
) -> Float[Array, "*layers b t c"]:
    """The table's rows of these tokens, parted as they are, in `dtype` (None: the table's)."""
    dtype = dtype or table.dtype

    def look_up(table: Array, tokens: Array) -> Array:
        return table[..., tokens, :].astype(dtype)

    if not sharding.is_explicit():
        return look_up(table, tokens)
    parted = jax.typeof(tokens).sharding.spec
    layers = [None] * (table.ndim - 2)
    found = PartitionSpec(*layers, *parted, None)
    columns = sharding.names_of(jax.typeof(table).sharding.spec[-1])
    fsdp = sharding.FSDP
    if not columns or (fsdp in columns and fsdp not in sharding.names_of(parted[0])):
        whole = jax.reshard(table, PartitionSpec())
        return sharding.over_devices(look_up, (PartitionSpec(), parted), found, whole, tokens)

    def exchange(table: Array, tokens: Array) -> Array:
        # A device has its columns of every row. What travels is as long as the batch, not as the
        # vocabulary.
        if fsdp in columns:
            # It looks them up for all that have other rows, and each takes those of its tokens.
            mine = look_up(table, lax.all_gather(tokens, fsdp, axis=0, tiled=True))
            mine = lax.all_to_all(mine, fsdp, table.ndim - 2, table.ndim, tiled=True)
        else:
            mine = look_up(table, tokens)
        others = tuple(name for name in columns if name != fsdp)
        return lax.all_gather(mine, others, axis=table.ndim, tiled=True) if others else mine

    parts = (PartitionSpec(*layers, None, columns), parted)
    return sharding.over_devices(exchange, parts, found, table, tokens)


@struct.dataclass
class Transposed(Generic[Leaf]):
    """A matrix kept [out, in], as decoding on CPU wants it (`linear` takes it for [in, out])."""

    rows: Leaf

    @property
    def dtype(self) -> jnp.dtype:
        """Of the matrix."""
        return jnp.result_type(self.rows)


def linear(
    x: Float[Array, "*shape i"], weight: Float[Array, "i o"] | Transposed[Array]
) -> Float[Array, "*shape o"]:
    """`x @ weight`; weights are stored [in, out].

    As one matrix product over all tokens: of a product with several token axes XLA's CPU backend
    makes a gradient that transposes both operands first, a sixth of a training step. One token is a
    product of the matrix's rows with a vector, which takes a tenth less time than one of a vector
    with its columns. Rows whose time is parted are no single axis.
    """
    if isinstance(weight, Transposed):
        tokens, matrix = x.reshape(-1, x.shape[-1]), weight.rows.astype(x.dtype)
        y = (matrix @ tokens[0])[None] if len(tokens) == 1 else tokens @ matrix.T
        return save_for_backward(y.reshape(*x.shape[:-1], -1))
    weight = weight.astype(x.dtype)
    if any(jax.typeof(x).sharding.spec[1:-1]):
        return save_for_backward(_product(x, weight))
    return save_for_backward(
        _product(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], -1)
    )


def _product(x: Float[Array, "*m i"], weight: Float[Array, "i o"]) -> Float[Array, "*m o"]:
    """`x @ weight`. Where the types of both say that "i" is parted, each device has a part of the
    sum: what is said of the result adds them up."""
    *m, i = jax.typeof(x).sharding.spec
    also, o = jax.typeof(weight).sharding.spec
    parted = PartitionSpec(*m, o) if i and i == also else None
    return lax.dot_general(x, weight, (((x.ndim - 1,), (0,)), ((), ())), out_sharding=parted)


@jax.checkpoint
def squared_relu_linear(
    x: Float[Array, "*shape f"], weight: Float[Array, "f o"] | Transposed[Array]
) -> Float[Array, "*shape o"]:
    """`relu(x)^2 @ weight`, keeping only `x` for the gradient: the widest array of a layer, once
    not thrice."""
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
    """Layer norm over the last axis, epsilon 1e-5, in float32."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    y = centred * lax.rsqrt(variance + LAYER_NORM_EPS)
    return (y * expand(norm.weight, y) + expand(norm.bias, y)).astype(x.dtype)


def group_norm(
    x: Float[Array, "*shape h n"], norm: Norm[Array], eps: float
) -> Float[Array, "*shape h*n"]:
    """Normalise every head on its own in float32, then join the heads; `norm` spans all
    channels."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
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
    """The previous token's `x` for every token, and the `last` to hand on.

    `last` (float32) is what the token before the first one left; a token at which `reset` holds
    starts a document, so its previous token is zero. Of each row the first `lengths` tokens are
    real. Time is parted over `mesh_axis`, an explicit one, or one that the caller maps over: the
    neighbour of a part's first token comes from the device before it.
    """
    if mesh_axis and not sharding.is_manual(mesh_axis):
        b, t, c = jax.typeof(x).sharding.spec
        of_tokens, of_rows = PartitionSpec(b, t, c), PartitionSpec(b, c)
        return sharding.over_devices(
            partial(token_shift, mesh_axis=mesh_axis),
            (of_tokens, of_rows, PartitionSpec(b, t), PartitionSpec(b)),
            (of_tokens, of_rows),
            *(x, last, reset, lengths),
        )
    before, after = last.astype(x.dtype), x[:, -1]
    if lengths is not None or mesh_axis:
        after = _last_real(x, last, lengths, mesh_axis)
    if mesh_axis:
        ring = [(i, i + 1) for i in range(lax.axis_size(mesh_axis) - 1)]
        neighbour = lax.ppermute(x[:, -1], mesh_axis, ring)
        before = jnp.where(lax.axis_index(mesh_axis) == 0, before, neighbour)
    previous = jnp.concatenate([before[:, None], x[:, :-1]], axis=1)
    if reset is not None:
        previous = jnp.where(reset[:, :, None], jnp.zeros((), x.dtype), previous)
    return previous, after.astype(last.dtype)


def _last_real(
    x: Float[Array, "b t c"],
    last: Float[Array, "b c"],
    lengths: Int[Array, " b"] | None,
    mesh_axis: str | None,
) -> Float[Array, "b c"]:
    """The last real token of each row, of all devices' parts; `last` for a row of none."""
    time, devices, mine = x.shape[1], 1, 0
    if mesh_axis:
        devices, mine = lax.axis_size(mesh_axis), lax.axis_index(mesh_axis)
    count = jnp.full(x.shape[:1], time * devices) if lengths is None else lengths
    place = (count - 1 - mine * time)[:, None]
    found = jnp.take_along_axis(x, jnp.clip(place, 0, time - 1)[:, :, None], axis=1)[:, 0]
    found = jnp.where((place >= 0) & (place < time), found, jnp.zeros_like(found))
    if mesh_axis:
        found = lax.psum(found, mesh_axis)
    return jnp.where(count[:, None] > 0, found, last.astype(x.dtype))
