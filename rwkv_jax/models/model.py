"""What all versions share: embedding, ln0, a stack of blocks, ln_out, head.

The blocks come in two layouts, and every function takes both. Stacked: each leaf has a leading
layer axis and `lax.scan` runs over it, so that the program does not grow with depth; parameters are
made, trained and saved so. Unstacked: a tuple of layers and a Python loop. No layer's slice is
copied, so that decoding on a CPU is more than twice as fast.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from operator import itemgetter
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from rwkv_jax import nn, sharding
from rwkv_jax import params as tables
from rwkv_jax.config import ModelConfig
from rwkv_jax.containers import container
from rwkv_jax.loss import token_nats
from rwkv_jax.models import checks, rwkv4, rwkv5, rwkv6, rwkv7, rwkv7a
from rwkv_jax.models.state import State
from rwkv_jax.models.version import Version, block
from rwkv_jax.nn import Norm
from rwkv_jax.params import Layers, ParamSpec, orthogonal, uniform
from rwkv_jax.remat import Remat, rematerialise
from rwkv_jax.sharding import is_manual
from rwkv_jax.typing import Array, Bool, Callable, Float, Int, Leaf, PRNGKeyArray, PyTree

VERSIONS: dict[str, Version] = {
    "4": rwkv4.VERSION,
    "5.0": rwkv5.VERSION,
    "5.1": rwkv5.VERSION,
    "5.2": rwkv5.VERSION,
    "6": rwkv6.VERSION,
    "7": rwkv7.VERSION,
    "7a": rwkv7a.VERSION,
}


Tree = TypeVar("Tree", "Model", "State")


@container
class Model(Generic[Leaf]):
    """A model's parameters (or specs, or shapes); `blocks` is stacked, or a tuple of layers."""

    emb: Leaf
    ln0: Norm[Leaf] | None  # None where the table holds normalised embeddings
    blocks: Any
    ln_out: Norm[Leaf]
    head: Leaf

    def __repr__(self) -> str:
        leaves = [x for x in jax.tree.leaves(self) if hasattr(x, "shape") and hasattr(x, "dtype")]
        layers = f"{len(self.blocks)} layers" if isinstance(self.blocks, tuple) else "stacked"
        types = ", ".join(sorted({str(x.dtype) for x in leaves}))
        numbers = sum(math.prod(x.shape) for x in leaves)
        return f"Model({layers}, {len(leaves)} arrays, {numbers:,} parameters, {types})"


@cache
def specs(cfg: ModelConfig) -> Model[ParamSpec]:
    """The table of every parameter of `cfg`'s model. Cached: one object for one `cfg`, so that
    programs that depend on it compile once.

    Embeddings start in [-1e-4, 1e-4] in every version. (Official trainers of version 4 use their
    learning rate as the bound, a few times as much; `ln0` undoes the scale.)

    Raises `ValueError` if `cfg.vocab_size` is 0, still to be chosen.
    """
    c, vocab = cfg.width, cfg.vocab_size
    if vocab < 1:
        raise ValueError("cfg.vocab_size is 0: set it to the tokenizer's vocabulary size")

    # The cache outlives the trace and the mesh that ask first; a new thread has neither.
    with ThreadPoolExecutor(1) as thread:
        blocks = thread.submit(VERSIONS[cfg.version].specs, cfg).result()

    once = Layers(0)  # parameters outside of the stack of layers
    head_gain = 0.5 * max(vocab / c, 1.0) ** 0.5
    return Model(
        emb=ParamSpec((vocab, c), uniform(1e-4), 0, (None, "channels"), decay=True, layout="table"),
        ln0=once.norm(c) if cfg.ln0 else None,
        blocks=blocks,
        ln_out=once.norm(c),
        head=once.matrix((c, vocab), ("embed", "vocab"), orthogonal(head_gain)),
    )


def init_params(cfg: ModelConfig, key: PRNGKeyArray) -> Model[Array]:
    """Fresh float32 parameters, initialised as the official trainer does."""
    checks.check_config(cfg)
    return tables.init(specs(cfg), key)


def abstract_params(cfg: ModelConfig) -> Model[jax.ShapeDtypeStruct]:
    """The parameters' shapes and dtypes, without values."""
    return tables.abstract(specs(cfg))


@cache
def _expected(cfg: ModelConfig, unstacked: bool) -> Model[jax.ShapeDtypeStruct]:
    params = abstract_params(cfg)
    return jax.eval_shape(unstack, params) if unstacked else params


def check_params(params: Any, cfg: ModelConfig) -> None:
    """Raises `ValueError` unless these are the parameters of `cfg`'s model, in either layout, with
    or without a learnt state."""
    checks.check_config(cfg)
    params = nn.unadapted(params)
    unstacked = isinstance(getattr(params, "blocks", None), tuple)
    checks.check_params(params, _expected(as_tuned(cfg, params), unstacked), cfg)


