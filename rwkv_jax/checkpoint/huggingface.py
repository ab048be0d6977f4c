"""Maps the tensors of Hugging Face folders to official names and back: renames, transposes,
reshapes.

Nothing is computed and no type changes. A tensor is a view of the one it comes from, so a
memory-mapped file stays on disk; only version 6 of flash-linear-attention stores some in an order
that no view can express, and those are copied when they are used.

The layouts, the code that makes them, and the files that these tables were derived from:

    transformers-rwkv4  RwkvForCausalLM of huggingface/transformers: models/rwkv/modeling_rwkv.py,
                        convert_rwkv_checkpoint_to_hf.py
    remote-rwkv5.0      code inside the folder, of BBuf/RWKV-World-HF-Tokenizer:
    remote-rwkv5        rwkv_world_v5.0_model, rwkv5_model and rwkv6_model, each modeling_rwkv*.py,
    remote-rwkv6        and scripts/convert_rwkv*_checkpoint_to_hf.py
    remote-rwkv7        the same of SmerkyG/RWKV-World-HF-Tokenizer: rwkv7_model
    fla-rwkv6           fla-org/flash-linear-attention: fla/layers/rwkv6.py, fla/models/rwkv6,
                        utils/convert_from_rwkv6.py
    fla-rwkv7           fla/layers/rwkv7.py, fla/models/rwkv7, utils/convert_from_rwkv7.py; the
                        PyPI package rwkv7-hf (0.9.0: modeling_rwkv7.py) has the same names and
                        shapes
    official-rwkv7      Rwkv7ForCausalLM, the layout of the official repositories (2026): official
                        names and shapes, all but the head's behind `rwkv7.`; configuration_rwkv7.py
                        and convert_rwkv7_checkpoint_to_hf.py of its pull request to transformers

Differences that the names do not show:

- transformers divides the output matrices of layer 6 and later by powers of two when it first runs
  a model (`rescale_every`). Files saved before that, and all converted files, hold them undivided.
- FLA packs version 6's five mixes as r, w, k, v, g, official code as w, k, v, r, g. FLA's older
  version 7 packs all six into `x_x`, as r, w, k, v, a, g.
- FLA's version 6 uses 1e-5 for the epsilon of its GroupNorm, official code 64e-5. FLA's converter
  corrects that on the model in memory, and no folder records it. Weights are read as if converted,
  with 64e-5.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rwkv_jax.checkpoint.errors import WeightsError, shown
from rwkv_jax.checkpoint.files import ArrayLike, Deferred
from rwkv_jax.checkpoint.keymaps import TIED, config_of, optional
from rwkv_jax.checkpoint.names import (
    as_official,
    is_official,
    plain,
    plain_name,
    refuse,
)

HEAD_SIZE = 64
"""Version 7 there uses 1e-5 times the head size for the epsilon of its GroupNorm, official code
64e-5: they agree at this head size only."""

Tensor = np.ndarray | Deferred


class Form(NamedTuple):
    """From Hugging Face's shape to the official one, and back."""

    read: Callable[[np.ndarray], Tensor]
    write: Callable[[np.ndarray], np.ndarray] = np.asarray

    def written(self, x: ArrayLike) -> ArrayLike:
        """`write` of an array; deferred if the array is."""
        if isinstance(x, np.ndarray):
            return self.write(x)
        shape = self.write(np.broadcast_to(np.zeros((), x.dtype), x.shape)).shape
        return Deferred(shape, x.dtype, lambda: self.write(np.asarray(x)))


def _row(x: np.ndarray) -> np.ndarray:
    return x.reshape(1, 1, -1)


def _part(index: int) -> Form:
    """One row of a packed matrix."""
    return Form(lambda x: _row(x[index]))


_MIXES = [*map("rwkvg".index, "wkvrg")]
"""The positions in FLA's version 6 of the mixes in official order."""


def _mixes_in(x: np.ndarray) -> Deferred:
    """[5 rank, c] to [c, 5 rank], the mixes in official order."""
    mixes = x.reshape(5, -1, x.shape[1])
    return Deferred(x.shape[::-1], x.dtype, lambda: mixes[_MIXES].reshape(x.shape).T)


