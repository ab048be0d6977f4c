"""Hugging Face folders, read and written: against the libraries that make them, and every layout.

`tests/golden/huggingface/make.py` made the folders and says where the numbers come from.
"""

import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tolerances import GOLDEN_LOGITS

from rwkv_jax import models
from rwkv_jax.checkpoint import keymaps
from rwkv_jax.checkpoint.errors import WeightsError
from rwkv_jax.checkpoint.huggingface import (
    LAYOUTS,
    from_official,
    generation_config,
    is_huggingface,
    layout_of,
    to_official,
    tokenizer_config,
)

GOLDEN = Path(__file__).parents[1] / "golden"
UNUSED = {f"blocks.0.att.v{i}" for i in range(3)}

every_folder = pytest.mark.parametrize("name", ["rwkv4", "rwkv7"])


@functools.cache
def folder(name):
    """The tensors, the config, the tokens `[t]` and the library's logits `[t, V]`."""
    path = GOLDEN / "huggingface" / name
    config = json.loads((path / "config.json").read_text())
    logits = np.load(path / "logits.npz")
    return load_file(path / "model.safetensors"), config, logits["tokens"], logits["logits"]


@functools.cache
def official(name):
    """The official tensors of a golden file."""
    return {key: x for key, x in np.load(GOLDEN / f"{name}.npz").items() if "." in key}


def same(tensors, others):
    assert tensors.keys() == others.keys()
    for name, x in others.items():
        assert tensors[name].shape == x.shape, name
        assert tensors[name].dtype == x.dtype, name
        assert np.array_equal(tensors[name], x), name


@every_folder
def test_logits_are_those_of_the_library(name):
    """Version 4 of transformers too, which divides some matrices when it runs, not in the file."""
    tensors, config, tokens, logits = folder(name)
    params, cfg = keymaps.from_official(to_official(tensors, config))
    run = jax.jit(functools.partial(models.forward, cfg=cfg))
    ours, _ = run(params, jnp.asarray(tokens[None], jnp.int32))
    assert 0.5 < logits.std() < 5
    np.testing.assert_allclose(ours[0], logits, rtol=0, atol=GOLDEN_LOGITS)


@every_folder
def test_written_folder_is_the_library_s(name):
    """Read and written again: the same tensors in the same shapes, and its config."""
    tensors, config, _, _ = folder(name)
    written, ours = from_official(to_official(tensors, config))
    same(written, tensors)
    config = config | {"torch_dtype": config["dtype"]}  # transformers 5 writes one, reads both
    unread = {"hidden_ratio", "attn_mode", "bos_token_id"}
    shared = (ours.keys() & config.keys()) - unread
    assert len(shared) > 10
    assert {key: ours[key] for key in shared} == {key: config[key] for key in shared}


@every_folder
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_official_names_round_trip(name, dtype):
    """A round trip, bit for bit, without a copy and in any order; and from a file whose
    names DeepSpeed has made longer."""
    tensors = {key: x.astype(np.dtype(dtype)) for key, x in official(name).items()}
    for x in tensors.values():
        x.flags.writeable = False
    prefixed = {f"_forward_module.{key}": tensors[key] for key in sorted(tensors, reverse=True)}
    written, config = from_official(prefixed)
    assert is_huggingface(written) and not is_huggingface(tensors)
    back = to_official(written, config)
    same(back, tensors)
    assert config["torch_dtype"] == dtype
    assert all(np.shares_memory(back[key], x) for key, x in tensors.items())


@every_folder
@pytest.mark.parametrize("wrapper", ["module", "_orig_mod.module", "model.model", "student"])
def test_wrapped_names(name, wrapper):
    """In front of all names, and around each layer."""
    tensors, config, _, _ = folder(name)
    expected = to_official(tensors, config)
    front = {f"{wrapper}.{key}": x for key, x in tensors.items()}
    inside = {re.sub(r"(\.\d+\.)", r"\1_fsdp_wrapped_module.", key): x for key, x in front.items()}
    assert inside.keys() != front.keys()
    for wrapped in (front, inside):
        assert is_huggingface(wrapped)
        same(to_official(wrapped, config), expected)


