"""The data of a run: text, binidx pairs, and mixtures."""

import json

import numpy as np
import pytest

from rwkv_jax.config import DataConfig
from rwkv_jax.data import tokens
from rwkv_jax.data.binidx import BinidxWriter
from rwkv_jax.data.files import CorpusError
from rwkv_jax.data.sources import open_data
from rwkv_jax.data.tokenizers import ByteTokenizer

DOCUMENTS = [b"one", b"", b"three and more", b"4", b"five five"]


@pytest.fixture
def pair(tmp_path):
    def write(name="pair", documents=DOCUMENTS, dtype=np.uint16):
        with BinidxWriter(tmp_path / name, dtype) as writer:
            for text in documents:
                writer.add(ByteTokenizer().encode(text.decode()), [0])
        return tmp_path / name

    return write


def config(tmp_path, **settings):
    base = {"tokenizer": "bytes", "heldout": 0.0, "cache": str(tmp_path / "cache")}
    return DataConfig(**base | settings)


@pytest.mark.parametrize("ending", ["", ".bin", ".idx"])
def test_a_pair_is_read_as_it_is(tmp_path, pair, ending):
    data = open_data(config(tmp_path, source=f"{pair()}{ending}", heldout=0.4), progress=False)
    (stream,) = data.streams
    text = data.tokenizer.decode_bytes(stream.ids)
    assert text == b"".join(DOCUMENTS[:3]) and isinstance(stream.ids, np.memmap)
    assert stream.starts.tolist() == [0, 4, 5, 20]
    assert data.heldout_text() == b"".join(DOCUMENTS[3:])
    assert [text.encode() for text in data.heldout_documents()] == DOCUMENTS[3:]
    assert data.heldout_bytes == len(data.heldout_text()) and data.train_tokens == 20
    assert data.bytes_per_token == len(text) / 20
    assert "3 documents" in data.describe()["training"]
    assert "2 documents" in data.describe()["held out"]


def test_all_of_a_pair_is_trained_on_when_nothing_is_held_out(tmp_path, pair):
    data = open_data(config(tmp_path, source=str(pair())), progress=False)
    assert data.train_tokens == sum(map(len, DOCUMENTS)) + len(DOCUMENTS)
    assert len(data.heldout) == data.heldout_bytes == 0


def test_long_pairs_are_sampled(tmp_path, pair, monkeypatch):
    path = pair(documents=[b"ab" * 500] * 40)
    exact = open_data(config(tmp_path, source=str(path)), progress=False)
    monkeypatch.setattr(tokens, "SAMPLED_TOKENS", 6400)
    some = open_data(config(tmp_path, source=str(path)), progress=False)
    assert some.bytes_per_token == pytest.approx(exact.bytes_per_token, rel=1e-2)
    other = pair("other", documents=[b"ab" * 500] * 39 + [b"x" * 1000])
    assert open_data(config(tmp_path, source=str(other)), progress=False).digest != some.digest


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"tokenizer": "bpe"}, "holds tokens, not text: name the tokenizer"),
        ({"train_on": "answers"}, "does not say who speaks"),
        ({"heldout": 0.01}, "holds out 0 of the 5 documents"),
    ],
)
def test_settings_that_a_pair_cannot_have(tmp_path, pair, settings, message):
    with pytest.raises(CorpusError, match=message):
        open_data(config(tmp_path, source=str(pair()), **settings), progress=False)


def test_ids_of_another_vocabulary(tmp_path, pair):
    path = pair(dtype=np.int32)
    for value in (300, -1):
        ids = np.fromfile(f"{path}.bin", np.int32)
        ids[7] = value
        ids.tofile(f"{path}.bin")
        message = rf"pair.bin: token 7 is {value}, but data.tokenizer \(bytes\) has 257 ids"
        with pytest.raises(CorpusError, match=message):
            open_data(config(tmp_path, source=str(path)), progress=False)


def test_ids_in_places_that_are_not_sampled(tmp_path, pair, monkeypatch):
    """A long pair opens; held-out documents are checked whole."""
    monkeypatch.setattr(tokens, "SAMPLED_TOKENS", 640)
    path = pair(documents=[b"a" * 100] * 40)
    ids = np.fromfile(f"{path}.bin", np.uint16)
    for place, opens in ((2100, True), (4000, False)):
        wrong = ids.copy()
        wrong[place] = 60_000
        wrong.tofile(f"{path}.bin")
        cfg = config(tmp_path, source=str(path), heldout=0.1)
        if opens:
            assert open_data(cfg, progress=False).train_tokens == 36 * 101
        else:
            with pytest.raises(CorpusError, match=r"pair.bin: token 4,000 is 60,000"):
                open_data(cfg, progress=False)


def test_a_pair_that_was_made_with_another_tokenizer(tmp_path, pair):
    path = pair()
    path.with_name("pair.json").write_text(json.dumps({"tokenizer": "world 123"}))
    with pytest.raises(CorpusError, match=r"pair.json says that pair.bin was made with world 123"):
        open_data(config(tmp_path, source=str(path)), progress=False)
    path.with_name("pair.json").write_text(json.dumps({"tokenizer": "bytes"}))
    open_data(config(tmp_path, source=str(path)), progress=False)


def test_a_pair_without_tokens(tmp_path, pair):
    with pytest.raises(CorpusError, match=r"pair.bin: no tokens in it"):
        open_data(config(tmp_path, source=str(pair(documents=[]))), progress=False)


def test_a_mixture_of_text_and_a_pair(tmp_path, pair):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(50)))
    cfg = config(tmp_path, mixture={str(text): 3.0, str(pair()): 1.0}, heldout=0.4)
    data = open_data(cfg, progress=False)
    assert [stream.weight for stream in data.streams] == [3.0, 1.0]
    first, second = data.sources.values()
    assert data.heldout_text() == first.heldout_text() + second.heldout_text()
    assert (data.heldout == np.concatenate([first.heldout, second.heldout])).all()
    assert data.heldout_bytes == len(data.heldout_text())
    rates = [x.train_bytes / len(x.train) for x in (first, second)]
    assert data.bytes_per_token == pytest.approx(0.75 * rates[0] + 0.25 * rates[1])
    assert data.digest not in (first.digest, second.digest)
    described = data.describe()
    assert described[str(text)].startswith("75.0% of the samples; ")
    assert described["tokenizer"].startswith("bytes")
