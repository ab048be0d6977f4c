"""One golden model of version 7 in every file that people keep it in: equal logits, or one line.

The files are combinations of what programs do to a state dict: to the names, around it, its type,
the container and its shards. The judge are official logits.
"""

import functools
import itertools
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from official_weights import checkpoint
from tolerances import GOLDEN_LOGITS, MODEL_BFLOAT16, relative_rms

import rwkv_jax
from rwkv_jax import models
from rwkv_jax.checkpoint import pth, weights
from rwkv_jax.checkpoint.pth import write_pth
from rwkv_jax.checkpoint.safetensors import read_safetensors, write_safetensors
from rwkv_jax.errors import Remark, UserError

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


@functools.cache
def golden(version="7"):
    """The official tensors, the tokens [1, t] and their logits [t, V]."""
    arrays = dict(np.load(GOLDEN / f"rwkv{version}.npz"))
    tensors = {name: x.astype(np.float32) for name, x in arrays.items() if "." in name}
    return tensors, jnp.asarray(arrays["tokens"])[None], arrays["numpy_fp64"]


@functools.cache
def forward(cfg):
    return jax.jit(functools.partial(models.forward, cfg=cfg))


def check_logits(path, version="7", dtype="float32"):
    """The model in a file computes the official logits; returns its parameters and config."""
    _, tokens, expected = golden(version)
    params, cfg = rwkv_jax.load(path, dtype="float32")
    logits = np.asarray(forward(cfg)(params, tokens)[0][0])
    if dtype == "float32":
        np.testing.assert_allclose(logits, expected, rtol=0, atol=GOLDEN_LOGITS)
    assert relative_rms(logits, expected) < MODEL_BFLOAT16
    return params, cfg


# Names.

LEADING = (
    "module",
    "_orig_mod",
    "model",
    "_forward_module",
    "_fsdp_wrapped_module",
    "rwkv",
    "rwkv7",
)
INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")


def in_front(*parts):
    return lambda name: ".".join([*parts, name])


def around_layers(*parts):
    """As FSDP and torch.compile do when each layer is wrapped."""

    def longer(name):
        words = name.split(".")
        at = 2 if words[0] == "blocks" else 1
        return ".".join([*words[:at], *parts, *words[at:]])

    return longer


def all_but_head(prefix):
    return lambda name: name if name.startswith("head.") else prefix + name


PAIRS = [*itertools.product(LEADING, repeat=2)]
SOME = [pair for pair in PAIRS if pair[0] == pair[1]][::2] + [*itertools.pairwise(LEADING)][::2]
NAMES = [
    in_front(),
    *(in_front(part) for part in LEADING),
    *(in_front(*pair) for pair in SOME),
    in_front("student", "net", "model"),
    *(around_layers(part) for part in INSIDE),
    around_layers("_fsdp_wrapped_module", "_orig_mod"),
    lambda name: in_front("model")(around_layers("_orig_mod", "module")(name)),
    *(all_but_head(prefix) for prefix in ("rwkv7.", "model.", "rwkv.", "module.rwkv7._orig_mod.")),
]

# Around the state dict, in PyTorch's files.


def value(x):
    return pickle.dumps(x, 2)[2:-1]


BESIDE = {"seed": 2**70, "by": b"abc", "none": b"", "step": 3, "lr": 0.5, "of": {1.5: [(2, {3})]}}
KEYS = (
    *((), ("state_dict",), ("model_state_dict",), ("weights",), ("net",), ("model",), ("module",)),
    *(("model", "state_dict"), ("checkpoint",), ("epoch 3", "model")),
)


def write_nested(path, tensors, keys):
    """A checkpoint of a trainer: the state dict under keys, with other things beside it."""
    write_pth(path, tensors)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    program = pth._pickle(tensors)[2:-1]
    for key in reversed(keys):
        beside = b"".join(value(name) + value(x) for name, x in BESIDE.items())
        program = b"}(" + beside + value(key) + program + b"u"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, b"\x80\x02" + program + b"." if "pkl" in name else content)


# Files and folders: each writes tensors and returns the paths that stand for them.


def one_pth(folder, tensors, keys):
    write_nested(folder / "m.pth", tensors, keys)
    return [folder / "m.pth", folder]


def one_safetensors(folder, tensors, keys):
    write_safetensors(folder / "model.fp16.safetensors", tensors)
    (folder / "m.st").hardlink_to(folder / "model.fp16.safetensors")
    return [folder / "m.st"]


def hub_folder(folder, tensors, keys):
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({"model_type": "rwkv7"}))
    return [folder]


