"""What all versions share: embedding, ln0, a stack of blocks, ln_out, head.

The blocks come in two layouts and `forward` takes both. Stacked: every leaf has a leading layer
axis and `lax.scan` runs over it, so the program does not grow with depth; this is how parameters
are made, trained and saved. Unstacked: a tuple of per-layer trees under a Python loop, which spares
the copy of each layer's slice; decoding on CPU is over twice as fast for it.
"""

from dataclasses import replace
from functools import cache, partial
from operator import itemgetter
from types import ModuleType
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from rwkv_jax import nn, sharding
from rwkv_jax import params as tables
from rwkv_jax.config import ModelConfig
from rwkv_jax.models import rwkv4, rwkv5, rwkv6, rwkv7, rwkv7a
from rwkv_jax.models.state import State
from rwkv_jax.nn import Norm
from rwkv_jax.params import Layers, ParamSpec, orthogonal, uniform
from rwkv_jax.remat import Remat, rematerialise
from rwkv_jax.typing import Array, Bool, Callable, Float, Int, Leaf, PRNGKeyArray
from rwkv_jax.wkv.sharded import check_axis, over_mesh

VERSIONS: dict[str, ModuleType] = {
    "4": rwkv4,
    "5.0": rwkv5,
    "5.1": rwkv5,
    "5.2": rwkv5,
    "6": rwkv6,
    "7": rwkv7,
    "7a": rwkv7a,
}
"""The version table: each module has `specs`, `init_state`, `init_carry` and `block`; one with
tables by token has `look_up` and `gather` too."""


Tree = TypeVar("Tree", "Model", "State")


@struct.dataclass
class Model(Generic[Leaf]):
    """A whole model's parameters (or specs, or shapes); `blocks` is stacked, or a tuple of
    layers."""

    emb: Leaf
    ln0: Norm[Leaf]
    blocks: Any
    ln_out: Norm[Leaf]
    head: Leaf


@cache
def specs(cfg: ModelConfig) -> Model[ParamSpec]:
    """The table of every parameter of `cfg`'s model; one object for one `cfg`, so that what is
    compiled for it is compiled once.

    Embeddings start in [-1e-4, 1e-4], whatever the version: the official trainers of version 4 take
    their learning rate there, a few times more, which `ln0` undoes.

    Raises `ValueError` if `cfg.vocab_size` is still open (0).
    """
    c, vocab = cfg.width, cfg.vocab_size
    if vocab < 1:
        raise ValueError("cfg.vocab_size is 0: set it to the tokenizer's vocabulary size")

    with jax.ensure_compile_time_eval():  # kept beyond the trace that may ask first
        blocks = VERSIONS[cfg.version].specs(cfg)

    whole = Layers(0)  # of the model, not of its layers
    head_gain = 0.5 * max(vocab / c, 1.0) ** 0.5
    return Model(
        emb=ParamSpec((vocab, c), uniform(1e-4), 0, (None, "channels"), decay=True, layout="table"),
        ln0=whole.norm(c),
        blocks=blocks,
        ln_out=whole.norm(c),
        head=whole.matrix((c, vocab), ("embed", "vocab"), orthogonal(head_gain)),
    )


def init_params(cfg: ModelConfig, key: PRNGKeyArray) -> Model[Array]:
    """Fresh float32 parameters, initialised as the official trainer does."""
    return tables.init(specs(cfg), key)


def abstract_params(cfg: ModelConfig) -> Model[jax.ShapeDtypeStruct]:
    """The parameters' shapes and dtypes, without making them."""
    return tables.abstract(specs(cfg))


def init_state(cfg: ModelConfig, batch: int, params: Model[Array] | None = None) -> State:
    """The state before the first token of a document, float32, stacked over layers.

    Raises `ValueError` for a state-tuned model without its `params`: there this state is learnt.
    """
    block = VERSIONS[cfg.version].init_state(cfg, batch)
    blocks = jax.tree.map(lambda x: jnp.broadcast_to(x, (cfg.layers, *x.shape)), block)
    if cfg.state_tuned:
        if params is None:
            raise ValueError("a state-tuned model starts from a learnt state: give its params too")
        tuned = params if not isinstance(params.blocks, tuple) else stack(params)
        wkv = tuned.blocks.att.time_state.astype(jnp.float32)[:, None]
        blocks = replace(blocks, wkv=jnp.broadcast_to(wkv, blocks.wkv.shape))
    return State(blocks, cfg.version)


