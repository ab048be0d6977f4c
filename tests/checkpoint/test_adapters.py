"""Files of adapters: the same numbers after a round trip, what `peft` computed, one line for each
error."""

import contextlib
import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint.damaged_files import check_any_damage
from markers import each_recurrence
from official_weights import checkpoint
from tolerances import PEFT_LOGITS

import rwkv_jax
from rwkv_jax import adapters, models, tuning
from rwkv_jax.checkpoint.adapters import describe, is_adapter
from rwkv_jax.checkpoint.keymaps import config_of, from_official, to_official
from rwkv_jax.checkpoint.merging import merged
from rwkv_jax.checkpoint.pth import write_pth
from rwkv_jax.checkpoint.safetensors import read_metadata, read_safetensors, write_safetensors
from rwkv_jax.checkpoint.store import Store
from rwkv_jax.config import Config, ModelConfig, TrainConfig, TuneConfig
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.errors import UserError
from rwkv_jax.nn import LowRank
from rwkv_jax.toml import to_toml

GOLDEN = Path(__file__).parents[1] / "golden" / "peft"
SIZES = {"layers": 2, "width": 128, "head": 64, "vocab": 67, "ffn": 160, "seed": 11}
"""As in `golden/peft/make.py`."""
METHODS = {"lora": 4, "rslora": 3, "dora": 2, "miss": 3, "mini": 4, "pissa": 4}
"""The largest rank of each folder."""


@functools.cache
def golden():
    return dict(np.load(GOLDEN / "logits.npz"))


@functools.cache
def forward(cfg):
    return jax.jit(functools.partial(models.forward, cfg=cfg))


def logits(params, cfg):
    tokens = jnp.asarray(golden()["tokens"], jnp.int32)[None]
    return np.asarray(forward(cfg)(params, tokens)[0][0])


def trained(adapter, seed=0):
    """The adapter as if training had moved its numbers; zeros of left out layers stay."""
    rng = np.random.default_rng(seed)

    def moved(x):
        return jnp.asarray(rng.normal(size=x.shape).astype(np.float32))

    def change(x):
        some = (np.asarray(x.down) != 0).any((1, 2))[:, None, None].astype(np.float32)
        return x.replace(down=moved(x.down) * some, up=moved(x.up) * some)

    low_rank = {path: change(x) for path, x in adapter.low_rank.items()}
    return adapter.replace(low_rank=low_rank, whole=jax.tree.map(moved, adapter.whole))


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@each_recurrence
@pytest.mark.parametrize("layers", ["", "1:3"])
def test_saved_and_loaded_to_the_bit(version, layers, tmp_path):
    """Matrices, modules that are replaced, and parameters that are no modules."""
    params, cfg = from_official(checkpoint(version, layers=4, ranks=(6, 5, 4, 7, 3)))
    also = ["ln", "emb", {"6": "att.time_maa_*", "7": "att.x_*"}.get(version[0], "att.time_*")]
    fresh = adapters.init(
        cfg, jax.random.key(0), rank=3, alpha=7.0, layers=layers, also=also, params=params
    )
    for name, adapter in {"fresh": fresh, "trained": trained(fresh)}.items():
        adapters.save(tmp_path / name, adapter, cfg, base="0123", base_name="m.pth")
        found, info = adapters.load(tmp_path / name, cfg)
        assert_same(found, adapter)
        assert (info.method, info.rank, info.base, info.base_name) == ("lora", 3, "0123", "m.pth")
        assert info.layers == ((1, 2) if layers else (0, 1, 2, 3))
        assert info == describe(tmp_path / name) and is_adapter(tmp_path / name)
    names = read_safetensors(tmp_path / "trained" / "adapter_model.safetensors")
    home = "model.layers.2.attn.k_proj" if version == "7" else "blocks.2.att.key"
    assert names[f"base_model.model.{home}.lora_A.weight"].shape == (3, 32)
    assert any(".0." in name and "lora" in name for name in names) == (not layers)
    metadata = read_metadata(tmp_path / "trained" / "adapter_model.safetensors")
    assert metadata["base"] == "0123" and "rwkv_jax" in metadata