def shards(suffix, write, listed):
    def write_all(folder, tensors, keys):
        names, places, end = list(tensors), {}, 3
        for number in range(1, end + 1):
            file = f"{'pytorch_' * (suffix == 'bin')}model-0000{number}-of-0000{end}.{suffix}"
            part = {name: tensors[name] for name in names[number - 1 :: end]}
            write(folder / file, part)
            places |= dict.fromkeys(part, file)
        paths = [folder, folder / file]
        if listed:
            index = folder / f"{'pytorch_' * (suffix == 'bin')}model.{suffix}.index.json"
            index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
            paths.append(index)
        return paths

    return write_all


CONTAINERS = [
    *(one_pth, one_safetensors, hub_folder),
    *(
        shards(suffix, write, listed)
        for suffix, write in (("bin", write_pth), ("safetensors", write_safetensors))
        for listed in (True, False)
    ),
]
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def files(folder, tensors, rename, container, keys, dtype):
    folder.mkdir()
    renamed = {rename(name): x.astype(DTYPES[dtype]) for name, x in tensors.items()}
    return container(folder, renamed, keys)


def test_equal_logits_whatever_the_file(tmp_path):
    """Every name, container, key and type is in one of the cases."""
    cases = [*zip(NAMES, itertools.cycle(CONTAINERS), itertools.repeat(()))]
    cases += [(in_front(), one_pth, keys) for keys in KEYS]
    for number, (case, dtype) in enumerate(zip(cases, itertools.cycle(DTYPES))):
        paths = files(tmp_path / str(number), golden()[0], *case, dtype)
        check_logits(paths[number % len(paths)], dtype=dtype)


@pytest.mark.slow
def test_equal_numbers_in_every_combination(tmp_path):
    names = [*NAMES, *(in_front(*pair) for pair in PAIRS)]
    cases = [*itertools.product(names, ((container, ()) for container in CONTAINERS))]
    cases += itertools.product(NAMES[::4], ((one_pth, keys) for keys in KEYS))
    tensors = checkpoint("7", layers=2)
    for number, (rename, case) in enumerate(cases):
        for path in files(tmp_path / str(number), tensors, rename, *case, "bfloat16"):
            found = weights.read(path).tensors
            assert found.keys() == tensors.keys()
            for name, x in tensors.items():
                assert np.array_equal(found[name], x.astype(ml_dtypes.bfloat16)), (path, name)
        shutil.rmtree(tmp_path / str(number))


# Other layouts.


