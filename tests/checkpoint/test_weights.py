"""Formats read and written with the same numbers; types, sharding, and one line for each error."""

import errno
import functools
import json
import os
import pickle
import re
import zipfile
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from official_weights import VERSIONS, checkpoint

import rwkv_jax
from rwkv_jax import models
from rwkv_jax.checkpoint import files, keymaps, weights
from rwkv_jax.checkpoint.files import Deferred
from rwkv_jax.checkpoint.pth import write_pth
from rwkv_jax.checkpoint.safetensors import write_safetensors
from rwkv_jax.errors import Remark, UserError

RANKS = (6, 5, 4, 7, 3)


@functools.cache
def tensors(version, **options):
    return checkpoint(version, layers=2, ffn=96, ranks=RANKS, **options)


def same(found, expected):
    """Names, types and bits."""
    assert set(found) == set(expected)
    for name, x in expected.items():
        assert found[name].dtype == x.dtype, name
        assert np.array_equal(np.asarray(found[name]), x), name


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "dtype",
    ["bfloat16", *(pytest.param(x, marks=pytest.mark.slow) for x in ("float32", "float16"))],
)
def test_in_out_in_again(tmp_path, version, suffix, dtype):
    """Through parameters, in every type: identical tensors, plus the unused ones of version 7."""
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    given = {name: x.astype(kind) for name, x in tensors(version).items()}
    weights.write(tmp_path / f"given{suffix}", given)
    params, cfg = rwkv_jax.load(tmp_path / f"given{suffix}")
    assert {x.dtype for x in jax.tree.leaves(params)} == {kind}
    rwkv_jax.save(tmp_path / f"saved{suffix}", params, cfg)
    saved = weights.read(tmp_path / f"saved{suffix}").tensors
    same({name: x for name, x in saved.items() if name in given}, given)
    assert all(keymaps.optional(name) for name in set(saved) - set(given))
    again, again_cfg = rwkv_jax.load(tmp_path / f"saved{suffix}")
    assert again_cfg == cfg
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(params)))
    rwkv_jax.save(tmp_path / f"again{suffix}", again, cfg)
    assert (tmp_path / f"again{suffix}").read_bytes() == (tmp_path / f"saved{suffix}").read_bytes()


def test_types_can_be_asked_for(tmp_path):
    weights.write(tmp_path / "m.pth", tensors("7"), dtype=ml_dtypes.bfloat16)
    params, cfg = rwkv_jax.load(tmp_path / "m.pth", dtype=jnp.float32)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
    rwkv_jax.save(tmp_path / "n.safetensors", params, cfg, dtype=jnp.bfloat16)
    back = weights.read(tmp_path / "n.safetensors").tensors
    same({name: back[name] for name in tensors("7")}, weights.read(tmp_path / "m.pth").tensors)


@pytest.mark.parametrize("layers", [1, 5])
@pytest.mark.parametrize("head", [16, 32, 64])
def test_sizes_are_read_from_shapes(head, layers):
    given = checkpoint("7", layers=layers, width=64, head=head, vocab=300, ranks=(9, 3, 8, 11))
    cfg = keymaps.check(given)
    rank_v = 8 if layers > 1 else 0
    assert (cfg.layers, cfg.head_size, cfg.vocab_size) == (layers, head, 300)
    assert (cfg.rank_w, cfg.rank_a, cfg.rank_v, cfg.rank_g) == (9, 3, rank_v, 11)
    for version in ("5.0", "5.1", "5.2", "6"):
        cfg = keymaps.check(checkpoint(version, layers=layers, width=64, head=head))
        assert (cfg.version, cfg.layers, cfg.head_size) == (version, layers, head)


def test_one_head_differs_from_one_decay_per_head():
    """Version 5.1's [h] and 5.2's [h, n], with a single head."""
    for version in ("5.1", "5.2"):
        assert keymaps.config_of(checkpoint(version, width=16, head=16)).version == version


@pytest.mark.parametrize("version", ["4", "7"])
def test_a_hugging_face_folder(tmp_path, version):
    given = checkpoint(version, width=128, head=64, ranks=RANKS)
    params, cfg = keymaps.from_official(given)
    rwkv_jax.save(tmp_path / "hf", params, cfg)
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    same(weights.read(tmp_path / "hf").tensors, given)
    # The file alone is enough, as its config lies beside it.
    same(weights.read(tmp_path / "hf" / "model.safetensors").tensors, given)
    assert rwkv_jax.load(tmp_path / "hf")[1] == cfg
    with pytest.raises(UserError, match="not empty"):
        rwkv_jax.save(tmp_path / "hf", params, cfg)