def test_scales_of_any_rank_come_back(tmp_path):
    """alpha / rank, in floating point, is the scale again."""
    _, cfg = from_official(checkpoint("7", layers=1))
    for rank in (1, 3, 7, 11):
        factors = jnp.ones((1, 32, rank)), jnp.ones((1, rank, 32))
        adapter = tuning.Adapter({"blocks.att.key": LowRank(*factors, 2.3 / rank**0.5)}, {})
        adapters.save(tmp_path / str(rank), adapter, cfg)
        assert_same(adapters.load(tmp_path / str(rank), cfg)[0], adapter)


@pytest.mark.parametrize("name", METHODS)
def test_what_peft_computed(name):
    """By the whole model with the adapter merged tensor by tensor, and in JAX."""
    tensors = checkpoint("7", **SIZES)
    params, cfg = from_official(tensors)
    adapter, info = adapters.load(GOLDEN / name, cfg)
    assert (info.rank, info.base_name) == (METHODS[name], "tiny")
    expected = golden()[name]
    on_files, _ = from_official(merged(tensors, cfg, [(adapter, 1.0)]))
    in_jax = adapters.merge(params, adapter)
    for found in (on_files, in_jax):
        error = np.abs(logits(found, cfg) - expected).max()
        assert error < PEFT_LOGITS * np.abs(expected).max()
    assert np.abs(golden()["base"] - expected).max() > 0.1 * np.abs(expected).max()


def test_dora_beside_the_weights():
    params, cfg = from_official(checkpoint("7", **SIZES))
    adapter, _ = adapters.load(GOLDEN / "dora", cfg)
    expected = golden()["dora"]
    found = logits(adapters.on(params, adapter), cfg)
    assert np.abs(found - expected).max() < PEFT_LOGITS * np.abs(expected).max()
    other, _ = adapters.load(GOLDEN / "lora", cfg)
    with pytest.raises(ValueError, match="put it on before the others"):
        adapters.on(adapters.on(params, other), adapter)


def test_dora_saved_and_loaded_to_the_bit(tmp_path):
    _, cfg = from_official(checkpoint("7", **SIZES))
    adapter, _ = adapters.load(GOLDEN / "dora", cfg)
    adapters.save(tmp_path / "a", adapter, cfg)
    assert_same(adapters.load(tmp_path / "a", cfg)[0], adapter)


def test_weights_add_up_as_in_jax():
    """By the file as by `merge`, for LoRA and DoRA; 0, and what is undone, change nothing."""
    tensors = checkpoint("7", **SIZES)
    params, cfg = from_official(tensors)
    dora, _ = adapters.load(GOLDEN / "dora", cfg)
    lora, _ = adapters.load(GOLDEN / "rslora", cfg)
    one = to_official(adapters.merge(params, dora, 0.3), cfg)
    for name, x in merged(tensors, cfg, [(dora, 0.3)]).items():
        np.testing.assert_allclose(x, np.asarray(one[name]), rtol=0, atol=1e-6)
    for name, x in merged(tensors, cfg, [(lora, 0.7), (lora, -0.7), (dora, 0.0)]).items():
        np.testing.assert_allclose(x, tensors[name], rtol=0, atol=1e-6)


def old_file(path, version, rank=2, **more):
    """RWKV-PEFT's file: integers, so that sums are exact in any order."""
    tensors, rng = checkpoint(version), np.random.default_rng(5)
    found = dict(more)
    for layer in range(3):
        for part in ("att.key", "ffn.value"):
            out, wide = tensors[f"blocks.{layer}.{part}.weight"].shape
            a, b = rng.integers(-3, 4, (rank, wide)), rng.integers(-3, 4, (out, rank))
            found[f"blocks.{layer}.{part}.lora_A"] = a.astype(np.float32)
            found[f"blocks.{layer}.{part}.lora_B"] = b.astype(np.float32)
        norm = rng.normal(size=32).astype(np.float32)
        found[f"blocks.{layer}.ln1.weight"] = norm
    write_pth(path, found)
    return tensors, found