def _mixes_out(x: np.ndarray) -> Deferred:
    """[c, 5 rank] to [5, rank, c], the mixes in official order."""
    mixes = x.reshape(len(x), 5, -1).transpose(1, 2, 0)
    return Deferred(mixes.shape, x.dtype, lambda: mixes[_MIXES])


SAME = Form(np.asarray)
ROW = Form(_row, _row)
VECTOR = Form(_row, np.ravel)
TRANSPOSED = Form(np.transpose, np.transpose)
ZEROS = Form(np.zeros_like)


class Source(NamedTuple):
    """An official tensor and one that it can come from; `{}` in a name is the layer."""

    official: str
    there: str
    """Its name in a Hugging Face folder."""
    form: Form = SAME
    when: tuple[str, Any] | None = None
    """The entry of `config.json` that this source requires."""


@dataclass(frozen=True)
class Layout:
    """How a model is stored in a Hugging Face folder."""

    name: str
    mark: str
    """A tensor of its first layer that no later layout in `LAYOUTS` has."""
    sources: Mapping[str, list[Source]]
    """By official name, the preferred one first."""
    expected: Mapping[str, Any]
    """Official constants; a `config.json` with other values describes another model."""


def _layout(
    name: str,
    folder: str,
    mark: str,
    whole: Iterable[Source],
    layer: Iterable[Source],
    **expected: Any,
) -> Layout:
    """A layout from the sources of the whole model and those of every layer, which are named
    without the layer's prefix."""
    sources: dict[str, list[Source]] = {}
    layers = (
        x._replace(official=f"blocks.{{}}.{x.official}", there=f"{folder}.{{}}.{x.there}")
        for x in layer
    )
    for source in (*whole, *layers):
        sources.setdefault(source.official, []).append(source)
    return Layout(name, f"{folder}.0.{mark}", sources, expected)


_PROJECTIONS = ("key", "value", "receptance", "gate")
_EVERY_LAYER = (
    "ln1.weight ln1.bias ln2.weight ln2.bias att.receptance.weight att.key.weight att.value.weight"
    " att.output.weight ffn.key.weight ffn.value.weight"
)
_V4 = (
    "att.time_decay att.time_mix_k att.time_mix_v att.time_mix_r"
    " ffn.time_mix_k ffn.time_mix_r ffn.receptance.weight"
)
_V50 = f"{_V4} att.time_first att.ln_x.weight att.ln_x.bias"
_V5 = f"{_V4} att.time_faaaa att.time_mix_g att.gate.weight att.ln_x.weight att.ln_x.bias"
_V6 = (
    "att.time_maa_x att.time_maa_w att.time_maa_k att.time_maa_v att.time_maa_r att.time_maa_g"
    " att.time_maa_w1 att.time_maa_w2 att.time_decay att.time_decay_w1 att.time_decay_w2"
    " att.time_faaaa att.gate.weight att.ln_x.weight att.ln_x.bias"
    " ffn.time_maa_k ffn.time_maa_r ffn.receptance.weight"
)
_V7 = (
    "att.x_r att.x_w att.x_k att.x_v att.x_a att.x_g att.w0 att.w1 att.w2 att.a0 att.a1 att.a2"
    " att.v0 att.v1 att.v2 att.g1 att.g2 att.k_k att.k_a att.r_k att.ln_x.weight att.ln_x.bias"
    " ffn.x_k"
)


def _renamed(name: str, home: str, mark: str, layer: str, **expected: Any) -> Layout:
    """A layout of transformers or of remote code: official tensors under longer names."""
    longer = {"att": "attention", "ffn": "feed_forward"}
    longer |= {f"time_mix_{x[0]}": f"time_mix_{x}" for x in _PROJECTIONS}
    whole = [
        Source("emb.weight", f"{home}.embeddings.weight"),
        *(
            Source(f"blocks.0.ln0.{x}", f"{home}.{place}pre_ln.{x}")
            for place in ("blocks.0.", "")  # later version 7 code has it beside the layers
            for x in ("weight", "bias")
        ),
        *(Source(f"ln_out.{x}", f"{home}.ln_out.{x}") for x in ("weight", "bias")),
        Source("head.weight", "head.weight"),
        Source("head.weight", f"{home}.embeddings.weight", when=("tie_word_embeddings", True)),
    ]
    rows = [
        Source(x, ".".join(longer.get(part, part) for part in x.split(".")))
        for x in f"{_EVERY_LAYER} {layer}".split()
    ]
    return _layout(name, f"{home}.blocks", mark, whole, rows, layer_norm_epsilon=1e-5, **expected)


