"""Names of tensors: what trainers put around the official ones, and the signs of other files.

Official names begin with `emb`, `blocks`, `ln_out` or `head`, Hugging Face's within the model with
one of a few more. Everything before that is the path of the model in somebody's program
(`model.`, `rwkv7.`, `student.net.`), and some parts are no name at all but a wrapper, anywhere in
it. What is left is the name here called plain.

Files in almost official names are made official by `as_official`:

- the first converter of transformers' RWKV-7 calls the embedding `embeddings`, and may have
  normalised it by LN0, whose tensors are then left out (`ModelConfig.ln0`);
- web-rwkv's converter (cryscan/web-rwkv, convert_safetensors.py and the converter in Rust) calls
  `time_faaaa` `time_first` and `time_maa` `time_mix`, and transposes the low-rank matrices.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

from rwkv_jax.checkpoint.errors import ZERO, WeightsError, shown
from rwkv_jax.checkpoint.files import ArrayLike

Tensor = TypeVar("Tensor", bound=ArrayLike)

_WRAPPERS = {
    "module",  # DataParallel, DeepSpeed
    "_forward_module",  # Lightning
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}

_STARTS = {"emb", "blocks", "ln_out", "head"} | {
    *("embeddings", "embed_tokens", "layers", "pre_ln", "norm", "lm_head")
}
"""First parts of plain names."""

_REFUSED = (
    (
        "peft_type",
        r"lora_(A|B|M|embedding|magnitude)|\.(lora\.[01]|bone|disha|miss|miss_block)$|\.base_layer\.",
        "an adapter, or a model with one that is not merged; merge it into its base model (rwkv-jax"
        " merge MODEL ADAPTER OUT; of a whole model with one, peft's merge_and_unload) and give the"
        " result",
    ),
    (
        "quantization_config",
        r"\.(qweight|qzeros|SCB|absmax|int\d_\w+)\b|weight_(packed|scale|m[xy]|r[xy])\b",
        "a quantised model; take the original in 16 or 32 bits",
    ),
    (
        "attn",
        r"\.attn\.q_proj\.",
        "a hybrid with attention layers; only models with RWKV layers alone can be read",
    ),
)
"""Files that cannot be read: an entry of `config.json`, parts of tensors' names, the remedy."""


def plain_name(name: str) -> str:
    """A tensor's name without wrappers, and without the path of the model."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    start = next((i for i, part in enumerate(parts) if part in _STARTS), 0)
    return ".".join(parts[start:])


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under their plain names, without what trainers keep among them: counters, and
    the states of random generators. Raises WeightsError for two tensors of one name."""
    found: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name, x in tensors.items():
        short = plain_name(name)
        known = short.split(".")[0] in _STARTS
        if not known and (not x.shape or np.dtype(x.dtype).kind in "iub"):
            continue
        if short in found:
            raise WeightsError(
                f"{shown(origin[short])} and {shown(name)} are both {shown(short)}: several models"
                " in one file; save the one you want alone"
            )
        found[short], origin[short] = x, name
    return found


def refuse(tensors: Mapping[str, ArrayLike], config: Mapping[str, Any]) -> None:
    """Raises WeightsError for files that are not a whole model of RWKV layers in floating point;
    `config` is the folder's `config.json`."""
    for key, sign, what in _REFUSED:
        if config.get(key):
            raise WeightsError(f"config.json has {key}: {what}")
        for name in sorted(tensors):
            if re.search(sign, name):
                raise WeightsError(f"{shown(name)}: {what}")
    for name, x in tensors.items():
        if 0 in x.shape and plain_name(name).split(".")[0] in _STARTS:
            raise WeightsError(f"{shown(name)} is empty: {ZERO}")


def is_official(names: Iterable[str]) -> bool:
    """Whether plain names are those of official layers."""
    return any(re.match(r"blocks\.\d+\.(att|ffn)\.", name) for name in names)


def as_official(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors in almost official names, as the module's docstring describes, made official; others
    are as they were. Nothing is copied."""
    first = {name.removeprefix("blocks.0.att.") for name in tensors}  # in the first layer
    renamed = []
    if "embeddings.weight" in tensors:
        renamed.append(("embeddings.weight", "emb.weight"))
    if "time_mix_x" in first:  # version 6
        renamed.append((".time_mix_", ".time_maa_"))
    if {"time_mix_x", "gate.weight"} & first:  # 5.0 has no gate, and a time_first of its own
        renamed.append((".time_first", ".time_faaaa"))
    found = {}
    for name, x in tensors.items():
        for there, here in renamed:
            name = name.replace(there, here)
        found[name] = x
    return _turned(found)


_FACTOR = re.compile(r"blocks\.\d+\.att\.(?:time_maa_w|time_decay_w|[wavg])([12])")


def _turned(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The low-rank matrices as official files have them, [c, rank] and [rank, c] with the width c:
    transposed if the file has them the other way around."""
    emb = tensors.get("emb.weight")
    if emb is None or emb.ndim != 2:
        return tensors
    matrices = [(name, _FACTOR.fullmatch(name)) for name, x in tensors.items() if x.ndim > 1]
    sizes = {}  # of each matrix: the axis that should be the width, and the other one
    for name, match in matrices:
        if match:
            sizes[name] = tensors[name].shape[-2:][:: 1 if match[1] == "1" else -1]
    width = emb.shape[1]
    if not any(other == width != long for long, other in sizes.values()):
        return tensors
    turned = {name for name, (_, other) in sizes.items() if other == width}
    return {name: x.swapaxes(-1, -2) if name in turned else x for name, x in tensors.items()}