def layer_norm(x, weight, bias):
    """As `torch.nn.functional.layer_norm`, in float64."""
    x = x.astype(np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return (x * weight + bias).astype(np.float32)


def folded(tensors):
    """LN0 computed once, for every embedding."""
    rest = dict(tensors)
    norm = [rest.pop(f"blocks.0.ln0.{x}") for x in ("weight", "bias")]
    return rest | {"emb.weight": layer_norm(rest["emb.weight"], *norm)}


def squeezed(tensors):
    return {name: x.squeeze() for name, x in tensors.items()}


def with_unused(tensors):
    """The first layer's value mix, made up."""
    made_up = {f"blocks.0.att.v{i}": np.full((2, 3), np.nan, np.float32) for i in range(3)}
    shapes = {f"blocks.0.att.v{i}": tensors[f"blocks.1.att.v{i}"].shape for i in range(3)}
    return tensors | {name: np.resize(made_up[name], shape) for name, shape in shapes.items()}


def forked(tensors):
    return {
        ("head.weight" if name == "head.weight" else f"rwkv7.{name}").replace(
            "rwkv7.emb.", "rwkv7.embeddings."
        ): x
        for name, x in tensors.items()
    }


@pytest.mark.parametrize("change", [folded, squeezed, lambda x: forked(folded(x)), forked])
@pytest.mark.parametrize("write", [one_pth, hub_folder])
def test_forks_of_the_official_layout(change, write, tmp_path):
    """Whose embedding may be normalised already; then there is no LN0."""
    tensors = change(golden()[0])
    params, cfg = check_logits(write(tmp_path, tensors, ())[0])
    assert cfg.ln0 == any(name.endswith("ln0.weight") for name in tensors)
    rwkv_jax.save(tmp_path / "again.pth", params, cfg)
    assert check_logits(tmp_path / "again.pth")[1] == cfg
    rwkv_jax.save(tmp_path / "hf", params, cfg, layout="official-rwkv7")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["embedding_layer_norm_fused"] == (not cfg.ln0)
    assert check_logits(tmp_path / "hf")[1] == cfg
    if not cfg.ln0:
        with pytest.raises(UserError, match=r"ln0\.weight is missing: .* layout official-rwkv7"):
            rwkv_jax.save(tmp_path / "fla", params, cfg)


def test_the_official_layout_out_and_in(tmp_path):
    """Official names behind `rwkv7.`, but for the head; the config that official folders have."""
    tensors = golden()[0]
    weights.write(tmp_path / "hf", with_unused(tensors), layout="official-rwkv7", dtype="bfloat16")
    found = read_safetensors(tmp_path / "hf" / "model.safetensors")
    assert {name if name == "head.weight" else f"rwkv7.{name}" for name in tensors} == found.keys()
    back = weights.read(tmp_path / "hf")
    assert back.format == "official-rwkv7" and back.tensors.keys() == tensors.keys()
    for name, x in tensors.items():
        assert back.tensors[name].shape == x.shape
        assert np.array_equal(back.tensors[name], x.astype(ml_dtypes.bfloat16))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    official = {
        "architectures": ["Rwkv7ForCausalLM"],
        "model_type": "rwkv7",
        "vocab_size": len(tensors["emb.weight"]),
        "hidden_size": 128,
        "intermediate_size": tensors["blocks.0.ffn.key.weight"].shape[0],
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "head_size": 64,
        "group_norm_epsilon": 64e-5,
        "embedding_layer_norm_fused": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **{f"{x}_token_id": 0 for x in ("bos", "eos", "pad")},
        **{
            f"{long}_low_rank_dim": tensors[f"blocks.1.att.{x}1"].shape[1]
            for x, long in (("w", "decay"), ("a", "a"), ("v", "v"), ("g", "gate"))
        },
    }
    assert {key: config.get(key) for key in official} == official
    assert {"context_length", "max_position_embeddings"} <= config.keys()
    assert (
        rwkv_jax.load(tmp_path / "hf")[1] == rwkv_jax.load(tmp_path / "hf" / "model.safetensors")[1]
    )
    for change, message in (
        ({"group_norm_epsilon": 1e-5}, "group_norm_epsilon = 1e-05"),
        ({"num_hidden_layers": 4}, r"blocks\.3 is missing: config\.json has 4 layers"),
        ({"embedding_layer_norm_fused": True}, r"ln0\.weight is there, but .* = true"),
        ({"model_type": "llama"}, "model_type = 'llama', but the tensors are of RWKV-7"),
        ({"model_type": "RWKV6"}, "model_type = 'RWKV6', but the tensors are of RWKV-7"),
        ({"vocab_size": "x"}, "vocab_size = 'x', but the tensors are of a model with"),
        ({"hidden_size": 64}, "hidden_size = 64, but the tensors are of a model with 128"),
        ({"num_hidden_layers": 2}, "num_hidden_layers = 2, .* with 3: one of them is of another"),
        ({"head_size": 32}, "head_size = 32, .* with 64"),
        ({"vocab_size": 65536}, "vocab_size = 65536, .* download both again"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = true, but the head's numbers"),
    ):
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config | change))
        check_refused(tmp_path / "hf", message)
        check_refused(tmp_path / "hf" / "model.safetensors", message)


def test_a_config_that_leaves_something_open(tmp_path):
    """null is the default, a byte-order mark is none of the text, a head may be the embedding."""
    weights.write(tmp_path / "hf", golden()[0], layout="official-rwkv7")
    path = tmp_path / "hf" / "config.json"
    open_ends = {"layer_norm_epsilon": None, "hidden_size": None, "head_size": None}
    config = json.loads(path.read_text()) | open_ends
    for kind in "RWKV7", "RWKV-7", "rwkv_7", "rwkv", "Rwkv7a", "", None:
        padded = {"vocab_size": config["vocab_size"] - 1}  # of a padded vocabulary
        path.write_text(json.dumps(config | padded | {"model_type": kind}))
        rwkv_jax.load(tmp_path / "hf")
    path.write_text("\ufeff" + json.dumps(config), encoding="utf-8")
    params, _ = rwkv_jax.load(tmp_path / "hf")
    tensors = read_safetensors(path.with_name("model.safetensors"))
    tensors = {name: np.array(x) for name, x in tensors.items()}
    head = tensors.pop("head.weight")
    write_safetensors(path.with_name("model.safetensors"), tensors)
    check_refused(tmp_path / "hf", "head.weight is missing: .*; if its head is its embedding, set")
    path.write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tied, _ = rwkv_jax.load(tmp_path / "hf")
    assert np.array_equal(tied.head.T, params.emb) and not np.array_equal(params.head.T, params.emb)
    # Some write it nevertheless, in whatever type.
    for kind in tensors["rwkv7.emb.weight"].dtype, np.float64:
        tensors["head.weight"] = tensors["rwkv7.emb.weight"].astype(kind)
        write_safetensors(path.with_name("model.safetensors"), tensors)
        assert np.array_equal(rwkv_jax.load(tmp_path / "hf")[0].head.T, params.emb)
    tensors["head.weight"] = head
    write_safetensors(path.with_name("model.safetensors"), tensors)
    check_refused(tmp_path / "hf", "tie_word_embeddings = true, but the head's numbers are not")