def _norm(official: str, there: str) -> list[Source]:
    """A LayerNorm of FLA, whose bias is optional."""
    return [
        Source(f"{official}.weight", f"{there}.weight"),
        Source(f"{official}.bias", f"{there}.bias"),
        Source(f"{official}.bias", f"{there}.weight", ZEROS, when=("norm_bias", False)),
    ]


def _fla(name: str, mark: str, layer: Iterable[Source], **expected: Any) -> Layout:
    """A layout of FLA; `layer` are the sources of its own."""
    whole = [
        Source("emb.weight", "model.embeddings.weight"),
        *_norm("blocks.0.ln0", "model.layers.0.pre_norm"),
        *_norm("ln_out", "model.norm"),
        Source("head.weight", "lm_head.weight"),
        Source("head.weight", "model.embeddings.weight", when=("tie_word_embeddings", True)),
    ]
    every_layer = [
        *_norm("ln1", "attn_norm"),
        *_norm("ln2", "ffn_norm"),
        Source("att.ln_x.weight", "attn.g_norm.weight"),
        Source("att.ln_x.bias", "attn.g_norm.bias"),
        Source("att.output.weight", "attn.o_proj.weight"),
        Source("ffn.value.weight", "ffn.value.weight"),
    ]
    expected |= {"norm_eps": 1e-5, "norm_first": True, "hidden_act": "sqrelu"}
    return _layout(name, "model.layers", mark, whole, [*every_layer, *layer], **expected)


_FLA6_LAYER = [
    *(Source(f"att.{x}.weight", f"attn.{x[0]}_proj.linear.weight") for x in _PROJECTIONS),
    *(Source(f"att.time_maa_{x}", "attn.x_bias", _part(i)) for i, x in enumerate("rwkvg")),
    Source("att.time_maa_x", "attn.x_proj.0.mu", VECTOR),
    Source("att.time_maa_w1", "attn.x_proj.0.linear.weight", Form(_mixes_in)),
    Source("att.time_maa_w2", "attn.x_proj.2.weight", Form(_mixes_out)),
    Source("att.time_decay", "attn.w_proj.linear.lora.2.bias", VECTOR),
    Source("att.time_decay_w1", "attn.w_proj.linear.lora.0.weight", TRANSPOSED),
    Source("att.time_decay_w2", "attn.w_proj.linear.lora.2.weight", TRANSPOSED),
    Source("att.time_faaaa", "attn.bonus"),
    Source("ffn.time_maa_k", "ffn.key.mu", VECTOR),
    Source("ffn.time_maa_r", "ffn.receptance.mu", VECTOR),
    Source("ffn.key.weight", "ffn.key.linear.weight"),
    Source("ffn.receptance.weight", "ffn.receptance.linear.weight"),
]
_FLA7_LAYER = [
    *(Source(f"att.x_{x}", f"attn.x_{x}", ROW) for x in "rwkvag"),
    *(Source(f"att.x_{x}", "attn.x_x", _part(i)) for i, x in enumerate("rwkvag")),
    *(Source(f"att.{x}0", f"attn.{x}_lora.lora.2.bias", VECTOR) for x in "wav"),
    *(Source(f"att.{x}1", f"attn.{x}_lora.lora.0.weight", TRANSPOSED) for x in "wavg"),
    *(Source(f"att.{x}2", f"attn.{x}_lora.lora.2.weight", TRANSPOSED) for x in "wavg"),
    Source("att.k_k", "attn.k_k", VECTOR),
    Source("att.k_a", "attn.k_a", VECTOR),
    Source("att.r_k", "attn.r_k"),
    *(Source(f"att.{x}.weight", f"attn.{x[0]}_proj.weight") for x in _PROJECTIONS if x != "gate"),
    Source("ffn.x_k", "ffn.x_k", VECTOR),
    Source("ffn.key.weight", "ffn.key.weight"),
]