@pytest.mark.parametrize("version", ["4", "5.0", "5.2", "6", "7"])
def test_a_pth_of_rwkv_peft(version, tmp_path):
    """W + alpha / rank B A to the bit, and replaced tensors."""
    tensors, stored = old_file(tmp_path / "rwkv-0.pth", version)
    cfg = config_of(tensors)
    with pytest.raises(UserError, match=r"rwkv-0\.pth: does not say its alpha; .*--alpha"):
        adapters.load(tmp_path / "rwkv-0.pth", cfg)
    adapter, info = adapters.load(tmp_path / "rwkv-0.pth", cfg, alpha=8.0)
    assert (info.rank, info.alpha, info.targets) == (2, 8, ("att.key", "ffn.value", "ln1"))
    found = merged(tensors, cfg, [(adapter, 1.0)])
    for name, x in tensors.items():
        module = name.removesuffix(".weight")
        if f"{module}.lora_A" in stored:
            x = x + 4 * (stored[f"{module}.lora_B"] @ stored[f"{module}.lora_A"])
        np.testing.assert_array_equal(found[name], stored.get(name, x))


def test_a_block_of_rwkv_peft_and_its_pissa(tmp_path):
    tensors = checkpoint("7")
    cfg, w = config_of(tensors), tensors["blocks.1.att.key.weight"]
    block = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
    write_pth(tmp_path / "b.pth", {"blocks.1.att.key.disha": block})
    adapter, info = adapters.load(tmp_path / "b.pth", cfg)
    found = np.asarray(merged(tensors, cfg, [(adapter, 1.0)])["blocks.1.att.key.weight"])
    assert info.method == "miss"
    np.testing.assert_array_equal(found, w + block[np.arange(32) % 5].T)

    rng = np.random.default_rng(1)
    a, a0, b, b0 = (rng.integers(-2, 3, (2, 32)).astype(np.float32) for _ in range(4))
    home = "blocks.1.att.key"
    write_pth(tmp_path / "p.pth", {f"{home}.lora_A": a, f"{home}.lora_B": b.T})
    start = {f"model.{home}.init_lora_A": a0, f"model.{home}.init_lora_B": b0.T}
    write_pth(tmp_path / "init_pissa.pth", start)
    adapter, info = adapters.load(tmp_path / "p.pth", cfg)
    found = np.asarray(merged(tensors, cfg, [(adapter, 1.0)])["blocks.1.att.key.weight"])
    assert (info.method, info.rank) == ("pissa", 4)
    np.testing.assert_array_equal(found, w + (b.T @ a - b0.T @ a0))
    write_pth(tmp_path / "init_pissa.pth", {"blocks.0.att.key.init_lora_A": a0})
    with pytest.raises(UserError, match=r"lacks A or B, here or in init_pissa\.pth beside it"):
        adapters.load(tmp_path / "p.pth", cfg)