def check_state(state: State, cfg: ModelConfig, batch: int) -> None:
    """Raises `ValueError` unless `state` is one of `cfg`'s model, for `batch` rows."""
    if state.version != cfg.version:
        raise ValueError(f"the state is of version {state.version}, the model of {cfg.version}")
    layer = jax.eval_shape(lambda: VERSIONS[cfg.version].init_state(cfg, batch))
    shapes = [x.shape for x in jax.tree.leaves(layer)]
    unstacked = isinstance(state.blocks, tuple)
    expected = shapes * cfg.layers if unstacked else [(cfg.layers, *shape) for shape in shapes]
    found = [x.shape for x in jax.tree.leaves(state.blocks)]
    if found != expected:
        pairs = zip(found, expected, strict=False)
        odd = next(((x, y) for x, y in pairs if x != y), (found[-1], "no such part"))
        raise ValueError(
            f"the state does not fit {batch} rows of a model of {cfg.layers} layers and width"
            f" {cfg.width}: a part is {odd[0]}, not {odd[1]}"
        )


def unstack(tree: Tree) -> Tree:
    """The same parameters or state with `blocks` as a tuple of layers (decoding's layout)."""
    layers = jax.tree.leaves(tree.blocks)[0].shape[0]
    blocks = tuple(jax.tree.map(itemgetter(i), tree.blocks) for i in range(layers))
    return replace(tree, blocks=blocks)


def stack(tree: Tree) -> Tree:
    """The inverse of `unstack`."""
    return replace(tree, blocks=jax.tree.map(lambda *xs: jnp.stack(xs), *tree.blocks))


def backbone(
    params: Model[Array],
    tokens: Int[Array, "b t"],
    state: State | None = None,
    *,
    cfg: ModelConfig,
    reset: Bool[Array, "b t"] | None = None,
    lengths: Int[Array, " b"] | None = None,
    mesh_axis: str | None = None,
    dtype: Any = jnp.float32,
    remat: Remat = "none",
    implementation: str | None = None,
) -> tuple[Float[Array, "b t c"], State]:
    """Hidden vectors after `ln_out` [b, t, c] in `dtype`, and the state after the last token.

    Ids of `tokens` that the vocabulary doesn't have are not noticed: as JAX indexes arrays, a
    negative one counts from the end, and one too large is read as the last.

    `state` None starts a document; one of another model is a `ValueError`. `reset[b, t]` starts one
    before token t. The first `lengths[b]` tokens of a row are real: the state is that after the
    last of them, and what comes out for the others has no meaning. `mesh_axis` spreads time over
    the devices of that axis of the mesh in context (`jax.set_mesh`); states and parameters are
    whole on each of them. `dtype` is the compute type; states, decays, norms and the WKV
    accumulation are float32 whatever it is. `remat` says what the backward pass keeps
    (`rwkv_jax.remat`). `implementation` names a WKV form (`rwkv_jax.wkv`).
    """
    _check_tokens(tokens)
    if mesh_axis and sharding.is_automatic(mesh_axis):
        run = partial(backbone, cfg=cfg, dtype=dtype, remat=remat, implementation=implementation)
        return _over_mesh(run, mesh_axis, params, tokens, state, reset, lengths)
    if mesh_axis and not sharding.is_manual(mesh_axis):
        check_axis("forward", mesh_axis, tokens.shape[1])
        parted = partial(sharding.shard_time, axis=mesh_axis)
        tokens, reset = jax.tree.map(parted, (tokens, reset))
    module = VERSIONS[cfg.version]
    unstacked = isinstance(params.blocks, tuple)
    if state is None:
        fresh: State = jax.tree.map(
            partial(sharding.shard_rows_like, tokens), init_state(cfg, tokens.shape[0], params)
        )
        state = unstack(fresh) if unstacked else fresh
    check_state(state, cfg, tokens.shape[0])
    blocks = params.blocks
    if look_up := getattr(module, "look_up", None):
        blocks = look_up(blocks, tokens)
    gather = getattr(module, "gather", sharding.gather)
    block = partial(
        module.block,
        reset=reset,
        lengths=lengths,
        mesh_axis=mesh_axis,
        implementation=implementation,
    )
    with jax.named_scope("embed"):
        x = nn.layer_norm(nn.embed(params.emb, tokens, dtype), params.ln0)

    def layer(stream, inputs):
        block_params, block_state, first = inputs
        block_params = gather(block_params, dtype)
        *stream, block_state = block(block_params, *stream, block_state, first=first)
        return tuple(stream), block_state

    layer = rematerialise(layer, remat, prevent_cse=unstacked)
    stream = (x, module.init_carry(x))
    if sharding.is_explicit():
        # A loop's carry keeps its type: what goes in is parted as what a layer gives back.
        one = blocks[0] if unstacked else jax.tree.map(itemgetter(0), blocks)
        of_one = state.blocks[0] if unstacked else jax.tree.map(itemgetter(0), state.blocks)
        given_back, _ = jax.eval_shape(layer, stream, (one, of_one, True))
        stream = jax.tree.map(sharding.reshard_like, stream, given_back)
    if unstacked:
        states = []
        for i, inputs in enumerate(zip(blocks, state.blocks, strict=True)):
            stream, block_state = layer(stream, (*inputs, i == 0))
            states.append(block_state)
        after = tuple(states)
    else:
        first = jnp.arange(cfg.layers) == 0
        stream, after = lax.scan(layer, stream, (blocks, state.blocks, first))
    return nn.layer_norm(stream[0], params.ln_out), State(after, cfg.version)


