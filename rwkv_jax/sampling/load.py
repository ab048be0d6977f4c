"""Loads a model to sample from it: straight into the layout of decoding."""

from functools import partial
from pathlib import Path
from typing import Any

from rwkv_jax.checkpoint import store, weights
from rwkv_jax.checkpoint.files import naming
from rwkv_jax.checkpoint.keymaps import config_of, unstacked_from_official
from rwkv_jax.config import ModelConfig
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.models import Model
from rwkv_jax.sampling.decode import decoding_dtype, decoding_layout, stored_type
from rwkv_jax.typing import Array, Callable


def load_to_decode(
    path: Path | str,
    tokenizer: str = "",
    *,
    dtype: Any = None,
    check: Callable[[ModelConfig], None] = lambda cfg: None,
) -> tuple[Model[Array], ModelConfig, Tokenizer]:
    """`load_with_tokenizer`, with parameters in `decoding_layout` and never held twice (but for
    those of a run). `check` is called before any number is read, and may raise."""
    dtype, path = dtype or decoding_dtype(), Path(path).expanduser()
    if run := store.find_run(path):
        check(store.read_config(run.folder).model)
        params, cfg, found = weights.load_with_tokenizer(path, tokenizer)
        return decoding_layout(params, cfg, dtype), cfg, found
    read, found = weights.read_with_tokenizer(path, tokenizer)
    with naming(path):
        check(config_of(read.tensors))
        dtype_of = partial(stored_type, dtype=dtype)
        return *unstacked_from_official(read.tensors, dtype_of), found