def test_unused_tensors_of_the_first_layer_are_left_out():
    """Official training writes the first layer's value mix, and so do our own files."""
    params, cfg = keymaps.from_official(official("rwkv7"))
    whole = keymaps.to_official(params, cfg)
    assert whole.keys() >= UNUSED
    written, config = from_official(whole)
    written = {key: np.asarray(x) for key, x in written.items()}
    same(to_official(written, config), {key: x for key, x in whole.items() if key not in UNUSED})


def test_end_of_document_and_side_files():
    """The files beside the weights are JSON and hold the end-of-document id."""
    _, config = from_official(official("rwkv7"), eod=3)
    ids = {"bos_token_id": 3, "eos_token_id": 3, "pad_token_id": 3}
    assert config | ids == config
    for kind, tokenizer in {
        "bytes": None,
        "bpe": "PreTrainedTokenizerFast",
        "file": "PreTrainedTokenizerFast",
        "world": "RWKV7Tokenizer",
    }.items():
        found = json.loads(json.dumps(tokenizer_config(kind, 65536))) or {}
        assert found.get("tokenizer_class") == tokenizer
    assert json.loads(json.dumps(generation_config(config))) == ids


# Variants of flash-linear-attention


def fla7():
    tensors, config, _, _ = folder("rwkv7")
    return dict(tensors), dict(config)


def test_fla7_packed_mixes():
    """Older files hold the six mixes in one matrix, in the order r, w, k, v, a, g."""
    tensors, config = fla7()
    expected = to_official(tensors, config)
    for layer in range(2):
        names = [f"model.layers.{layer}.attn.x_{x}" for x in "rwkvag"]
        rows = [tensors.pop(name).ravel() for name in names]
        tensors[f"model.layers.{layer}.attn.x_x"] = np.stack(rows)
    same(to_official(tensors, config), expected)


def test_fla7_first_layer_may_have_a_value_mix():
    tensors, config = fla7()
    for part in ("0.weight", "2.weight", "2.bias"):
        name = f"model.layers.1.attn.v_lora.lora.{part}"
        tensors[name.replace("layers.1", "layers.0")] = tensors[name]
    assert to_official(tensors, config).keys() >= UNUSED


def test_fla7_tied_embeddings_and_norms_without_bias():
    tensors, config = fla7()
    expected = to_official(tensors, config)
    config |= {"tie_word_embeddings": True, "norm_bias": False}
    same(to_official(tensors, config), expected)  # a tensor that exists is used
    del tensors["lm_head.weight"]
    norms = ("pre_norm.bias", "attn_norm.bias", "ffn_norm.bias", "model.norm.bias")
    for name in [name for name in tensors if name.endswith(norms)]:
        del tensors[name]
    found = to_official(tensors, config)
    assert found["head.weight"] is found["emb.weight"]
    for name in expected.keys() - {"head.weight"}:
        bias = name.endswith(".bias") and "ln_x" not in name
        assert np.array_equal(found[name], expected[name] * (0 if bias else 1)), name
        assert found[name].dtype == expected[name].dtype