def test_prefixes_and_nested_state_dicts(tmp_path):
    given = {f"_forward_module.{name}": x for name, x in tensors("6").items()}
    write_pth(tmp_path / "deepspeed.pth", given)
    _, cfg = rwkv_jax.load(tmp_path / "deepspeed.pth")
    assert cfg.version == "6"


def test_parameters_are_sharded_as_asked(tmp_path):
    """Across eight devices, each holding its shard."""
    write_safetensors(tmp_path / "m.safetensors", tensors("7"))
    expected, cfg = rwkv_jax.load(tmp_path / "m.safetensors")
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(x):
        axis = next((i for i, n in enumerate(x.shape) if i and n % 8 == 0), None)
        spec = [None] * x.ndim
        if axis is not None:
            spec[axis] = "fsdp"
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    places = jax.tree.map(place, models.abstract_params(cfg))
    params, _ = rwkv_jax.load(tmp_path / "m.safetensors", sharding=places)
    assert jax.tree.map(lambda x: x.sharding, params) == places
    assert params.blocks.att.key.addressable_shards[3].data.shape == (2, 4, 32)
    assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(expected)))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[5])
    params, _ = rwkv_jax.load(tmp_path / "m.safetensors", sharding=one)
    assert {x.sharding for x in jax.tree.leaves(params)} == {one}


@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (513, 256), (2, 3, 5), (7,), ()])
@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16])
def test_copies_in_c_order(shape, dtype):
    """Of a transposed array, part of one, and one in order."""
    values = np.random.default_rng(0).normal(size=shape).astype(dtype)
    for x in (values, values.T, values.T[1:, ::2] if values.ndim == 2 else values):
        copy = files.c_order(x)
        assert copy.flags.c_contiguous and copy.dtype == x.dtype and copy.shape == x.shape
        assert np.array_equal(copy, x)


def test_large_parameters_layer_by_layer(tmp_path, monkeypatch):
    expected, _ = keymaps.from_official(tensors("7"))
    monkeypatch.setattr(keymaps, "LARGE", 0)
    params, _ = keymaps.from_official(tensors("7"))
    assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(expected)))


def test_tensors_are_read_one_at_a_time(tmp_path):
    """Deferred tensors are computed when they are written, and once."""
    asked = []

    def deferred(name, x):
        def make():
            asked.append(name)
            return x

        return Deferred(x.shape, x.dtype, make)

    given = {name: deferred(name, x) for name, x in tensors("5.2").items()}
    keymaps.check(given)
    assert not asked
    weights.write(tmp_path / "m.pth", given)
    assert sorted(asked) == sorted(given)
    same(weights.read(tmp_path / "m.pth").tensors, tensors("5.2"))


BROKEN = {
    "missing": (
        lambda t: drop(t, "blocks.1.att.key.weight"),
        r"blocks\.1\.att\.key\.weight is mis",
    ),
    "extra": (
        lambda t: t | {"blocks.0.att.odd": t["emb.weight"]},
        r"blocks\.0\.att\.odd is not a par",
    ),
    "misshapen": (
        lambda t: t | {"blocks.1.ffn.key.weight": t["blocks.1.ffn.key.weight"][:, 1:]},
        r"blocks\.1\.ffn\.key\.weight has shape \[96, 31\], not \[96, 32\]",
    ),
    "integers": (
        lambda t: t | {"head.weight": t["head.weight"].astype(np.int8)},
        r"head\.weight has the type int8; only 16, 32",
    ),
    "no model": (lambda t: {"weight": t["emb.weight"]}, r"not an RWKV checkpoint"),
    "only a state": (
        lambda t: {"blocks.0.att.time_state": t["blocks.0.att.time_state"]},
        r"tuned states and no model",
    ),
    "another kind": (
        lambda t: t | {"blocks.0.rosa.x_q": t["emb.weight"]},
        r"an RWKV-8 ROSA model; this release reads versions 4 to 7a",
    ),
    "a row of embeddings": (
        lambda t: t | {"emb.weight": t["emb.weight"][0]},
        r"emb\.weight has the impossible shape \[32\]; take",
    ),
    "flat": (
        lambda t: t | {"blocks.1.att.time_maa_w2": t["blocks.1.att.time_maa_w2"].ravel()},
        r"blocks\.1\.att\.time_maa_w2 has the impossible shape \[960\]; take",
    ),
    "no number": (
        lambda t: t | {"blocks.x.att.k": t["emb.weight"]},
        r"blocks\.x\.att\.k is not a par",
    ),
    "far away": (
        lambda t: t | {"blocks.9999999.att.k": t["emb.weight"]},
        r"blocks\.9999999\.att\.k exists, but layers 2 to 9999998 are missing",
    ),
    "no ffn": (lambda t: drop(t, "blocks.0.ffn.key.weight"), r"blocks\.0\.ffn\.key\.weight"),
}


