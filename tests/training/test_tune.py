"""Runs that tune given weights: an adapter alone is trained, saved and resumed."""

import dataclasses
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tolerances import MODEL_RMS, relative_rms
from training.meshes import MESHES
from training.meshes import config as mesh_config
from training.processes import start, wait_for
from training.runs import settings
from training.test_mesh import loader

import rwkv_jax as rwkv
from rwkv_jax import models, sharding, tuning
from rwkv_jax.checkpoint.store import CHECKPOINTS, load_saved
from rwkv_jax.checkpoint.weights import load_run
from rwkv_jax.config import MeshConfig, ModelConfig, TuneConfig
from rwkv_jax.errors import UserError
from rwkv_jax.toml import load_stated
from rwkv_jax.training import loop
from rwkv_jax.training.loop import train
from rwkv_jax.training.mesh import LocalRows, make_mesh
from rwkv_jax.training.report import Report
from rwkv_jax.training.state import init_train_state
from rwkv_jax.training.step import make_train_step

LORA = {"tune.method": "lora", "tune.rank": 4, "optimizer.peak_lr": 1e-2}
LORA |= {"optimizer.warmup_steps": 0, "train.checkpoint_every": 4, "train.keep": 9}


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(Report, "curve", lambda _: None)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A model in bfloat16, whose matrices are not the zeros of a fresh one."""
    cfg = ModelConfig(version="7", layers=2, width=64, vocab_size=257)
    leaves, tree = jax.tree.flatten(models.init_params(cfg, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.02 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    path = tmp_path_factory.mktemp("weights") / "base.pth"
    rwkv.save(path, tree.unflatten(noisy), cfg, dtype="bfloat16")
    return path


def run(folder, weights, *, text="", **options):
    """As the command does it."""
    folder.mkdir(exist_ok=True)
    given = settings(folder, **LORA | {"train.init": weights, "train.steps": 8} | options)
    sizes = ("model.layers", "model.width", "data.tokenizer")
    cfg, stated = load_stated(None, [x for x in given if x.split("=")[0] not in sizes])
    with (folder / f"stdout{text}").open("w") as file:
        return train(cfg, stated=stated, console=Console(file=file, width=200))


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, weights):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Report, "curve", lambda _: None)
        return run(tmp_path_factory.mktemp("whole"), weights)


def test_an_adapter_alone_is_trained_and_saved(whole, weights):
    saved = load_saved(whole)
    assert saved.base == rwkv.fingerprint(*rwkv.load(weights))
    assert all(np.abs(x.up).max() > 1e-3 for x in saved.params.low_rank.values())
    params, cfg, _ = load_run(whole)
    before, same = rwkv.load(weights)
    assert cfg == same
    equal(params, tuning.merge(before, saved.params, dtype="float32"))
    rounded = tuning.merge(before, saved.params)
    assert rounded.blocks.att.key.dtype == before.blocks.att.key.dtype == "bfloat16"
    np.testing.assert_allclose(rounded.blocks.att.key, params.blocks.att.key, rtol=2**-8)
    equal(params.emb, before.emb)
    size = sum(x.stat().st_size for x in (whole / CHECKPOINTS / "8").rglob("*") if x.is_file())
    numbers = sum(x.size for x in jax.tree.leaves(saved.params))
    assert size < 4 * 3 * numbers + 60_000 < weights.stat().st_size * 4
    assert "rank 4 of att, ffn: " in (whole.parent / "stdout").read_text()


def test_the_adapter_is_a_folder_that_others_read(whole, weights):
    """As `peft` has it, with layers and ranks in its names."""
    saved = load_saved(whole)
    cfg = rwkv.load(weights)[1]
    adapter, info = rwkv.adapters.load(whole / "adapter", cfg)
    equal(adapter, saved.params)
    assert (info.method, info.rank, info.alpha, info.base) == ("lora", 4, 32.0, saved.base)
    assert str(whole / "adapter") in (whole.parent / "stdout").read_text()


@pytest.mark.parametrize("version", ["7", "6"])
def test_a_state_is_tuned_and_read_back(version, weights, tmp_path):
    """`sample.py MODEL --state` starts from what the run wrote; so does the run itself."""
    if version == "6":  # which has a state already: the tuned one is beyond it
        cfg = ModelConfig(version="6", layers=2, width=64, vocab_size=257, state_tuned=True)
        params = models.init_params(cfg, jax.random.key(0))
        leaves, tree = jax.tree.flatten(params)
        noise = [jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(leaves)]
        weights = tmp_path / "base.pth"
        noisy = [x + 0.05 * y for x, y in zip(leaves, noise, strict=True)]
        rwkv.save(weights, tree.unflatten(noisy), cfg)
    options = {"tune.method": "state", "tune.rank": 16, "optimizer.peak_lr": 0.1}
    options |= {"train.steps": 6}
    folder = run(tmp_path / "a", weights, **options, **{"train.remat": "block"})
    state = load_saved(folder).params.state
    assert float(np.abs(state).min(axis=(1, 2, 3)).max()) > 0
    params, cfg, tokenizer = load_run(folder)
    assert cfg.state_tuned
    alone, plain = rwkv.load(weights, dtype="float32")
    own = 0.0 if version == "7" else alone.blocks.att.time_state
    np.testing.assert_array_equal(params.blocks.att.time_state, own + state)
    tokens = jnp.asarray([tokenizer.encode("def add")])
    given = rwkv.states.load(folder / "state.pth", plain).state
    found = rwkv.forward(params, tokens, cfg=cfg)[0]
    wanted = rwkv.forward(alone, tokens, given, cfg=plain)[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert float(jnp.max(jnp.abs(found - rwkv.forward(alone, tokens, cfg=plain)[0]))) > 0.01


def test_a_run_that_was_stopped_is_the_run_that_was_not(whole, weights, tmp_path):
    """From its checkpoint of step 4, with the weights read again."""
    folder = tmp_path / "b"
    shutil.copytree(whole.parent, folder)
    shutil.rmtree(folder / "run" / CHECKPOINTS / "8")
    stated = folder / "run" / "config.toml"
    stated.write_text(stated.read_text().replace(str(whole.parent), str(folder)))
    found = load_saved(run(folder, weights, text="2"))
    assert "resuming from step 4" in (folder / "stdout2").read_text()
    equal(found.params, load_saved(whole).params)


@pytest.mark.slow
def test_kill_9_leaves_an_adapter_that_resumes_exactly(tmp_path):
    cfg = ModelConfig(version="7", layers=1, width=64, vocab_size=257)
    rwkv.save(tmp_path / "base.pth", models.init_params(cfg, jax.random.key(0)), cfg)
    many = [f"train.init={tmp_path / 'base.pth'}", "train.steps=150", "train.checkpoint_every=15"]
    many += [f"{name}={x}" for name, x in LORA.items() if name != "train.checkpoint_every"]
    whole = start(tmp_path, *many, f"train.output={tmp_path / 'whole'}")
    _, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err
    log = tmp_path / "run" / "metrics.jsonl"
    process = start(tmp_path, *many)
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 15, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    last = start(tmp_path, *many)
    out, err = last.communicate(timeout=300)
    assert last.returncode == 0, err
    assert "resuming from step" in out
    names = "adapter_config.json", "adapter_model.safetensors"
    found, wanted = (
        [(tmp_path / run / "adapter" / name).read_bytes() for name in names]
        for run in ("run", "whole")
    )
    assert found == wanted


def test_other_weights_or_none_are_refused(whole, weights, tmp_path):
    folder = tmp_path / "b"
    shutil.copytree(whole.parent, folder)
    mine = tmp_path / "mine.pth"
    stated = folder / "run" / "config.toml"
    text = stated.read_text().replace(str(whole.parent), str(folder))
    stated.write_text(text.replace(str(weights), str(mine)))
    with pytest.raises(
        UserError, match=r"mine.pth: the weights that .* are not there \(looked for /"
    ):
        load_run(folder / "run")
    params, cfg = rwkv.load(weights)
    rwkv.save(mine, jax.tree.map(lambda x: x * 2, params), cfg)
    with pytest.raises(UserError, match=r"tunes other weights \(.*mine.pth has now"):
        load_run(folder / "run")
    with pytest.raises(UserError, match=r"other weights \(.*choose another train.output"):
        run(folder, mine, text="2", **{"train.steps": 9})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"train.init": ""}, r'tune.method = "lora" tunes a model: name it in train.init'),
        ({"tune.targets": "att.kex"}, "tune.targets: nothing is called 'att.kex'"),
        ({"tune.layers": "2:9"}, "tune.layers = 2:9: the model has layers 0 to 1"),
        ({"tune.layers": "-:"}, "tune.layers = .-:.: two numbers with a colon"),
        ({"tune.method": "full"}, 'tune.rank = 4: has no effect with tune.method = "full"'),
        ({"tune.layers": "2"}, "tune.layers = .2.: two numbers with a colon"),
        ({"tune.targets": ""}, "tune.targets is empty"),
        ({"train.freeze": "blocks.*"}, "leaves nothing to train"),
        ({"tune.method": "dora"}, "tune.method"),
    ],
)
def test_what_cannot_be_tuned(options, message, weights, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "a", weights, **options)


def test_some_layers_and_parameters_besides(weights, tmp_path):
    options = {"tune.layers": "1:", "tune.targets": "*.key", "tune.also": "ln, att.x_k"}
    options |= {"train.freeze": "blocks.*.ffn.key.weight", "tune.base": "float32"}
    params = load_saved(run(tmp_path / "a", weights, **options, **{"train.steps": 3})).params
    changed = {
        path: [float(np.abs(x).max()) > 0 for x in change.up]
        for path, change in params.low_rank.items()
    }
    assert changed == {"blocks.att.key": [False, True], "blocks.ffn.key": [False, False]}
    before, _ = rwkv.load(weights, dtype="float32")
    for path, value in params.whole.items():
        assert (value != tuning.get(before, path)).any(), path


def test_the_best_is_exported(weights, tmp_path, monkeypatch):
    """Here that of step 4, over the last one."""
    monkeypatch.setattr(loop.Best, "add", best_at_4)
    options = {"train.keep_best": "true", "train.eval_every": 4, "train.steps": 6}
    folder = run(tmp_path / "a", weights, **options)
    adapter, _ = rwkv.adapters.load(folder / "adapter", rwkv.load(weights)[1])
    equal(adapter, load_saved(folder / CHECKPOINTS / "4").params)
    assert "what step 4 has tuned" in (tmp_path / "a" / "stdout").read_text()


def best_at_4(best, step, value):
    best.count += 1
    if step == 4:
        best.step, best.value = step, value
    return step == 4


def test_muon_trains_the_factors(weights, whole, tmp_path):
    """As it does matrices: other numbers than AdamW's, of which none is left behind."""
    options = {"optimizer.name": "muon", "train.steps": 2}
    found = load_saved(run(tmp_path / "a", weights, **options)).params
    for path, change in found.low_rank.items():
        rms = float(jnp.sqrt(jnp.mean(jnp.square(change.up))))
        assert 1e-3 < rms < 2e-2, path
        # An orthogonal update: its singular values are alike, those of AdamW's are not.
        values = jnp.linalg.svd(change.up, compute_uv=False)
        assert float(values.min() / values.max()) > 0.1, path