C, RANK, DECAY, FFN, LAYERS = 8, 3, 5, 12, 2
MATRIX, ROW = (C, C), (1, 1, C)
NORMS = {f"{norm}.{x}": (C,) for norm in ("ln1", "ln2", "att.ln_x") for x in ("weight", "bias")}
MATRICES = {f"att.{x}.weight": MATRIX for x in ("receptance", "key", "value", "output")}
GATED = {"att.gate.weight": MATRIX, "ffn.receptance.weight": MATRIX, "att.time_faaaa": (2, 4)}
CHANNELS = {"ffn.key.weight": (FFN, C), "ffn.value.weight": (C, FFN)}
MIXES5 = {f"att.time_mix_{x}": ROW for x in "kvr"} | {f"ffn.time_mix_{x}": ROW for x in "kr"}
LAYER = {
    "5.0": NORMS
    | MATRICES
    | CHANNELS
    | MIXES5
    | {"att.time_decay": (2,), "att.time_first": (2,), "ffn.receptance.weight": MATRIX},
    "5": NORMS
    | MATRICES
    | CHANNELS
    | MIXES5
    | GATED
    | {"att.time_mix_g": ROW, "att.time_decay": (2, 4)},
    "6": NORMS
    | MATRICES
    | CHANNELS
    | GATED
    | {f"att.time_maa_{x}": ROW for x in "xwkvrg"}
    | {f"ffn.time_maa_{x}": ROW for x in "kr"}
    | {"att.time_maa_w1": (C, 5 * RANK), "att.time_maa_w2": (5, RANK, C)}
    | {"att.time_decay": ROW, "att.time_decay_w1": (C, DECAY), "att.time_decay_w2": (DECAY, C)},
}
MODEL = {
    "emb.weight": (7, C),
    "blocks.0.ln0.weight": (C,),
    "blocks.0.ln0.bias": (C,),
    "ln_out.weight": (C,),
    "ln_out.bias": (C,),
    "head.weight": (7, C),
}


def made_up(version):
    """A model of random tensors in the official shapes of a version."""
    layers = {
        f"blocks.{layer}.{name}": shape
        for layer in range(LAYERS)
        for name, shape in LAYER[version].items()
    }
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=shape).astype(np.float32) for name, shape in (MODEL | layers).items()
    }


def fla6(tensors):
    """A model of version 6 as written by flash-linear-attention's converter."""
    there = {
        "model.embeddings.weight": tensors["emb.weight"],
        "lm_head.weight": tensors["head.weight"],
    }
    for x in ("weight", "bias"):
        there[f"model.layers.0.pre_norm.{x}"] = tensors[f"blocks.0.ln0.{x}"]
        there[f"model.norm.{x}"] = tensors[f"ln_out.{x}"]
    for layer in range(LAYERS):
        at = {
            name.removeprefix(f"blocks.{layer}."): x
            for name, x in tensors.items()
            if name.startswith(f"blocks.{layer}.")
        }
        w1 = dict(zip("wkvrg", np.split(at["att.time_maa_w1"], 5, axis=1), strict=True))
        w2 = dict(zip("wkvrg", at["att.time_maa_w2"], strict=True))
        block = {
            "attn.x_proj.0.mu": at["att.time_maa_x"].ravel(),
            "attn.x_proj.0.linear.weight": np.concatenate([w1[x] for x in "rwkvg"], 1).T,
            "attn.x_proj.2.weight": np.concatenate([w2[x] for x in "rwkvg"]).T,
            "attn.x_bias": np.stack([at[f"att.time_maa_{x}"].ravel() for x in "rwkvg"]),
            "attn.w_proj.linear.lora.0.weight": at["att.time_decay_w1"].T,
            "attn.w_proj.linear.lora.2.weight": at["att.time_decay_w2"].T,
            "attn.w_proj.linear.lora.2.bias": at["att.time_decay"].ravel(),
            "attn.bonus": at["att.time_faaaa"],
            "attn.o_proj.weight": at["att.output.weight"],
            "ffn.key.mu": at["ffn.time_maa_k"].ravel(),
            "ffn.key.linear.weight": at["ffn.key.weight"],
            "ffn.receptance.mu": at["ffn.time_maa_r"].ravel(),
            "ffn.receptance.linear.weight": at["ffn.receptance.weight"],
            "ffn.value.weight": at["ffn.value.weight"],
        }
        for x in ("receptance", "key", "value", "gate"):
            block[f"attn.{x[0]}_proj.linear.weight"] = at[f"att.{x}.weight"]
        for x in ("weight", "bias"):
            block[f"attn.g_norm.{x}"] = at[f"att.ln_x.{x}"]
            block[f"attn_norm.{x}"] = at[f"ln1.{x}"]
            block[f"ffn_norm.{x}"] = at[f"ln2.{x}"]
        there |= {f"model.layers.{layer}.{name}": x for name, x in block.items()}
    return there