def test_a_config_beside_official_names_counts_if_it_describes_them(tmp_path):
    """The same for the file and its folder."""
    tensors = golden()[0]
    headless = {name: x for name, x in tensors.items() if name != "head.weight"}
    tied = {"model_type": "rwkv7", "hidden_size": 128, "tie_word_embeddings": True}
    for name, config, given in (
        ("foreign", {"model_type": "llama", "hidden_size": 64}, tensors),
        ("other", {"model_type": "rwkv7", "hidden_size": 1024, "num_hidden_layers": 24}, tensors),
        ("tied", tied, headless),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        for file in "m.safetensors", "m.pth":
            weights.write(tmp_path / name / file, given)
            found = rwkv_jax.load(tmp_path / name / file)[0]
            folder = rwkv_jax.load(tmp_path / name)[0]
            assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(folder)))
            assert np.array_equal(found.head.T, found.emb) == (name == "tied")
            (tmp_path / name / file).unlink()


def test_a_state_beside_a_model_is_no_model(tmp_path):
    weights.write(tmp_path / "m.safetensors", golden()[0])
    params, cfg = rwkv_jax.load(tmp_path)
    rwkv_jax.states.save(tmp_path / "a.safetensors", models.init_state(cfg, 1))
    rwkv_jax.states.save(tmp_path / "z.safetensors", models.init_state(cfg, 1))
    assert np.array_equal(rwkv_jax.load(tmp_path)[0].emb, params.emb)
    check_refused(tmp_path / "a.safetensors", "a saved state, not a model: name its model, and --s")


def for_web_rwkv(tensors):
    """As its converter writes a model: float16, two words renamed, low-rank matrices transposed."""
    low_rank = re.compile(r".*\.(time_(maa|decay)_w[12]|[wavg][12])")
    found = {}
    for name, x in tensors.items():
        x = x.swapaxes(-1, -2) if low_rank.fullmatch(name) else x
        name = name.replace("time_faaaa", "time_first").replace("time_maa", "time_mix")
        found[name] = np.ascontiguousarray(x.astype(np.float16))
    return found


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_files_of_web_rwkv(version, tmp_path):
    tensors = golden(version)[0]
    write_safetensors(tmp_path / "m.st", for_web_rwkv(tensors))
    found = weights.read(tmp_path / "m.st").tensors
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        assert np.array_equal(found[name], x.astype(np.float16)), name
    if version in "67":
        check_logits(tmp_path / "m.st", version, "float16")


def test_decays_per_head_may_have_axes_of_one(tmp_path):
    tensors = dict(golden("5.1")[0])
    for name in tensors:
        if name.endswith(("time_decay", "time_faaaa")):
            tensors[name] = tensors[name].reshape(-1, 1, 1)
    write_pth(tmp_path / "m.pth", tensors)
    assert check_logits(tmp_path / "m.pth", "5.1")[1].version == "5.1"


def test_of_two_formats_in_a_folder_the_one_of_the_libraries_is_read(tmp_path):
    """And said so, if they are different models."""
    tensors = golden()[0]
    write_safetensors(tmp_path / "model.safetensors", tensors)
    write_pth(tmp_path / "pytorch_model.bin", tensors)
    check_logits(tmp_path)
    write_pth(tmp_path / "pytorch_model.bin", {name: x * 2 for name, x in tensors.items()})
    with pytest.warns(Remark, match=r"model\.safetensors and pytorch_model\.bin .* is read"):
        check_logits(tmp_path)
    # Also one that config.json does not describe.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "rwkv7", "hidden_size": 128}))
    (tmp_path / "model.safetensors").unlink()
    named = {name if name == "head.weight" else f"rwkv7.{name}": x for name, x in tensors.items()}
    write_safetensors(tmp_path / "model.safetensors", named)
    six = golden("6")[0]
    write_pth(tmp_path / "pytorch_model.bin", six)
    with pytest.warns(Remark, match=r"model\.safetensors and pytorch_model\.bin .* is read"):
        check_logits(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"half a file")
    check_logits(tmp_path)