def tuned(mesh, version="7", **tune):
    """Two steps of a model with an adapter."""
    cfg = mesh_config(mesh, version, accumulate=2)
    cfg = dataclasses.replace(cfg, tune=TuneConfig(method="lora", rank=4, **tune))
    made, batches = make_mesh(cfg), loader(cfg)
    params = models.init_params(cfg.model, jax.random.key(4))
    before = jax.tree.map(np.array, params)  # a step donates its state
    state = init_train_state(cfg, params, made)
    step = make_train_step(cfg)
    read = LocalRows(batches, made).read if made else batches.read
    with sharding.use_mesh(made):
        for number in range(2):
            state, metrics = step(state, read(number))
        merged = jax.device_get(state.merged)
    equal(jax.device_get(state.base), before)
    return jax.device_get(metrics), jax.device_get(state.params), merged


@pytest.mark.parametrize(
    "name, version",
    [
        pytest.param(
            name,
            version,
            marks=() if (name, version) == ("data2-fsdp2-tensor2", "7") else [pytest.mark.slow],
        )
        for name in MESHES
        for version in ("4", "6", "7")
    ],
)
def test_a_step_is_that_of_one_device(name, version):
    also = ["ln"]
    found, wanted = (tuned(mesh, version, also=also) for mesh in (MESHES[name], MeshConfig(fsdp=1)))
    assert found[0].loss == pytest.approx(wanted[0].loss, rel=1e-5)
    for one, other in zip(*map(jax.tree.leaves, (found[1:], wanted[1:])), strict=True):
        assert relative_rms(one, other) < MODEL_RMS