FLA6_CONFIG = {"model_type": "rwkv6", "expand_k": 1.0, "expand_v": 1.0, "norm_eps": 1e-5}


def test_fla6():
    expected = made_up("6")
    there = fla6(expected)
    assert layout_of(there, FLA6_CONFIG) == "fla-rwkv6"
    same(to_official(there, FLA6_CONFIG), expected)


def test_fla6_mixes_mean_the_same():
    """Both codes' equations for the five mixes, each with its own tensors."""
    there = fla6(made_up("6"))
    ours = to_official(there, FLA6_CONFIG)
    x, delta = np.random.default_rng(1).normal(size=(2, C))

    def here(name):
        return np.asarray(ours[f"blocks.1.att.time_maa_{name}"], np.float64)

    low = np.tanh((x + delta * here("x").ravel()) @ here("w1")).reshape(5, RANK)
    official_mixes = {
        name: here(name).ravel() + low[i] @ here("w2")[i] for i, name in enumerate("wkvrg")
    }

    # fla/layers/rwkv6.py: LerpLinear, tanh, an einsum with the second matrix seen as [c, 5, rank]
    block = {
        name: np.asarray(x, np.float64) for name, x in there.items() if "layers.1.attn" in name
    }
    low = np.tanh(
        block["model.layers.1.attn.x_proj.0.linear.weight"]
        @ (x + delta * block["model.layers.1.attn.x_proj.0.mu"])
    ).reshape(5, RANK)
    second = block["model.layers.1.attn.x_proj.2.weight"].reshape(C, 5, RANK)
    mixes = np.einsum("nr,cnr->nc", low, second) + block["model.layers.1.attn.x_bias"]
    for name, mix in zip("rwkvg", mixes, strict=True):
        np.testing.assert_allclose(mix, official_mixes[name], rtol=1e-12)


def test_fla6_is_reordered_on_use():
    there = fla6(made_up("6"))
    ours = to_official(there, FLA6_CONFIG)
    there["model.layers.0.attn.x_proj.2.weight"][:] = 0
    assert not np.any(ours["blocks.0.att.time_maa_w2"])
    for name, x in ours.items():
        views = any(np.shares_memory(x, source) for source in there.values())
        assert views or name.endswith(("maa_w1", "maa_w2")), name


# Remote code


def remote(tensors, home):
    """The names used by the converters of remote code."""
    there = {}
    for name, x in tensors.items():
        name = re.sub(r"^emb\.", "embeddings.", name)
        name = name.replace("blocks.0.ln0", "blocks.0.pre_ln")
        name = re.sub(r"blocks\.(\d+)\.att", r"blocks.\1.attention", name)
        name = re.sub(r"blocks\.(\d+)\.ffn", r"blocks.\1.feed_forward", name)
        for word in ("key", "value", "receptance", "gate"):
            name = re.sub(rf"\.time_mix_{word[0]}$", f".time_mix_{word}", name)
        there[name if name == "head.weight" else f"{home}.{name}"] = x
    return there


@pytest.mark.parametrize("version", ["5.0", "5", "6"])
def test_remote_code(version):
    expected = made_up(version)
    there = remote(expected, "rwkv")
    config = {"model_type": f"rwkv{version[0]}", "layer_norm_epsilon": 1e-5, "rescale_every": 6}
    assert is_huggingface(there)
    assert layout_of(there, config) == f"remote-rwkv{version}"
    same(to_official(there, config), expected)


