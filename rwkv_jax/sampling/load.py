"""Loads a model to sample from it: straight into the layout of decoding."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rwkv_jax.checkpoint import store, weights
from rwkv_jax.checkpoint.files import ArrayLike, naming
from rwkv_jax.checkpoint.keymaps import config_of, unstacked_from_official
from rwkv_jax.config import ModelConfig
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.models import Model
from rwkv_jax.sampling.decode import decoding_dtype, decoding_layout, stored_type
from rwkv_jax.typing import Array, Callable

Tensors = Mapping[str, ArrayLike]


def load_to_decode(
    path: Path | str,
    tokenizer: str = "",
    *,
    dtype: Any = None,
    check: Callable[[ModelConfig], None] = lambda cfg: None,
    change: Callable[[Tensors, ModelConfig], Tensors] | None = None,
) -> tuple[Model[Array], ModelConfig, Tokenizer]:
    """`load_with_tokenizer`, with parameters in `decoding_layout` and never held twice (but for
    those of a run). `check` is called before any number is read, and may raise. `change(tensors,
    cfg)` are the tensors to load instead, all in official names."""
    dtype, path = dtype or decoding_dtype(), Path(path).expanduser()
    if (run := store.find_run(path)) and change is None:
        check(store.read_config(run.folder).model)
        params, cfg, found = weights.load_with_tokenizer(path, tokenizer)
        return decoding_layout(params, cfg, dtype), cfg, found
    read, found = weights.read_with_tokenizer(path, tokenizer)
    with naming(path):
        cfg = config_of(read.tensors)
        check(cfg)
        dtype_of = partial(stored_type, dtype=dtype)
        if change is None:
            return *unstacked_from_official(read.tensors, dtype_of), found
    return *unstacked_from_official(change(read.tensors, cfg), dtype_of), found