def as_tuned(cfg: ModelConfig, params: Any) -> ModelConfig:
    """`cfg`, state-tuned if the parameters hold a learnt state: one can be laid onto those of any
    model whose state is a matrix."""
    held = any(x is not None for x in _learnt_states(params))
    return replace(cfg, state_tuned=True) if held and not cfg.state_tuned else cfg


def _learnt_states(params: Any) -> list[Any]:
    """`time_state` of each layer, or of the stack of them; None where there is none."""
    blocks = getattr(params, "blocks", None)
    layers = blocks if isinstance(blocks, tuple) else (blocks,)
    return [getattr(getattr(x, "att", None), "time_state", None) for x in layers]


def init_state(cfg: ModelConfig, batch: int, params: Model[Array] | None = None) -> State:
    """The state before the first token of a document, float32, stacked over layers.

    Parameters that hold a learnt state (`time_state`) start from it; a model whose `cfg` says that
    it is state-tuned needs them, or a `ValueError` is raised.
    """
    block = VERSIONS[cfg.version].init_state(cfg, batch)
    blocks = jax.tree.map(lambda x: jnp.broadcast_to(x, (cfg.layers, *x.shape)), block)
    learnt = _learnt_states(params)
    if learnt[0] is not None:
        stacked = learnt[0] if learnt[0].ndim == 4 else jnp.stack(learnt)
        wkv = jnp.broadcast_to(nn.precise(stacked)[:, None], blocks.wkv.shape)
        blocks = replace(blocks, wkv=wkv)
    elif cfg.state_tuned:
        raise ValueError("a state-tuned model starts from a learnt state: give its params too")
    return State(blocks, cfg.version)


def check_state(state: Any, cfg: ModelConfig, batch: int) -> None:
    """Raises `ValueError` unless `state` fits `cfg`'s model and `batch` rows."""
    if not isinstance(state, State):
        raise ValueError(
            f"state is {type(state).__name__}, not a State: `init_state` and `forward` return one,"
            " `rwkv_jax.states` converts others"
        )
    if state.version != cfg.version:
        raise ValueError(f"the state is of version {state.version}, the model of {cfg.version}")
    layer = jax.eval_shape(lambda: VERSIONS[cfg.version].init_state(cfg, batch))
    shapes = [x.shape for x in jax.tree.leaves(layer)]
    unstacked = isinstance(state.blocks, tuple)
    expected = shapes * cfg.layers if unstacked else [(cfg.layers, *shape) for shape in shapes]
    leaves = jax.tree.leaves(state.blocks)
    found = [jnp.shape(x) for x in leaves]
    if found != expected:
        pairs = zip(found, expected, strict=False)
        differ = (f"an array is {x}, not {y}" for x, y in pairs if x != y)
        why = next(differ, f"it has {len(found)} arrays, not {len(expected)}")
        raise ValueError(
            f"the state does not fit {batch} rows of a model of {cfg.layers} layers and width"
            f" {cfg.width}: {why}"
        )
    checks.check_floating("the state", leaves)


def unstack(tree: Tree) -> Tree:
    """The same parameters or state, `blocks` as a tuple of layers."""
    if isinstance(tree.blocks, tuple):
        return tree
    layers = jax.tree.leaves(tree.blocks)[0].shape[0]
    blocks = tuple(jax.tree.map(itemgetter(i), tree.blocks) for i in range(layers))
    return replace(tree, blocks=blocks)