LAYOUTS = {
    layout.name: layout
    for layout in (
        _fla("fla-rwkv7", "attn.r_k", _FLA7_LAYER),
        _fla("fla-rwkv6", "attn.x_bias", _FLA6_LAYER, expand_k=1, expand_v=1),
        _renamed("remote-rwkv7", "model", "attention.r_k", _V7),
        _renamed("remote-rwkv6", "rwkv", "attention.time_maa_x", _V6, head_size_divisor=8),
        _renamed("remote-rwkv5", "rwkv", "attention.gate.weight", _V5, head_size_divisor=8),
        _renamed("remote-rwkv5.0", "rwkv", "attention.ln_x.weight", _V50, head_size_divisor=8),
        _renamed("transformers-rwkv4", "rwkv", "attention.time_first", f"{_V4} att.time_first"),
    )
}
"""By name, in the order in which they are tried."""

OFFICIAL = "official-rwkv7"
"""The layout that has official names, and is therefore none of `LAYOUTS`."""

DEFAULTS = {"4": "transformers-rwkv4", "7": "fla-rwkv7"}
"""The layouts that are written unless another is asked for: public code loads them."""

LOADED_BY = {
    "transformers-rwkv4": ("transformers", "AutoModelForCausalLM"),
    "fla-rwkv7": ("rwkv7_hf", "RWKV7ForCausalLM"),  # and fla.models, with a GPU
}
"""The package and the class that load a written layout by `from_pretrained`."""


def is_huggingface(names: Iterable[str]) -> bool:
    """Whether the names are those of a Hugging Face folder of any model that does not have official
    names."""
    names = {plain_name(name) for name in names}
    starts = ("layers.", "lm_head.", "embeddings.", "embed_tokens.")
    signs = (name.startswith(starts) or ".attention." in name for name in names)
    return not is_official(names) and any(signs)


def layout_of(names: Iterable[str], config: Mapping[str, Any]) -> str:
    """The layout, a key of `LAYOUTS`, of tensors with these names and this `config.json`.

    Raises WeightsError if it is none of them.
    """
    names = {plain_name(name) for name in names}
    for layout in LAYOUTS.values():
        if plain_name(layout.mark) in names:
            return layout.name
    kind = config.get("model_type") or "unknown"
    raise WeightsError(
        f"not a known RWKV layout (config.json: model_type = {shown(kind)});"
        f" give an official .pth, or a folder of {', '.join((*LAYOUTS, OFFICIAL))}"
    )