def _check_tokens(tokens: Array) -> None:
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens have shape {tokens.shape}: [b, t] is needed, both at least 1")


def _over_mesh(
    run: Callable[..., tuple[Array, State]],
    mesh_axis: str,
    params: Model[Array],
    tokens: Array,
    state: State | None,
    reset: Array | None,
    lengths: Array | None,
) -> tuple[Array, State]:
    """`backbone` or `forward` on every device, of its part of the tokens."""
    split = {"tokens": tokens, "reset": reset}
    whole = {"params": params, "state": state, "lengths": lengths}
    return over_mesh("forward", mesh_axis, partial(run, mesh_axis=mesh_axis), split, whole)


def head(params: Model[Array], hidden: Float[Array, "*shape c"]) -> Float[Array, "*shape V"]:
    """Float32 logits of `hidden`."""
    with jax.named_scope("head"):
        return nn.linear(hidden, sharding.gather(params.head)).astype(jnp.float32)


def forward(
    params: Model[Array],
    tokens: Int[Array, "b t"],
    state: State | None = None,
    *,
    cfg: ModelConfig,
    reset: Bool[Array, "b t"] | None = None,
    lengths: Int[Array, " b"] | None = None,
    mesh_axis: str | None = None,
    dtype: Any = jnp.float32,
    remat: Remat = "none",
    implementation: str | None = None,
) -> tuple[Float[Array, "b t V"], State]:
    """Float32 logits [b, t, V] of the next token at every position, and the state after the last.

    One code path for training, prefill and one token; the arguments are `backbone`'s.
    """
    _check_tokens(tokens)
    if mesh_axis and sharding.is_automatic(mesh_axis):
        run = partial(forward, cfg=cfg, dtype=dtype, remat=remat, implementation=implementation)
        return _over_mesh(run, mesh_axis, params, tokens, state, reset, lengths)
    hidden, state = backbone(
        params,
        tokens,
        state,
        cfg=cfg,
        reset=reset,
        lengths=lengths,
        mesh_axis=mesh_axis,
        dtype=dtype,
        remat=remat,
        implementation=implementation,
    )
    return head(params, hidden), state
