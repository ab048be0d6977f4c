"""Models in several files: found by any one of them, by their index, or by their folder."""

import json

import numpy as np
import pytest

from rwkv_jax.checkpoint.errors import WeightsError
from rwkv_jax.checkpoint.pth import write_pth
from rwkv_jax.checkpoint.safetensors import write_safetensors
from rwkv_jax.checkpoint.shards import models_in, read_model

INDEX = "model.safetensors.index.json"
BOTH = {"x": np.ones(2), "y": np.zeros(3)}


def fault(call, *arguments):
    with pytest.raises(WeightsError) as caught:
        call(*arguments)
    assert str(caught.value).isprintable()
    return str(caught.value)


def write(path):
    """Writes x into a first shard and y into a second; `path` has {} in place of the numbers."""
    write_one = write_safetensors if path.suffix == ".safetensors" else write_pth
    for number, name in enumerate(BOTH, 1):
        write_one(path.with_name(path.name.format(number)), {name: BOTH[name]})


def index(folder, places, name=INDEX):
    content = {"metadata": {"total_size": 40}, "weight_map": places}
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def sharded(tmp_path):
    write(tmp_path / "a-{}.safetensors")
    index(tmp_path, {"x": "a-1.safetensors", "y": "a-2.safetensors"})
    return tmp_path


@pytest.mark.parametrize(
    "shards, listed",
    [
        ("a-{}.safetensors", INDEX),
        ("model-0000{}-of-00002.safetensors", INDEX),
        ("model-0000{}-of-00002.safetensors", ""),
        ("model.fp16-0000{}-of-00002.safetensors", "model.safetensors.index.fp16.json"),
        ("model-0000{}-of-00002.fp16.safetensors", ""),
        ("pytorch_model-0000{}-of-00002.bin", "pytorch_model.bin.index.json"),
        ("rwkv-7-world-{}-of-2.pth", ""),
    ],
)
def test_any_file_stands_for_the_model(shards, listed, tmp_path):
    write(tmp_path / shards)
    if listed:
        index(tmp_path, {name: shards.format(i) for i, name in enumerate(BOTH, 1)}, listed)
    (tmp_path / "optimizer.pt").write_bytes(b"not read")
    (first,) = models_in(tmp_path)
    names = [shards.format(i) for i in (1, 2)] if "-of-" in shards else []
    for path in (first, *(tmp_path / name for name in (*names, listed) if name)):
        found = read_model(path)
        assert found.keys() == BOTH.keys()
        assert all(np.array_equal(found[name], x) for name, x in BOTH.items())


def test_a_missing_shard_is_named(tmp_path):
    write(tmp_path / "m-0000{}-of-00003.bin")
    for number in (1, 2):
        message = fault(read_model, tmp_path / f"m-0000{number}-of-00003.bin")
        assert "is one of 3 shards, and m-00003-of-00003.bin is missing" in message


def test_a_tensor_in_two_shards_is_an_error(tmp_path):
    for number in (1, 2):
        write_pth(tmp_path / f"m-{number}-of-2.bin", {"x": np.ones(2)})
    assert "m-2-of-2.bin: x is in another shard too" in fault(read_model, tmp_path / "m-1-of-2.bin")


def test_models_in_a_folder_are_in_the_order_of_the_libraries(tmp_path):
    write(tmp_path / "a-{}.safetensors")
    (tmp_path / "a-1.safetensors").rename(tmp_path / "z.safetensors")
    (tmp_path / "a-2.safetensors").rename(tmp_path / "b.pth")
    names = ["pytorch_model.bin.index.json", "pytorch_model.bin", INDEX, "model.safetensors"]
    assert [x.name for x in models_in(tmp_path)] == ["z.safetensors", "b.pth"]
    for count, name in enumerate(names, 1):
        (tmp_path / name).touch()
        assert [x.name for x in models_in(tmp_path)] == names[:count][::-1]


@pytest.mark.parametrize(
    "shard",
    ["../a-1.safetensors", "/etc/passwd", "..", "", ".hidden", "b/c", "b\nc", "c:\\d", 3, None],
)
def test_a_shard_cannot_be_outside_its_folder(shard, sharded):
    index(sharded, {"x": shard})
    message = fault(read_model, sharded / INDEX)
    assert f"{INDEX}: x is in " in message
    assert message.endswith("not a file beside it; correct the name")


def test_shards_that_are_not_as_the_index_says(sharded):
    index(sharded, {"x": "a-1.safetensors", "y": "a-1.safetensors"})
    message = fault(read_model, sharded / INDEX)
    assert message == f"{sharded}/a-1.safetensors: does not have y, unlike its index; download both"
    write_safetensors(sharded / "a-1.safetensors", {"x": np.ones(1), "z": np.ones(1)})
    index(sharded, {"x": "a-1.safetensors", "y": "a-2.safetensors"})
    message = fault(read_model, sharded / INDEX)
    assert message.endswith("a-1.safetensors: has z, which its index does not name; download both")


def test_an_index_may_have_a_byte_order_mark(sharded):
    two = {"x": "a-1.safetensors", "y": "a-2.safetensors"}
    (sharded / INDEX).write_text("\ufeff" + json.dumps({"weight_map": two}), encoding="utf-8")
    assert sorted(read_model(sharded / INDEX)) == ["x", "y"]


def test_a_shard_of_an_index_is_missing(sharded):
    (sharded / "a-2.safetensors").unlink()
    index(sharded, {"y": "a-2.safetensors"})
    message = fault(read_model, sharded / INDEX)
    assert message == f"{sharded}/{INDEX}: its shard a-2.safetensors is missing; fetch it"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"a": 1, "a": 2}'])
def test_damaged_indices_are_one_line(content, sharded):
    (sharded / INDEX).write_text(content, encoding="utf-8")
    assert fault(read_model, sharded / INDEX).startswith(f"{sharded}/{INDEX}: ")
