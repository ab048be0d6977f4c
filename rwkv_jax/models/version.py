"""What a version of RWKV is to the rest of the package, and the layer that all versions share.

RWKV looks at other tokens in two places only, the token shift and the WKV. `backbone` binds these
two functions once, to the documents, lengths and mesh axis at hand, and hands them in, so that the
mixes of a version read as its paper does.
"""

from typing import Any, Generic, NamedTuple

import jax
import numpy as np

from rwkv_jax import nn, sharding
from rwkv_jax.config import ModelConfig
from rwkv_jax.containers import container
from rwkv_jax.models.state import BlockState
from rwkv_jax.nn import Norm
from rwkv_jax.params import ParamSpec, path_name
from rwkv_jax.typing import Array, Callable, Float, Leaf, PyTree


@container
class Block(Generic[Leaf]):
    """One layer's parameters; `att` and `ffn` are the version's `TimeMix` and `ChannelMix`."""

    ln1: Norm[Leaf]
    att: Any
    ln2: Norm[Leaf]
    ffn: Any


class Version(NamedTuple):
    """A version: its parameters and functions, and the facts that others need to know.

    specs             cfg -> the table of one layer's parameters, stacked over layers
    init_state        (cfg, batch) -> a fresh state of one layer
    time_mix          (params, x, carry, last, state, *, shift, wkv) -> (out, carry, last, state)
    channel_mix       (params, x, carry, last, *, shift) -> (out, last)
    wkv               the recurrence, with the keywords and results of those of `rwkv_jax.wkv`
    init_carry        x, the embedded tokens -> the carry before the first layer
    look_up           (blocks, tokens) -> blocks, with the tokens' rows for tables indexed by token
    gather            (block, dtype) -> one layer's parameters, gathered for use
    recall            a WKV state -> the part of it whose RMS a run reports
    recurrence_flops  FLOPs of the recurrence per token, channel, and channel of its head
    decay_name        the official time-mix parameter of the decay that does not depend on tokens
    decay             that parameter's values -> factors per token
    warmup_start      fraction of the peak learning rate where the official warm-up starts
    pypi_transposed   whether PyPI `rwkv` has the matrices of the state as [h, k, v]
    chat_template     the template (`rwkv_jax.data.conversations`) that chat models likely have
    """

    specs: Callable[[ModelConfig], Block[ParamSpec]]
    init_state: Callable[[ModelConfig, int], BlockState[Array]]
    time_mix: Callable[..., tuple]
    channel_mix: Callable[..., tuple]
    wkv: Callable[..., tuple]
    init_carry: Callable[[Array], Any] = lambda x: None
    look_up: Callable[[PyTree, Array], PyTree] = lambda blocks, tokens: blocks
    gather: Callable[[PyTree, Any], PyTree] = sharding.gather
    recall: Callable[[Any], Array] = lambda wkv: wkv
    recurrence_flops: int = 4
    decay_name: str = "time_decay"
    decay: Callable[[np.ndarray], np.ndarray] = lambda raw: np.exp(-np.exp(raw))
    warmup_start: float = 0.01
    pypi_transposed: bool = False
    chat_template: str = "world"


def block(
    version: Version,
    params: Block[Array],
    x: Float[Array, "b t c"],
    carry: Any,
    state: BlockState[Array],
    shift: Callable[..., tuple],
    wkv: Callable[..., tuple],
) -> tuple[Float[Array, "b t c"], Any, BlockState[Array]]:
    """One layer of any version: `x` after both residual branches, the carry, and the new state.

    `shift(x, last)` is the token shift and `wkv` the version's recurrence; documents, lengths and
    mesh axis are already bound to both.
    """
    with jax.named_scope("time_mix"):
        h = nn.layer_norm(x, params.ln1)
        out, carry, att_x, memory = version.time_mix(
            params.att, h, carry, state.att_x, state.wkv, shift=shift, wkv=wkv
        )
        _check("the result of time_mix", out, x)
        x = x + out
    with jax.named_scope("channel_mix"):
        h = nn.layer_norm(x, params.ln2)
        out, ffn_x = version.channel_mix(params.ffn, h, carry, state.ffn_x, shift=shift)
        _check("the result of channel_mix", out, x)
    after = BlockState(att_x=att_x, wkv=memory, ffn_x=ffn_x)
    _check("the state after a layer", after, state)
    return x + out, carry, after


def _check(what: str, found: PyTree, wanted: PyTree) -> None:
    """Raises `ValueError` where the results of a version's functions would broadcast, or be cast,
    to what they should be."""
    found, wanted = (
        [f"{path_name(path)} {x.dtype}{list(x.shape)}".lstrip() for path, x in leaves]
        for leaves in map(jax.tree.leaves_with_path, (found, wanted))
    )
    if found != wanted:
        raise ValueError(f"{what} is {', '.join(found)}, but must be {', '.join(wanted)}")