def drop(tensors, name):
    return {key: x for key, x in tensors.items() if key != name}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_named_in_one_line(tmp_path, case, suffix):
    change, message = BROKEN[case]
    path = tmp_path / f"broken{suffix}"
    weights.write(path, change(tensors("6", tuned=True)))
    with pytest.raises(UserError, match=message) as caught:
        rwkv_jax.load(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert ";" in str(caught.value)  # and the remedy


def test_names_that_no_file_has():
    for name, message in (
        ("", "no file can be called ''"),
        ("a\0b", r"no file can be called 'a\x00b'"),
        ("a\nb.pth", r"a\nb.pth: cannot be read"),
    ):
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            rwkv_jax.load(name)
        assert str(caught.value).isprintable()


def test_shardings_that_do_not_fit(tmp_path):
    write_pth(tmp_path / "m.pth", tensors("7"))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    for wrong in spec, jax.devices()[0], {}, lambda x: x:
        with pytest.raises(
            ValueError, match=r"sharding must be a jax\.sharding\.Sharding or a Model"
        ):
            rwkv_jax.load(tmp_path / "m.pth", sharding=wrong)
    with pytest.raises(UserError, match=r"does not divide over the sharding NamedSharding"):
        rwkv_jax.load(tmp_path / "m.pth", sharding=jax.sharding.NamedSharding(mesh, spec))


def test_files_that_are_not_weights(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_pth(tmp_path / "whole.pth", tensors("4"))
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    with zipfile.ZipFile(tmp_path / "photos.pth", "w") as archive:
        archive.writestr("a.txt", "hello")
    for name in ("one.pth", "two.pth"):
        (folder / name).write_bytes(whole)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("hello")
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text("{")
    for path, message in {
        "absent.pth": "cannot be read",
        "half.pth": "truncated|download it again",
        "photos.pth": "data.pkl",
        "text.safetensors": "safetensors",
        "folder": r"several models \(one\.pth, two\.pth\); name one",
        "empty": "neither a run nor a folder with weights; name a file",
        "hf": r"config\.json: cannot be read",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            rwkv_jax.load(tmp_path / path)
        assert str(tmp_path / path) in str(caught.value) and "\n" not in str(caught.value)
    params, cfg = rwkv_jax.load(tmp_path / "whole.pth")
    with pytest.raises(UserError, match=r"\.onnx is not a format"):
        rwkv_jax.save(tmp_path / "m.onnx", params, cfg)
    with pytest.raises(UserError, match="cannot be written as a Hugging Face folder"):
        rwkv_jax.save(tmp_path / "new", *keymaps.from_official(tensors("6")))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("call", ["is_dir", "open"])
def test_an_unreadable_file_is_named(tmp_path, monkeypatch, call):
    """A folder without permission, and a file without."""
    weights.write(tmp_path / "m.pth", tensors("4"))

    def barred(path, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(type(tmp_path), call, barred)
    with pytest.raises(UserError, match=r"m\.pth: cannot be read \(Permission denied\); name"):
        rwkv_jax.load(tmp_path / "m.pth")


def test_only_regular_files_are_replaced(tmp_path):
    """A pipe, or a device such as /dev/full."""
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(UserError, match=r"pipe\.pth: not a regular file"):
        weights.write(tmp_path / "pipe.pth", tensors("4"))
    assert (tmp_path / "pipe.pth").is_fifo()


def test_loading_runs_nothing(tmp_path):
    class Trap:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'sprung')!r}, 'w')",))

    with zipfile.ZipFile(tmp_path / "trap.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"emb.weight": Trap()}))
        archive.writestr("archive/version", "3\n")
    with pytest.raises(UserError, match=r"builtins\.exec"):
        rwkv_jax.load(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


def test_the_tokenizer_is_found(tmp_path):
    """By the vocabulary's size, or beside the weights; one that does not fit is refused."""
    world = checkpoint("4", layers=1, width=8, vocab=65536)
    weights.write(tmp_path / "world.pth", world, dtype=np.float16)
    _, _, tokenizer = weights.load_with_tokenizer(tmp_path / "world.pth")
    assert tokenizer.kind == "world"
    sizes = "--tokenizer bytes has 257 tokens, but the model has 65,536 embeddings"
    with pytest.warns(Remark, match=sizes):  # a named one may have any padding
        _, _, tokenizer = weights.load_with_tokenizer(tmp_path / "world.pth", "bytes")
    assert tokenizer.kind == "bytes"
    weights.write(tmp_path / "small.pth", checkpoint("4", layers=1, width=8, vocab=256))
    with pytest.raises(UserError, match=r"small\.pth: --tokenizer bytes has 257 .* not belong"):
        weights.load_with_tokenizer(tmp_path / "small.pth", "bytes")
    for vocab, message in ((50277, "the Pile's"), (300, "no known vocabulary has 300 tokens")):
        weights.write(tmp_path / "other.pth", checkpoint("4", layers=1, width=8, vocab=vocab))
        with pytest.raises(UserError, match=f"{message}.*--tokenizer"):
            weights.load_with_tokenizer(tmp_path / "other.pth")
    _, _, tokenizer = weights.load_with_tokenizer(tmp_path / "other.pth", "bytes")
    assert tokenizer.kind == "bytes"
    with pytest.raises(UserError, match="--tokenizer nowhere: no such file"):
        weights.load_with_tokenizer(tmp_path / "other.pth", "nowhere")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "none"}))
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer\.json"):
        weights.load_with_tokenizer(tmp_path / "other.pth")