# What is refused says what it is.


def with_lora(tensors, suffix=".lora_A"):
    return tensors | {f"blocks.0.att.key{suffix}": np.zeros((4, 128), np.float32)}


def empty(tensors):
    return {name: np.zeros(0, np.float32) for name in tensors}


def twice(tensors):
    return {f"{home}.{name}": x for home in ("model", "ema_model") for name, x in tensors.items()}


@pytest.mark.parametrize(
    "change, message",
    [
        (with_lora, "lora_A: an adapter, .*; merge it into its base"),
        (lambda x: {k: x for k, x in with_lora(x).items() if "lora" in k}, "an adapter.*; merge"),
        *(
            (functools.partial(with_lora, suffix=suffix), "an adapter.*; merge it")
            for suffix in (".bone", ".disha", ".lora.0", ".lora_M", ".lora_magnitude_vector")
        ),
        (functools.partial(with_lora, suffix=".weight_mx"), "a quantised model; take the original"),
        (empty, r"is empty: part of a DeepSpeed checkpoint; run zero_to_fp32\.py"),
        (twice, "several models in one file; save the one you want"),
    ],
)
@pytest.mark.parametrize("write", [write_pth, write_safetensors])
def test_what_is_no_model_is_one_line(change, message, write, tmp_path):
    path = tmp_path / ("m.pth" if write is write_pth else "m.safetensors")
    write(path, change(golden()[0]))
    check_refused(path, message)


def check_refused(path, message):
    with pytest.raises(UserError, match=message) as caught:
        rwkv_jax.load(path)
    assert str(caught.value).isprintable() and str(caught.value).startswith(str(path))


def test_what_others_made_of_a_model_is_one_line(tmp_path):
    """A file that PyPI rwkv converted, DeepSpeed's parts, torch's shards, a pickled program."""
    tensors, path = golden()[0], tmp_path / "m.pth"
    write_pth(path, tensors)
    with zipfile.ZipFile(path) as archive:
        program = archive.read("archive/data.pkl")
    names = value("_strategy") + value("cpu fp32") + value("_version") + value(7.0)
    others = {
        b"\x80\x02}(" + names + program[4:]: "converted by PyPI rwkv .*; take the file that it was",
        b"\x80\x02}(" + value("args") + b"cargparse\nNamespace\n)R" + program[4:]: (
            r"refers to argparse\.Namespace, .*; save the state dict alone .* do not trust"
        ),
        b"\x80\x02}(" + value("x") + b"cdeepspeed.utils\nA\n)R" + program[4:]: "zero_to_fp32",
    }
    for content, message in others.items():
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
        check_refused(path, message)
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "zero_to_fp32.py").touch()
    check_refused(tmp_path / "zero", r"zero_to_fp32\.py \. model\.pth")
    (tmp_path / "zero" / "global_step9").mkdir()
    for part in ("zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_0_optim_states.pt"):
        (tmp_path / "zero" / "global_step9" / part).touch()
        check_refused(tmp_path / "zero" / "global_step9" / part, r"zero_to_fp32\.py")
    check_refused(tmp_path / "zero" / "global_step9", r"zero_to_fp32\.py")
    check_refused(tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt", r"zero_to_fp32\.py")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "__0_0.distcp").touch()
    check_refused(tmp_path / "parts", r"format_utils dcp_to_torch .*parts model\.pth")


@pytest.mark.parametrize(
    "name, command",
    [
        ("BlinkDL/rwkv7-g1", "BlinkDL/rwkv7-g1 --local-dir rwkv7-g1"),
        ("BlinkDL/rwkv7-g1/a-1.5b.pth", "BlinkDL/rwkv7-g1 a-1.5b.pth --local-dir rwkv7-g1"),
        ("hf://BlinkDL/rwkv7-g1", "BlinkDL/rwkv7-g1 --local-dir rwkv7-g1"),
        ("https://huggingface.co/RWKV/g1", "RWKV/g1 --local-dir g1"),
        (
            "https://huggingface.co/RWKV/g1/resolve/main/sub/a.pth?download=true",
            "RWKV/g1 sub/a.pth --local-dir g1",
        ),
    ],
)
def test_a_name_of_the_hub_gets_its_command(name, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_refused(name, f"no such file or folder here; .*: hf download {command}$")


@pytest.mark.parametrize("name", ["m.pth", "runs/demo", "../x/y", "a/b.pth", "/no/where"])
def test_a_path_is_no_name_of_the_hub(name, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    check_refused(name, r"cannot be read \(No such file")