def test_remote_code_of_version_7():
    """Early and late: the first norm belonged to the first layer, then to the model."""
    expected = official("rwkv7")
    there = remote(expected, "model")
    assert layout_of(there, {}) == "remote-rwkv7"
    same(to_official(there, {}), expected)
    late = {name.replace("blocks.0.pre_ln", "pre_ln"): x for name, x in there.items()}
    assert late.keys() != there.keys()
    same(to_official(late, {}), expected)


# Errors


def fails(culprit, read, *args):
    with pytest.raises(WeightsError, match=re.escape(culprit)) as caught:
        read(*args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_counts(layout):
    """A missing and an unknown tensor are named as in the folder."""
    there, config = {
        "fla-rwkv7": fla7,
        "fla-rwkv6": lambda: (fla6(made_up("6")), FLA6_CONFIG),
        "transformers-rwkv4": lambda: folder("rwkv4")[:2],
        "remote-rwkv7": lambda: (remote(official("rwkv7"), "model"), {}),
        "remote-rwkv6": lambda: (remote(made_up("6"), "rwkv"), {}),
        "remote-rwkv5": lambda: (remote(made_up("5"), "rwkv"), {}),
        "remote-rwkv5.0": lambda: (remote(made_up("5.0"), "rwkv"), {}),
    }[layout]()
    assert layout_of(there, config) == layout
    for name in there.keys() - {LAYOUTS[layout].mark}:
        fails(name, to_official, {key: x for key, x in there.items() if key != name}, config)
    extra = next(iter(there)) + ".extra\n"
    fails(extra.strip(), to_official, there | {extra: np.zeros(3)}, config)
    layers = 1 + max(
        int(number) for number in re.findall(r"(?:layers|blocks)\.(\d+)", " ".join(there))
    )
    fails(f".{layers}.", to_official, there, config | {"num_hidden_layers": 99})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn", {"layers": [1], "num_heads": 2}),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("norm_eps", 1e-6),
        ("norm_first", False),
        ("hidden_act", "relu"),
    ],
)
def test_configs_that_mean_another_model(key, value):
    tensors, config = fla7()
    fails(key, to_official, tensors, config | {key: value})


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.attn.q_proj.weight",
        "base_model.model.model.layers.0.attn.r_proj.lora_A.weight",
        "model.layers.0.attn.r_proj.qweight",
        "model.layers.0.attn.r_proj.weight.absmax",
    ],
)
def test_names_of_models_that_cannot_be_read(name):
    tensors, config = fla7()
    assert is_huggingface([name])
    fails(name, to_official, tensors | {name: np.zeros(3)}, config)


def test_unknown_layouts_and_shapes():
    fails("model_type = llama", layout_of, ["model.embed_tokens.weight"], {"model_type": "llama"})
    fails("model_type = unknown", layout_of, [], {})
    tensors, config = fla7()
    for layer in range(2):
        for x in "rwkvag":
            del tensors[f"model.layers.{layer}.attn.x_{x}"]
        tensors[f"model.layers.{layer}.attn.x_x"] = np.zeros((5, 64))
    fails("model.layers.0.attn.x_x has shape [5, 64]", to_official, tensors, config)


def test_head_sizes_that_mean_something_else():
    tensors = dict(official("rwkv7"))
    name = "blocks.0.att.r_k"
    tensors[name] = tensors[name].reshape(4, 32)
    fails("att.r_k of shape [4, 32]", from_official, tensors)
    fails("att.r_k of shape [4, 32]", to_official, remote(tensors, "model"), {})


def test_what_cannot_be_written():
    tensors = official("rwkv7")
    fails("versions 5 and 6", from_official, made_up("6"))
    extra = "blocks.0.ffn.s_emb.weight"
    fails(extra, from_official, tensors | {extra: np.zeros((7, 3), np.float32)})
    fails("other shapes", from_official, tensors | {"emb.weight": tensors["ln_out.weight"]})
    for name in ("head.weight", "blocks.1.att.v2"):
        fails(name, from_official, {key: x for key, x in tensors.items() if key != name})