def to_official(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The same tensors under official names and in official shapes.

    `config` is the folder's `config.json`. Raises WeightsError for a tensor that is missing or not
    of the layout, and for a model that official code would compute differently.
    """
    refuse(tensors, config)
    layout = LAYOUTS[layout_of(tensors, config)]
    _check_config(layout.expected, config)
    given = {plain_name(name): name for name in tensors}  # as errors show them
    tensors = plain(tensors)
    found: dict[str, Tensor] = {}
    used: set[str] = set()
    for official, layer, sources in _places(layout, _layers(tensors, config)):
        there = [
            (source.there.format(layer), source.form)
            for source in sources
            if source.when is None or config.get(source.when[0]) == source.when[1]
        ]
        places = ((plain_name(x), form) for x, form in there)
        name, form = next(((x, form) for x, form in places if x in tensors), (None, SAME))
        if name is None:
            if optional(official):
                continue
            tied = TIED if official == "head.weight" else ""
            raise WeightsError(
                f"{there[0][0]} is missing: not a complete model of layout {layout.name};"
                f" download the folder again{tied}"
            )
        used.add(name)
        try:
            found[official] = form.read(tensors[name])
        except (ValueError, IndexError):
            shape = list(tensors[name].shape)
            raise WeightsError(
                f"{given[name]} has shape {shape}, which layout {layout.name} does not allow;"
                " download the folder again"
            ) from None
    if extra := sorted(given[name] for name in set(tensors) - used):
        raise WeightsError(
            f"{shown(extra[0])} has no place in layout {layout.name}; this release cannot read"
            " such a model"
        )
    _check_head_size(found)
    return found


def with_official_names(
    tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The tensors of a folder whose names are official once they are plain, such as one in the
    layout `official-rwkv7`. Raises WeightsError as `to_official` does for its `config.json`."""
    refuse(tensors, config)
    found = as_official(plain(tensors))
    if config.get("tie_word_embeddings") is True and "emb.weight" in found:
        found.setdefault("head.weight", found["emb.weight"])
    if config.get("model_type") == "rwkv7":
        _check_config({"layer_norm_epsilon": 1e-5, "group_norm_epsilon": 64e-5}, config)
        last = _layers(found, config) - 1
        if not any(name.startswith(f"blocks.{last}.") for name in found):
            raise WeightsError(
                f"blocks.{last} is missing: config.json has {last + 1} layers; download the folder"
                " again"
            )
        fused, norm = config.get("embedding_layer_norm_fused"), "blocks.0.ln0.weight"
        if fused in (True, False) and fused == (norm in found):
            raise WeightsError(
                f"{norm} is {'there' if fused else 'missing'}, but config.json has"
                f" embedding_layer_norm_fused = {str(fused).lower()}; download the folder again"
            )
    return found


def from_official(
    tensors: Mapping[str, ArrayLike], *, layout: str = "", eod: int = 0
) -> tuple[dict[str, ArrayLike], dict[str, Any]]:
    """Tensors and `config.json` of a folder, without any code in it: in `layout`, or by default in
    that of `DEFAULTS`.

    Tensors are views, not always in C order, or deferred where the given ones are. `eod` is the
    end-of-document id. Inverse of `to_official` except that version 7's unused tensors of the first
    layer are left out. Raises WeightsError for another version than the layout's, for head sizes
    that mean something else there, and for a tensor that is missing or has no place there."""
    tensors = plain(tensors)
    version7 = "blocks.0.att.r_k" in tensors
    if not version7 and "blocks.0.att.ln_x.weight" in tensors:
        raise WeightsError(
            "versions 5 and 6 cannot be written as a Hugging Face folder: only code inside the"
            " folder loads 5, and public code for 6 has another epsilon; write a .pth"
        )
    allowed = (DEFAULTS["7"], OFFICIAL) if version7 else (DEFAULTS["4"],)
    chosen = layout or allowed[0]
    if chosen not in allowed:
        raise WeightsError(
            f"layout {shown(chosen)} cannot hold this model; give {' or '.join(allowed)}"
        )
    written, config = (_prefixed if chosen == OFFICIAL else _renamed_back)(tensors, chosen)
    return written, config | {
        "bos_token_id": eod,
        "eos_token_id": eod,
        "pad_token_id": eod,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": np.dtype(tensors["emb.weight"].dtype).name,
    }


def _prefixed(
    tensors: Mapping[str, ArrayLike], layout: str
) -> tuple[dict[str, ArrayLike], dict[str, Any]]:
    """A model of version 7 in the layout `official-rwkv7`."""
    for name in tensors:
        if ".ffn.s_emb" in name:
            raise WeightsError(f"{name} has no place in layout {layout}; write a .pth")
    written: dict[str, ArrayLike] = {
        name if name == "head.weight" else f"rwkv7.{name}": x
        for name, x in tensors.items()
        if not optional(name)
    }
    fla = _shaped(_config7, tensors, layout)
    same = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    return written, {
        "architectures": ["Rwkv7ForCausalLM"],
        "num_attention_heads": fla["num_heads"],
        "head_size": fla["head_dim"],
        "context_length": 4096,  # what their converter writes if the file's name has none
        "max_position_embeddings": 4096,
        "layer_norm_epsilon": 1e-5,
        "group_norm_epsilon": 64e-5,
        "embedding_layer_norm_fused": "blocks.0.ln0.weight" not in tensors,
        **{key: fla[key] for key in same},
        **{key: x for key, x in fla.items() if key.endswith("_low_rank_dim")},
    }


def _renamed_back(
    tensors: Mapping[str, ArrayLike], chosen: str
) -> tuple[dict[str, ArrayLike], dict[str, Any]]:
    """A model in a layout of `LAYOUTS`."""
    _check_head_size(tensors)
    layout, layers = LAYOUTS[chosen], _layers(tensors, {})
    written: dict[str, ArrayLike] = {}
    used: set[str] = set()
    for official, layer, (source, *_) in _places(layout, layers):
        used.add(official)
        if optional(official):
            continue
        if official not in tensors:
            what = "not a complete checkpoint; write it again"
            if ".ln0." in official:  # folded into the embeddings
                what = f"layout {chosen} needs it; write a .pth, or layout {OFFICIAL}"
            raise WeightsError(f"{official} is missing: {what}")
        written[source.there.format(layer)] = source.form.written(tensors[official])
    if extra := sorted(set(tensors) - used):
        raise WeightsError(f"{shown(extra[0])} has no place in layout {layout.name}; write a .pth")
    return written, _shaped(_config4 if chosen == DEFAULTS["4"] else _config7, tensors, chosen)


def _shaped(
    make: Callable[[Mapping[str, ArrayLike], int], dict[str, Any]],
    tensors: Mapping[str, ArrayLike],
    layout: str,
) -> dict[str, Any]:
    """The `config.json` that `make` reads off the tensors' shapes."""
    try:
        return make(tensors, _layers(tensors, {}))
    except (KeyError, ValueError, IndexError):
        raise WeightsError(
            f"tensors of other shapes than those of {layout}; write the checkpoint again"
        ) from None


def generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `generation_config.json` that goes with a `config.json`."""
    return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


def tokenizer_config(kind: str, vocab_size: int) -> dict[str, Any] | None:
    """The `tokenizer_config.json` for a kind of tokenizer; None if no public code reads it.

    `world` needs `rwkv_vocab_v20230424.txt` beside it, for `RWKV7Tokenizer` of rwkv7-hf; `bpe` (a
    run's own) and `file` need their `tokenizer.json`, which transformers reads.
    """
    if kind == "world":
        return {"tokenizer_class": "RWKV7Tokenizer", "model_vocab_size": vocab_size}
    if kind in ("bpe", "file"):
        return {"tokenizer_class": "PreTrainedTokenizerFast"}
    return None


def _layers(names: Iterable[str], config: Mapping[str, Any]) -> int:
    """The most layers that the names or the config mention, so that a missing one is noticed."""
    numbers = (re.search(r"(?:^|\.)(?:blocks|layers)\.(\d{1,6})\.", name) for name in names)
    stated = config.get("num_hidden_layers")
    stated = stated if isinstance(stated, int) else 0
    return max([stated, *(int(number[1]) + 1 for number in numbers if number)])


def _places(layout: Layout, layers: int) -> Iterator[tuple[str, int, list[Source]]]:
    """Every official tensor of a model: its name, layer (0 outside the layers) and sources."""
    for template, sources in layout.sources.items():
        for layer in range(layers if "{}" in template else 1):
            yield template.format(layer), layer, sources


def _check_config(expected: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        if config.get(key) not in (None, value):
            raise WeightsError(
                f"config.json: {key} = {shown(repr(config[key]))}, but RWKV has {value!r}: another"
                " model; only one with the official value can be read"
            )


def describes(config: Mapping[str, Any], tensors: Mapping[str, ArrayLike]) -> bool:
    """Whether a `config.json` may be that of tensors in official names, by its kind and width."""
    width = next((x.shape[-1] for name, x in tensors.items() if plain_name(name) in _EMBEDDINGS), 0)
    ours = "rwkv" in str(config.get("model_type")).lower()
    return ours and config.get("hidden_size") in (None, width)


_EMBEDDINGS = ("emb.weight", "embeddings.weight")


def check_agreement(official: Mapping[str, ArrayLike], config: Mapping[str, Any]) -> None:
    """Raises WeightsError if a `config.json` is that of another model than the tensors', or says of
    a tensor what is not so. One without a `model_type` is not Hugging Face's."""
    kind = config.get("model_type")
    try:
        cfg = config_of(official)
    except WeightsError:  # incomplete, which another error says better
        return
    if not kind:
        return
    another = "config.json: {} = {}, but the tensors are of {}: one of them is of another model;"
    another += " download both again"
    named = re.search(r"rwkv[_-]?([4-7])", str(kind).lower())
    if "rwkv" not in str(kind).lower() or (named and named[1] != cfg.version[0]):
        raise WeightsError(another.format("model_type", shown(repr(kind)), f"RWKV-{cfg.version}"))
    sizes = {
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.layers,
        "intermediate_size": cfg.ffn_width,
    }
    if cfg.version[0] == "7":  # elsewhere these names are used for other numbers, or not at all
        sizes |= {"head_dim": cfg.head_size, "head_size": cfg.head_size}
    wrong = [key for key, size in sizes.items() if config.get(key) not in (None, size)]
    rows = config.get("vocab_size")
    if rows is not None and not (isinstance(rows, int) and rows <= cfg.vocab_size):  # or padded
        wrong.append("vocab_size")
    if wrong:
        size = (sizes | {"vocab_size": cfg.vocab_size})[wrong[0]]
        found = shown(repr(config[wrong[0]]))
        raise WeightsError(another.format(wrong[0], found, f"a model with {size:,}"))
    emb, head = official["emb.weight"], official.get("head.weight")
    if config.get("tie_word_embeddings") is True and not (head is None or _equal(emb, head)):
        raise WeightsError(
            "config.json: tie_word_embeddings = true, but the head's numbers are not those of the"
            " embedding; set it to false to use the head"
        )


def _equal(one: ArrayLike, other: ArrayLike) -> bool:
    """Whether two tensors have the same numbers, of whatever types."""
    if one is other:
        return True
    x, y, rows = np.asarray(one), np.asarray(other), 4096
    return x.shape == y.shape and all(
        np.array_equal(x[i : i + rows].astype(np.float64), y[i : i + rows].astype(np.float64))
        for i in range(0, len(x), rows)
    )


def _check_head_size(official: Mapping[str, ArrayLike]) -> None:
    r_k = official.get("blocks.0.att.r_k")
    if r_k is not None and r_k.shape[1:] != (HEAD_SIZE,):
        raise WeightsError(
            f"att.r_k of shape {list(r_k.shape)}: unless heads have {HEAD_SIZE} channels, version 7"
            " has another epsilon in Hugging Face's code than in the official one; use a .pth"
        )


def _config4(tensors: Mapping[str, ArrayLike], layers: int) -> dict[str, Any]:
    """Source: transformers, models/rwkv/configuration_rwkv.py."""
    vocab, width = tensors["emb.weight"].shape
    return {
        "architectures": ["RwkvForCausalLM"],
        "model_type": "rwkv",
        "vocab_size": vocab,
        "hidden_size": width,
        "attention_hidden_size": tensors["blocks.0.att.key.weight"].shape[0],
        "intermediate_size": tensors["blocks.0.ffn.key.weight"].shape[0],
        "num_hidden_layers": layers,
        "layer_norm_epsilon": 1e-5,
    }


def _config7(tensors: Mapping[str, ArrayLike], layers: int) -> dict[str, Any]:
    """Source: FLA, fla/models/rwkv7/configuration_rwkv7.py; rwkv7-hf, configuration_rwkv7.py."""
    vocab, width = tensors["emb.weight"].shape
    heads, head_size = tensors["blocks.0.att.r_k"].shape
    ffn = tensors["blocks.0.ffn.key.weight"].shape[0]
    ranks = {x: tensors[f"blocks.{layers - 1}.att.{x}1"].shape[1] for x in "wag"}
    v1 = tensors.get(f"blocks.{layers - 1}.att.v1")
    return {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_heads": heads,
        "head_dim": head_size,
        "value_dim": [heads * head_size] * layers,
        "intermediate_size": ffn,
        "hidden_ratio": ffn / width,
        "decay_low_rank_dim": ranks["w"],
        "a_low_rank_dim": ranks["a"],
        "v_low_rank_dim": 32 if v1 is None else v1.shape[1],  # a lone layer has no such tensor
        "gate_low_rank_dim": ranks["g"],
        "attn_mode": "chunk",
        "hidden_act": "sqrelu",
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": 1e-5,
    }
