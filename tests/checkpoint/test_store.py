"""Checkpoints are restored bit-exactly, damage is reported, and a run is read as a whole."""

import contextlib
import dataclasses
import errno
import json
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax import models
from rwkv_jax.checkpoint.store import Store, StoreError, sweep
from rwkv_jax.checkpoint.weights import load, load_run
from rwkv_jax.config import Config, ModelConfig
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.errors import UserError
from rwkv_jax.toml import to_toml
from rwkv_jax.training.state import (
    TrainState,
    abstract_train_state,
    init_train_state,
    to_trees,
)

CFG = Config(model=ModelConfig(version="4", layers=1, width=16, vocab_size=257))
META = {"model": dataclasses.asdict(CFG.model), "tokenizer": ByteTokenizer().identity()}


@pytest.fixture(scope="module")
def state():
    return init_train_state(CFG)


def at(state, step):
    """Another state, that differs everywhere."""
    return jax.tree.map(lambda x: x + step, state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, state):
    """A run's folder with checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.toml").write_text(to_toml(CFG))
    ByteTokenizer().save(folder / "tokenizer")
    with contextlib.closing(Store(folder / "checkpoints", keep=2)) as store:
        for step in (1, 2):
            store.save(step, to_trees(at(state, step)), META)
    return folder


@pytest.fixture
def run(tmp_path, saved):
    """A copy of it."""
    return shutil.copytree(saved, tmp_path / "run")


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_keeps_the_newest_and_restores_them_bit_for_bit(tmp_path, state):
    abstract = to_trees(abstract_train_state(CFG))
    with contextlib.closing(Store(tmp_path, keep=2)) as store:
        assert store.latest() is None
        for step in (3, 5, 9):
            store.save(step, to_trees(at(state, step)), {**META, "window": [[0.1, 1 / 3]]})
        store.wait()
        assert store.latest() == 9
        assert_same(store.restore(abstract, 5), to_trees(at(state, 5)))
    with contextlib.closing(Store(tmp_path, keep=2)) as store:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "9"]
        assert_same(store.restore(abstract, 9), to_trees(at(state, 9)))
        assert store.meta(9)["window"] == [[0.1, 1 / 3]]


def test_what_is_saved_is_the_state_at_the_call(tmp_path, monkeypatch):
    """The next step overwrites donated buffers, and appends to lists, while the save still runs."""
    big = TrainState(jnp.zeros((), jnp.int32), {"w": jnp.ones((512, 1024))}, jnp.zeros(4))
    abstract = {"params": {"w": jax.ShapeDtypeStruct((512, 1024), jnp.float32)}}
    bump = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    losses, dumps = [], json.dumps
    monkeypatch.setattr(json, "dumps", lambda *args, **how: time.sleep(0.1) or dumps(*args, **how))
    with contextlib.closing(Store(tmp_path, keep=9)) as store:
        for step in range(4):
            store.save(step, to_trees(big), {"losses": losses})
            losses.append(step)
            for _ in range(10):
                big = bump(big)
        for step in range(4):
            assert store.meta(step)["losses"] == list(range(step))
            found = store.restore(abstract, step)["params"]["w"]
            np.testing.assert_array_equal(found, np.full((512, 1024), 10.0 * step + 1))


def test_an_interrupted_save_is_not_there_and_is_swept_up(run, state):
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / "2", checkpoints / "7.orbax-checkpoint-tmp")
    with contextlib.closing(Store(checkpoints, keep=2)) as store:
        assert store.latest() == 2
    sweep(checkpoints)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["1", "2"]
    params, _, _ = load_run(run)
    assert_same(params, at(state, 2).params)


@pytest.mark.parametrize("damage", ["truncate", "remove", "empty"])
def test_a_damaged_checkpoint_names_itself_and_the_remedy(run, state, damage):
    data = [path for path in (run / "checkpoints" / "2" / "params").rglob("*") if path.is_file()]
    largest = max(data, key=lambda path: path.stat().st_size)
    if damage == "truncate":
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    elif damage == "remove":
        largest.unlink()
    else:
        largest.write_bytes(b"")
    for read in (
        lambda: load_run(run),
        lambda: _restore(run, abstract_train_state(CFG)),
    ):
        with pytest.raises(StoreError, match=r"checkpoints/2: damaged .* move it away") as e:
            read()
        assert "\n" not in str(e.value)
    shutil.rmtree(run / "checkpoints" / "2")
    assert_same(load(run)[0], at(state, 1).params)


def _restore(run, abstract):
    with contextlib.closing(Store(run / "checkpoints")) as store:
        return store.restore(to_trees(abstract), store.latest())


FULL = (
    OSError(errno.ENOSPC, "No space left on device"),
    # As the library that writes the arrays words it.
    ValueError("RESOURCE_EXHAUSTED: Error writing ... No space left on device"),
    ValueError("RESOURCE_EXHAUSTED: Error writing ... [os_error_code='28']"),
)


def test_a_state_of_another_shape_is_refused(run):
    wider = dataclasses.replace(CFG, model=dataclasses.replace(CFG.model, width=32))
    with pytest.raises(StoreError, match="damaged or of another shape"):
        _restore(run, abstract_train_state(wider))


@pytest.mark.parametrize("error", FULL)
def test_a_full_disk_is_one_line_and_leaves_the_others(run, state, error, monkeypatch):
    def full(*_, **__):
        raise error

    with (
        contextlib.closing(Store(run / "checkpoints", keep=2)) as store,
        monkeypatch.context() as patch,
    ):
        patch.setattr(store._manager, "save", full)
        with pytest.raises(StoreError, match="No space left on device; free some space"):
            store.save(3, to_trees(state), META)
    assert_same(load(run)[0], at(state, 2).params)


def test_load_run_gives_parameters_model_and_tokenizer(run, state):
    params, cfg, tokenizer = load_run(str(run))
    assert cfg == CFG.model
    assert_same(params, at(state, 2).params)
    assert tokenizer.decode_bytes(tokenizer.encode("x = 1")) == b"x = 1"
    logits, _ = models.forward(params, jnp.asarray([[1, 2, 3]], jnp.int32), cfg=cfg)
    assert jnp.all(jnp.isfinite(logits))


def test_sampling_does_not_read_the_optimizer(run):
    shutil.rmtree(run / "checkpoints" / "2" / "rest")
    load_run(run)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "spoil, expected",
    [
        (lambda run: shutil.rmtree(run), "no such folder"),
        (lambda run: (run / "config.toml").unlink(), "holds no run"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "has no checkpoint yet"),
        (
            lambda run: [shutil.rmtree(p) for p in (run / "checkpoints").iterdir()],
            "has no checkpoint yet",
        ),
        (
            lambda run: edit(run / "config.toml", "layers", "depth"),
            "of another version of rwkv_jax",
        ),
        (
            lambda run: edit(run / "config.toml", "width = 16", "width = 32"),
            "model.width = 32, but the checkpoint was made with 16",
        ),
        (lambda run: shutil.rmtree(run / "tokenizer"), "tokenizer"),
        (
            lambda run: edit(
                run / "checkpoints" / "2" / "meta" / "metadata",
                json.dumps("bytes"),
                json.dumps("bpe 0123"),
            ),
            "is not the tokenizer of the checkpoint, bpe 0123",
        ),
    ],
)
def test_a_run_that_cannot_be_read_says_why_in_one_line(run, spoil, expected):
    spoil(run)
    with pytest.raises(UserError) as caught:
        load_run(run)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