@pytest.mark.parametrize(
    "change",
    [{"layers": 3}, {"layers": 1}, {"width": 64}, {"vocab_size": 300}],
    ids=str,
)
def test_parameters_are_saved_with_their_own_config(tmp_path, change):
    """JAX would use the last layer for missing ones."""
    params, cfg = keymaps.from_official(tensors("7"))
    with pytest.raises(ValueError, match=r"^params\.\S+ is .*: give the cfg of these params"):
        rwkv_jax.save(tmp_path / "m.pth", params, replace(cfg, **change))
    with pytest.raises(ValueError, match=r"give rwkv_jax\.stack"):
        rwkv_jax.save(tmp_path / "m.pth", rwkv_jax.unstack(params), cfg)
    assert not list(tmp_path.iterdir())


def test_only_floating_types_can_be_asked_for(tmp_path):
    params, cfg = keymaps.from_official(tensors("7"))
    weights.write(tmp_path / "m.pth", tensors("7"))
    for dtype in ("int8", "float8_e4m3fn", "complex64", "letters"):
        message = f"dtype = {dtype}: weights can be float16, "
        with pytest.raises(ValueError, match=message):
            rwkv_jax.save(tmp_path / "n.pth", params, cfg, dtype=dtype)
        with pytest.raises(ValueError, match=message):
            rwkv_jax.load(tmp_path / "m.pth", dtype=dtype)
    with pytest.raises(ValueError, match="dtype = int8"):
        rwkv_jax.save(tmp_path / "n.pth", jax.tree.map(lambda x: x.astype("int8"), params), cfg)
    assert not (tmp_path / "n.pth").exists()


@pytest.mark.parametrize("suffix", ["", ".pth", ".safetensors"])
def test_numbers_too_large_for_a_type_are_refused(tmp_path, suffix):
    """Naming the tensor; existing infinity and NaN stay."""
    given = checkpoint("4", layers=2)
    given["blocks.1.att.key.weight"][2, 3:5] = 7e4, -7e4
    path, out = tmp_path / "m.pth", tmp_path / f"out{suffix}"
    weights.write(path, given)
    message = (
        r"blocks\.1\.att\.key\.weight has 2 numbers too large for float16, .* 65504; take bfloat16"
    )
    with pytest.raises(UserError, match=f"^{path}: {message}"):
        rwkv_jax.load(path, dtype="float16")
    with pytest.raises(UserError, match=f"^{out}: {message}"):
        weights.write(out, given, dtype="float16")
    with pytest.raises(UserError, match=f"^{out}: {message}"):
        rwkv_jax.save(out, *rwkv_jax.load(path), dtype=jnp.float16)
    assert {x.name for x in tmp_path.iterdir()} == {"m.pth"}
    given["blocks.1.att.key.weight"][2, 3:6] = np.inf, -np.inf, np.nan
    weights.write(out, given, dtype="float16")
    params, _ = rwkv_jax.load(out, dtype="bfloat16")
    found = np.asarray(params.blocks.att.key[1, 3:6, 2], np.float32)
    np.testing.assert_array_equal(found, [np.inf, -np.inf, np.nan])


def test_float64_is_read_without_a_warning(tmp_path):
    """A warning would be an error here: JAX has float64 only if it is enabled."""
    given = tensors("5.2")
    weights.write(tmp_path / "m.pth", given | {"emb.weight": given["emb.weight"].astype("f8")})
    params, _ = rwkv_jax.load(tmp_path / "m.pth")
    assert params.emb.dtype == np.float32 and np.array_equal(params.emb, given["emb.weight"])
    params, _ = rwkv_jax.load(tmp_path / "m.pth", dtype="float64")
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