def stack(tree: Tree) -> Tree:
    """The inverse of `unstack`."""
    if not isinstance(tree.blocks, tuple):
        return tree
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

    state           after the tokens before; None starts a document
    reset           true at the first token of a document, which starts from a fresh state
    lengths         valid tokens of each row. The rest is right padding: the state is that after the
                    last valid token, outputs of padding are undefined
    mesh_axis       the explicit mesh axis (`jax.set_mesh`) that shards time; state and parameters
                    are replicated over it. Inside a `jax.shard_map` over it, tokens are the shard
    dtype           compute type, float32, bfloat16 or float16. States, decays, norms and the WKV
                    are float32 always; float64 computes everything in float64
    remat           what the backward pass saves (`rwkv_jax.remat`)
    implementation  of the WKV (`rwkv_jax.wkv`); None chooses the fastest

    Jitted, so that calls outside of `jax.jit` compile once for each shape too. Concrete token ids
    are checked. In a traced program, as in all JAX indexing, a negative id counts from the end of
    the vocabulary, and one that is too large reads its last row.

    Raises `ValueError` for arguments that do not belong together, and a `mesh_axis` that does not
    exist, is not explicit or does not divide the tokens.
    """
    dtype, local = checks.compute_dtype(dtype), mesh_axis is not None and is_manual(mesh_axis)
    check_params(params, cfg)
    checks.check_tokens(tokens, reset, lengths, cfg.vocab_size, whole=not local)
    checks.check_mesh(params, tokens, mesh_axis)
    if mesh_axis is not None and not local:
        tokens, reset = jax.tree.map(partial(sharding.shard_time, axis=mesh_axis), (tokens, reset))
    if state is not None:
        check_state(state, cfg, tokens.shape[0])
        if isinstance(state.blocks, tuple) != isinstance(params.blocks, tuple):
            raise ValueError(
                "one of params and state is stacked, the other is not: `stack` or `unstack` one"
            )
    masks = {"reset": reset, "lengths": lengths}
    return _backbone(params, tokens, state, masks, cfg, mesh_axis, dtype, remat, implementation)


@partial(jax.jit, static_argnums=range(4, 9))
def _backbone(
    params: Model[Array],
    tokens: Array,
    state: State | None,
    masks: dict[str, Array | None],
    cfg: ModelConfig,
    mesh_axis: str | None,
    dtype: Any,
    remat: Remat,
    implementation: str | None,
) -> tuple[Float[Array, "b t c"], State]:
    tokens = tokens.astype(jnp.int32)  # ids of any integer type
    if state is None:
        state = init_state(cfg, tokens.shape[0], params)
        state = unstack(state) if isinstance(params.blocks, tuple) else state
    tokens, memory = sharding.shard_rows_alike(tokens, state.blocks)
    memory = jax.tree.map(lambda x: x.astype(nn.precise_dtype(dtype)), memory)
    version = VERSIONS[cfg.version]
    shift = partial(nn.token_shift, **masks, mesh_axis=mesh_axis)
    wkv = partial(version.wkv, **masks, mesh_axis=mesh_axis, implementation=implementation)

    def layer(stream, inputs):
        (x, carry), (block_params, block_state) = stream, inputs
        block_params = version.gather(block_params, dtype)
        x, carry, block_state = block(version, block_params, x, carry, block_state, shift, wkv)
        return (x, carry), block_state

    blocks = version.look_up(params.blocks, tokens)
    with jax.named_scope("embed"):
        x = nn.embed(params.emb, tokens, dtype)
        x = x if params.ln0 is None else nn.layer_norm(x, params.ln0)
    layer = rematerialise(layer, remat, prevent_cse=isinstance(blocks, tuple))
    stream = (x, version.init_carry(x))
    (x, _), after = _over_layers(layer, stream, (blocks, memory))
    return nn.layer_norm(x, params.ln_out), State(after, cfg.version)


def _over_layers(layer: Callable, stream: PyTree, inputs: PyTree) -> tuple[PyTree, PyTree]:
    """`lax.scan(layer, stream, inputs)`; a Python loop where each of `inputs` is a tuple of
    layers."""
    unstacked = isinstance(inputs[0], tuple)
    if sharding.is_explicit():
        # A scan's carry keeps its type, so it enters sharded as a layer returns it.
        first = tuple(x[0] if unstacked else jax.tree.map(itemgetter(0), x) for x in inputs)
        returned, _ = jax.eval_shape(layer, stream, first)
        stream = jax.tree.map(sharding.reshard_like, stream, returned)
    if not unstacked:
        return lax.scan(layer, stream, inputs)
    layer, after = jax.jit(layer), []  # traced and lowered once, not once for each layer
    for one in zip(*inputs, strict=True):
        stream, block_state = layer(stream, one)
        after.append(block_state)
    return stream, tuple(after)


@jax.jit
def head(params: Model[Array], hidden: Float[Array, "*shape c"]) -> Float[Array, "*shape V"]:
    """Logits of `hidden`: float32, or float64 if it is. Raises `ValueError` for another width."""
    if hidden.shape[-1:] != params.head.shape[:1]:
        raise ValueError(
            f"hidden must be [..., {params.head.shape[0]}], the model's width, got {hidden.shape}"
        )
    with jax.named_scope("head"):
        return nn.precise(nn.linear(hidden, sharding.gather(params.head)))


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
    """Logits [b, t, V] of the next token at every position, and the state after the last. Logits
    are float32, or float64 for that `dtype`.

    One code path for training, prefill and single tokens; arguments and errors are `backbone`'s.
    """
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


def log_probs(
    params: Model[Array],
    tokens: Int[Array, "b t"],
    targets: Int[Array, "b t"],
    state: State | None = None,
    *,
    chunk_tokens: int | None = None,
    **options: Any,
) -> Float[Array, "b t"]:
    """log p of each target after the tokens up to its place, in nats.

    Differentiable in reverse mode: what preference losses and distillation are made of. The logits
    of `chunk_tokens` tokens exist at once (None chooses), in the backward pass too. `options` and
    errors are `backbone`'s.
    """
    hidden, _ = backbone(params, tokens, state, **options)
    checks.check_tokens(targets, None, None, params.head.shape[1], whole=True)
    if targets.shape != tokens.shape:
        raise ValueError(
            f"targets must be {list(tokens.shape)} as tokens, got {list(targets.shape)}"
        )
    return -token_nats(hidden, params.head, targets, chunk_tokens=chunk_tokens)


def state_rms(state: State) -> Float[Array, ""]:
    """Root mean square of what the WKV states hold, float32; it grows without bound in a model that
    forgets too little. `state` is stacked."""
    held = VERSIONS[state.version].recall(state.blocks.wkv).astype(jnp.float32)
    return jnp.sqrt(jnp.mean(jnp.square(held)))