def test_merging_rounds_once_and_measures(tmp_path):
    """In bfloat16: the float32 sum's nearest number; what is reported is what is lost."""
    tensors, _ = old_file(tmp_path / "a.pth", "7")
    cfg, noted = config_of(tensors), {}
    adapter, _ = adapters.load(tmp_path / "a.pth", cfg, alpha=0.01)
    exact = merged(tensors, cfg, [(adapter, 1.0)])
    rounded = merged(
        tensors, cfg, [(adapter, 1.0)], "bfloat16", lambda name, *rest: noted.update({name: rest})
    )
    name = "blocks.2.ffn.value.weight"
    kind = np.dtype(jnp.bfloat16)
    np.testing.assert_array_equal(rounded[name], np.asarray(exact[name]).astype(kind))
    before, after, stored = noted[name]
    np.testing.assert_array_equal(before, tensors[name])
    np.testing.assert_array_equal(after, exact[name])
    np.testing.assert_array_equal(stored, np.asarray(rounded[name]).astype(np.float32))
    assert rounded["head.weight"] is tensors["head.weight"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that has tuned the last two of three layers, and its weights."""
    folder = tmp_path_factory.mktemp("run")
    params, cfg = from_official(checkpoint("7", layers=3, vocab=257))
    rwkv_jax.save(folder / "m.pth", params, cfg)
    tune = TuneConfig(method="lora", rank=2, layers="1:", targets=["att.key"], also=["ln_out"])
    train = TrainConfig(init=str(folder / "m.pth"))
    (folder / "config.toml").write_text(to_toml(Config(model=cfg, train=train, tune=tune)))
    ByteTokenizer().save(folder / "tokenizer")
    adapter = tuning.init(cfg, jax.random.key(1), tune, params)
    meta = {"model": dataclasses.asdict(cfg), "tokenizer": ByteTokenizer().identity()}
    meta |= {"base": rwkv_jax.fingerprint(params, cfg)}
    with contextlib.closing(Store(folder / "checkpoints", keep=1)) as store:
        store.save(200, {"params": adapter, "rest": {"m": jnp.zeros(1)}}, meta)
    return folder, params, cfg


def test_a_run_of_ours(run, tmp_path):
    folder, params, cfg = run
    adapter, info = adapters.load(folder / "checkpoints" / "200", cfg)
    assert info.layers == (1, 2) and info.base == rwkv_jax.fingerprint(params, cfg)
    assert info.base_name == str(folder / "m.pth") and is_adapter(folder)
    assert describe(folder / "checkpoints" / "200") == info
    adapters.save(tmp_path / "a", adapter, cfg, base=info.base)
    assert_same(adapters.load(tmp_path / "a", cfg)[0], adapter)
    assert describe(tmp_path / "a").layers == (1, 2)
    with pytest.raises(UserError, match=r"changes a model of RWKV-7, 3 layers .* give its own"):
        adapters.load(folder, config_of(checkpoint("7", layers=2)))


def edited(tmp_path, name="lora", drop=(), more=None, **settings):
    """A golden folder with other settings, without some tensors, and with more."""
    folder = shutil.copytree(GOLDEN / name, tmp_path / "edited")
    config = json.loads((folder / "adapter_config.json").read_text()) | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    file = folder / "adapter_model.safetensors"
    tensors = {k: np.array(x) for k, x in read_safetensors(file).items()}
    write_safetensors(file, {k: x for k, x in tensors.items() if k not in drop} | (more or {}))
    return folder


HOME = "base_model.model.model.layers.0"
SMALL = np.zeros((2, 3), np.float32)
BAD = [
    ({"peft_type": "LOHA"}, "peft_type = LOHA: this release reads LORA and MISS"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out = True: .* does not know what that changes"),
    ({"lora_bias": True}, "lora_bias = True"),
    ({"megatron_config": {"a": 1}}, "megatron_config"),
    ({"bias": "all"}, "bias = all: RWKV's matrices have none"),
    ({"new_setting": 3}, "new_setting = 3: this release does not know"),
    ({"init_lora_weights": "pissa"}, "pissa has changed .* path_initial_model_for_weight_conv"),
    ({"r": 5}, "of rank 2, but adapter_config.json says 5; take both files of one save"),
    ({"lora_alpha": "big"}, "lora_alpha = big: must be a finite number"),
    ({"rank_pattern": {"(": 2}}, r"rank_pattern: '?\('? is no pattern"),
    ({"more": {f"{HOME}.attn.k_proj.lora_C.weight": SMALL}}, "lora_C: not a part of this kind"),
    ({"more": {f"{HOME}.attn.z_proj.lora_A.weight": SMALL}}, "z_proj.*: has no place in an RWKV"),
    ({"more": {f"{HOME}.attn.w_lora.lora.2.lora_A.weight": SMALL}}, "one of the model's own low"),
    ({"more": {"base_model.model.lm_head.lora_A.weight": SMALL}}, "a low-rank change of head"),
    ({"more": {"base_model.model.model.layers.7.ffn.x_k": SMALL}}, r"7\.ffn\.x_k: not in RWKV-7"),
    ({"drop": [f"{HOME}.attn.k_proj.lora_B.weight"]}, "att.key has only one of A and B"),
    ({"drop": [f"{HOME}.attn_norm.weight"]}, "blocks.0.ln1.weight is missing beside those of"),
    ({"name": "dora", "drop": [f"{HOME}.attn.k_proj.lora_magnitude_vector"]}, "no lora_magnitude"),
    ({"name": "miss", "init_weights": "bat"}, r"init_weights = bat \(Bat\) is read in two ways"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda x: str(x)[:40])
def test_what_cannot_be_read_is_one_line(change, message, tmp_path):
    cfg = config_of(checkpoint("7", **SIZES))
    with pytest.raises(UserError, match=message) as error:
        adapters.load(edited(tmp_path, **change), cfg)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(tmp_path))


def test_other_models_and_files(tmp_path):
    cfg = config_of(checkpoint("7", **SIZES))
    wider = config_of(checkpoint("7", **SIZES | {"width": 64}))
    with pytest.raises(UserError, match=r"do not change a matrix of 64 inputs .* another model"):
        adapters.load(GOLDEN / "dora", wider)
    with pytest.raises(UserError, match="layers 0 to 0 only"):
        adapters.load(GOLDEN / "miss", config_of(checkpoint("7", **SIZES | {"layers": 1})))
    with pytest.raises(UserError, match=r"has its own scale; leave alpha out"):
        adapters.load(GOLDEN / "lora", cfg, alpha=2.0)
    with pytest.raises(UserError, match=r"alpha = -1.0: must be a finite number above 0"):
        adapters.load(GOLDEN / "lora", cfg, alpha=-1.0)
    with pytest.raises(UserError, match="no such file or folder"):
        adapters.load(tmp_path / "nothing", cfg)
    with pytest.raises(UserError, match=r"neither a run nor a folder of peft's"):
        adapters.load(tmp_path, cfg)
    named = {
        "states": (
            {"blocks.0.att.time_state": np.zeros((2, 64, 64), "f4")},
            "give it with --state",
        ),
        "m": ({"blocks.0.att.key.lora_M": np.zeros((1, 128), "f4")}, "OpenMOSE's own kind of DoRA"),
        "bat": ({"blocks.0.att.key.bone": np.zeros((4, 2, 2), "f4")}, r"\(Bat\), which programs"),
        "v6": (
            {"blocks.0.att.gate.lora_A": SMALL, "blocks.0.att.gate.lora_B": SMALL.T},
            "no matrix",
        ),
    }
    for name, (tensors, message) in named.items():
        write_pth(tmp_path / f"{name}.pth", tensors)
        with pytest.raises(UserError, match=message) as error:
            adapters.load(tmp_path / f"{name}.pth", cfg, 2.0 if name == "v6" else None)
        assert str(error.value).startswith(f"{tmp_path}/{name}.pth: ")


def test_an_empty_folder_of_peft(tmp_path):
    folder = shutil.copytree(GOLDEN / "miss", tmp_path / "a")
    write_safetensors(folder / "adapter_model.safetensors", {})
    with pytest.raises(UserError, match="holds no adapter: it has no tensors"):
        adapters.load(folder, config_of(checkpoint("7", **SIZES)))


def test_any_damage_is_one_line(tmp_path):
    """Of the file of tensors, truncated ones included; then of the settings."""
    cfg = config_of(checkpoint("7", **SIZES))
    folder = shutil.copytree(GOLDEN / "miss", tmp_path / "a")

    def read(path):
        adapter, _ = adapters.load(folder, cfg)
        return {path: np.asarray(x.up) for path, x in adapter.low_rank.items()}

    for name in ("adapter_model.safetensors", "adapter_config.json"):
        content = (folder / name).read_bytes()
        check_any_damage(read, content, folder / name, 60)
        (folder / name).write_bytes(content)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing"):
        read(folder)


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    cfg = ModelConfig(version="7", layers=1, width=64, vocab_size=32)
    state = tuning.Adapter({}, {}, jnp.zeros((1, 1, 64, 64)))
    for adapter, message in (
        (state, "a state alone: save it as one"),
        (state.replace(state=None), "empty"),
    ):
        with pytest.raises(UserError, match=message):
            adapters.save(tmp_path / "a", adapter, cfg)
    other = LowRank(jnp.zeros((1, 8, 2)), jnp.zeros((1, 2, 8)), 1.0)
    with pytest.raises(ValueError, match="not a change of this RWKV-7's matrix"):
        adapters.save(tmp_path / "a", tuning.Adapter({"blocks.att.key": other}, {}), cfg)
    assert not list(tmp_path.iterdir())
    good = adapters.init(cfg, jax.random.key(0), rank=1)
    adapters.save(tmp_path / "a", good, cfg)
    with pytest.raises(UserError, match="is not empty; name a new folder"):
        adapters.save(tmp_path / "a", good, cfg)


def test_init_names_what_is_wrong():
    cfg = ModelConfig(version="7", layers=2, width=64, vocab_size=32)
    with pytest.raises(UserError, match="targets: nothing is called 'atn'"):
        adapters.init(cfg, jax.random.key(0), targets=["atn"])
    with pytest.raises(UserError, match=r"layers = 5:: the model has layers 0 to 1"):
        adapters.init(cfg, jax.random.key(0), layers="5:")
    with pytest.raises(ValueError, match="give its params"):
        adapters.init(cfg, jax.random.key(0), also=["ln"])
