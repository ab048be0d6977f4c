"""Tokenizers: any text comes back, saved ones are the same, broken ones say so."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from rwkv_jax.data.bpe import END_OF_DOCUMENT, train_bpe
from rwkv_jax.data.tokenizers import (
    SHORT,
    ByteTokenizer,
    JsonTokenizer,
    StreamDecoder,
    TextTokenizer,
    TokenizerError,
    WorldTokenizer,
    load_tokenizer,
    open_tokenizer,
    sizes_of,
    text_size,
    world_vocabulary,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "tokenizer_world.json"
SOURCE = Path(json.__file__).with_name("decoder.py").read_text(encoding="utf-8")

# Text as it occurs, and every character there is.
PIECES = [" ", "\n", "\r\n", "\t", "a", "_", "Z", "9", ".", "(", "é", "\u2028", "<|", "中"]
TEXT = st.text(st.characters(exclude_categories=("Cs",))) | st.lists(st.sampled_from(PIECES)).map(
    "".join
)


def metaspace() -> Tokenizer:
    """A vocabulary as SentencePiece makes it: a mark for the space, bytes as a fallback."""
    tokens = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", "a", "\u2581a"]
    model = models.BPE(
        {token: i for i, token in enumerate(tokens)},
        [("\u2581", "a")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    made = Tokenizer(model)
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made.add_special_tokens(["</s>"])
    return made


def words(*extra: str) -> Tokenizer:
    """A vocabulary of whole words."""
    made = Tokenizer(
        models.WordLevel({t: i for i, t in enumerate(["one", "two", *extra])}, unk_token="one")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


@pytest.fixture(scope="module")
def bpe() -> JsonTokenizer:
    return JsonTokenizer(train_bpe([SOURCE], 600).to_str(), "bpe", "test")


@pytest.fixture(scope="module")
def world() -> WorldTokenizer:
    return open_tokenizer("world")


@pytest.fixture(scope="module", params=["bytes", "bpe", "world", "file"])
def tokenizer(request, bpe, world):
    return {
        "bytes": ByteTokenizer(),
        "bpe": bpe,
        "world": world,
        "file": JsonTokenizer(metaspace().to_str(), "file", "test"),
    }[request.param]


@given(text=TEXT)
def test_any_text_comes_back(tokenizer, text):
    if tokenizer.kind == "file":
        text = text.replace("\u2581", "")  # its mark for the space reads as a space
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode_bytes(np.array(ids, np.uint16)) == text.encode()
    assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.eod for i in ids)


@given(texts=st.lists(TEXT, max_size=5))
def test_batches_encode_as_one_by_one(tokenizer, texts):
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@given(text=TEXT, sizes=st.lists(st.integers(0, 3), max_size=20))
def test_stream_gives_the_text_whole_characters_at_a_time(tokenizer, text, sizes):
    if tokenizer.kind == "file":
        text = text.replace("\u2581", "")
    ids, stream, decoded = tokenizer.encode(text), StreamDecoder(tokenizer), ""
    for size in [*sizes, len(ids)]:
        decoded += stream.push(ids[:size])
        ids = ids[size:]
        assert text.startswith(decoded)
    assert decoded == text
    assert stream.finish() == ""


def test_stream_marks_what_is_no_character():
    stream, encode = StreamDecoder(ByteTokenizer()), ByteTokenizer().encode
    assert stream.push(encode("é")[:1]) == ""
    assert stream.push(encode("a")) == "\ufffda"
    assert stream.push(encode("中")[:2]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.push(encode("中")) == "中"


@given(text=TEXT)
def test_end_of_document_decodes_to_nothing(tokenizer, text):
    ids = tokenizer.encode(text)
    with_ends = [tokenizer.eod, *ids, tokenizer.eod]
    assert tokenizer.decode_bytes(with_ends) == tokenizer.decode_bytes(ids)


def test_its_name_in_a_text_is_text(tokenizer):
    text = f"a {END_OF_DOCUMENT}</s> b"
    ids = tokenizer.encode(text)
    assert tokenizer.eod not in ids
    assert tokenizer.decode_bytes(ids) == text.encode()


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    loaded = load_tokenizer(tmp_path / "tokenizer")
    for name in ("kind", "vocab_size", "eod"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    assert loaded.identity() == tokenizer.identity()
    assert loaded.encode(SOURCE) == tokenizer.encode(SOURCE)


def test_identities_differ(bpe, world):
    other = JsonTokenizer(train_bpe([SOURCE], 601).to_str(), "bpe", "test")
    assert len({t.identity() for t in (ByteTokenizer(), bpe, world, other)}) == 4


def test_byte_ids_are_those_of_world(world):
    for byte in range(256):
        assert ByteTokenizer().decode_bytes([byte + 1]) == world.decode_bytes([byte + 1])
    assert ByteTokenizer().encode("\0A\x7f") == world.encode("\0A\x7f")


def test_world_gives_the_official_ids(world):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert len(golden) == 26
    for case in golden:
        assert world.encode(case["text"]) == case["ids"]
        assert world.encode_batch([case["text"]]) == [case["ids"]]
        assert world.decode_bytes(case["ids"]) == case["text"].encode()


def test_world_encodes_long_texts_as_short_ones(world):
    texts = [case["text"] for case in json.loads(GOLDEN.read_text(encoding="utf-8"))]
    long = "".join(texts) * (1 + SHORT // len("".join(texts)))
    assert world.encode(long) == world._short.encode(long.encode())
    assert pickle.loads(pickle.dumps(world)).encode("Hello") == world.encode("Hello")


@given(st.text() | st.text(alphabet=" \n\t\r09aeé中"))
def test_world_encodes_in_python_as_in_rust(text):
    world = open_tokenizer("world")
    assert world._short.encode(text.encode()) == world.encode_batch([text])[0]


def test_every_world_token_is_its_own_bytes(world):
    tokens = [world.decode_bytes([i]) for i in range(1, 65530)]
    assert len(set(tokens)) == 65529
    assert tokens == sorted(tokens, key=lambda token: (len(token), token))
    for i in range(1, 65530, 97):
        if (token := tokens[i - 1]).decode(errors="replace").encode() == token:
            assert world.encode(token.decode()) == [i]
    assert world.decode_bytes([65530, 65535]) == "\ufffd\ufffd".encode()


def test_bpe_has_the_ids_it_promises(bpe):
    assert (bpe.vocab_size, bpe.eod) == (600, 0)
    # The alphabet alone covers any text; a text with few pairs gives few more.
    small = JsonTokenizer(train_bpe(["ab"], 600).to_str(), "bpe", "test")
    assert 257 <= small.vocab_size <= 259


def test_bpe_takes_indentation_as_one_token():
    made = JsonTokenizer(
        train_bpe(["if x:\n        return y\n" * 50] * 20, 512).to_str(), "bpe", ""
    )
    tokens = [made.decode_bytes([i]) for i in made.encode("if x:\n        return y\n")]
    assert b":\n        " in tokens


def test_bpe_training_repeats_itself():
    assert train_bpe([SOURCE], 700).to_str() == train_bpe([SOURCE], 700).to_str()


def test_file_is_encoded_whole_whatever_it_says(bpe, tmp_path):
    made = Tokenizer.from_str(train_bpe([SOURCE], 600).to_str())
    made.enable_truncation(5)
    made.enable_padding(length=50)
    made.save(str(tmp_path / "tokenizer.json"))
    loaded = open_tokenizer(str(tmp_path / "tokenizer.json"))
    assert loaded.encode(SOURCE) == bpe.encode(SOURCE)
    assert loaded.encode_batch(["ab", SOURCE]) == bpe.encode_batch(["ab", SOURCE])
    assert open_tokenizer(str(tmp_path)).identity() == loaded.identity()


def test_vocabularies_of_words_decode_by_their_own_rules():
    made = JsonTokenizer(words("[SEP]").to_str(), "file", "test")
    assert made.decode_bytes([0, 2, 1]) == b"one two"


LETTERS = st.text("abé中", min_size=1, max_size=3)


def of_words(tokens: list[str], variant: bool) -> Tokenizer:
    made = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=tokens[0]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if variant:
        made.decoder = decoders.CTC(pad_token=tokens[0], word_delimiter_token=tokens[-1])
    return made


def of_word_pieces(tokens: list[str], variant: bool) -> Tokenizer:
    tokens = ["[UNK]", *tokens, *(f"##{t}" for t in tokens), ".", ",", "n't", "'s"]
    made = Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=variant)
    return made


def of_ends_of_words(tokens: list[str], variant: bool) -> Tokenizer:
    tokens = [*tokens, *(f"{t}</w>" for t in tokens)]
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token=tokens[0]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.BPEDecoder("</w>")
    return made


def of_sentence_pieces(tokens: list[str], variant: bool) -> Tokenizer:
    marked = ["<unk>", "\u2581", *tokens, *(f"\u2581{t}" for t in tokens)]
    made = Tokenizer(models.Unigram([(t, -1.0 - i) for i, t in enumerate(marked)], 0, False))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if variant else "never")
    made.decoder = decoders.Metaspace(prepend_scheme="first" if variant else "never")
    return made


def of_bytes_as_fallback(tokens: list[str], variant: bool) -> Tokenizer:
    """As Llama's, which puts a space before a text and strips it."""
    made = metaspace()
    if variant:
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        made.normalizer = normalizers.Sequence(steps)
        made.decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    return made


def of_byte_level(tokens: list[str], variant: bool) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=variant)
    made.decoder = decoders.ByteLevel()
    return made


KINDS = [of_words, of_word_pieces, of_ends_of_words, of_sentence_pieces, of_byte_level]


@st.composite
def tokenizers_and_ids(draw):
    """A `tokenizer.json` of any kind, and ids: of all sorts, or where tokens are single bytes those
    of some texts."""
    make = draw(st.sampled_from([*KINDS, of_bytes_as_fallback]))
    tokens = draw(st.lists(LETTERS, min_size=2, max_size=6, unique=True))
    made = make(tokens, draw(st.booleans()))
    made.add_special_tokens(["</s>", "<|x|>"])
    if make is of_bytes_as_fallback:
        texts = draw(st.lists(TEXT.map(lambda text: text.replace("\u2581", "")), max_size=4))
        ids = [i for text in texts for i in made.encode(text).ids]
    else:
        ids = draw(st.lists(st.integers(0, made.get_vocab_size() - 1), max_size=20))
    return made, [i for i in ids if i != made.token_to_id("</s>")]


@given(tokenizers_and_ids(), st.lists(st.integers(1, 3), max_size=20), st.integers(0, 20))
def test_a_stream_of_any_kind_is_what_decoding_all_ids_gives(case, sizes, cut):
    made, ids = case
    ours, whole = JsonTokenizer(made.to_str(), "file", "x"), made.decode(ids, False)
    assert ours.decode_bytes(ids).decode(errors="replace") == whole
    assert sizes_of(ours, ids).sum() == len(ours.decode_bytes(ids))
    before, left, parts = ids[:cut], ids[cut:], []
    stream = StreamDecoder(ours, before)
    for size in [*sizes, len(left)]:
        parts.append(stream.push(left[:size]))
        left = left[size:]
    parts.append(stream.finish())
    start = ours.decode_bytes(before).decode(errors="replace")
    if "\ufffd" not in start:  # no half character
        assert start + "".join(parts) == whole


def test_documents_of_words_have_the_size_of_their_text():
    made = JsonTokenizer(words("[SEP]").to_str(), "file", "test")
    ids = np.array([0, 1, 0, 2, 1, 2])  # of two documents
    assert text_size(made, ids) == len(b"one two one") + len(b"two")


def test_bytes_that_are_no_text_leave_the_characters_around_them():
    ours = JsonTokenizer(metaspace().to_str(), "file", "x")
    ids = [*ours.encode("é"), ours.encode("中")[0], *ours.encode("é")]
    assert ours.decode_bytes(ids) == "é".encode() + b"\xe4" + "é".encode()


def chat_tokens() -> Tokenizer:
    made = Tokenizer.from_str(train_bpe([SOURCE], 400).to_str())
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return made


def test_special_tokens_are_letters_unless_asked():
    made = chat_tokens()
    ours, text = JsonTokenizer(made.to_str(), "file", "x"), "<|im_start|>user\nhi<|im_end|>"
    special = {made.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>")}
    asked = ours.with_special_tokens()
    assert not special & set(ours.encode(text)) and special <= set(asked.encode(text))
    assert ours.decode_bytes(asked.encode(text)) == text.encode()  # and can be a stop string
    assert asked.encode_batch([text, "x"]) == [asked.encode(text), asked.encode("x")]
    never = ours.with_special_tokens(False).with_special_tokens()
    assert never.encode(text) == ours.encode(text)
    assert asked.identity() == ours.identity()


def test_special_tokens_are_the_same_where_there_are_none(tokenizer):
    if tokenizer.kind in ("bytes", "world"):
        text = f"a{END_OF_DOCUMENT}"
        assert tokenizer.with_special_tokens().encode(text) == tokenizer.encode(text)


VOCABULARY = "".join(f"{b + 1} {bytes([b])!r} 1\n" for b in range(256))


def test_a_vocabulary_in_a_text_file(tmp_path, world):
    path = tmp_path / "mine.txt"
    official = world_vocabulary().read_text(encoding="utf-8")
    path.write_text(official.replace("\n", "\r\n"), encoding="utf-8-sig", newline="")
    assert isinstance(open_tokenizer(str(path)), WorldTokenizer)
    path.write_text(official + "65530 '<tool>' 6\n", encoding="utf-8")
    ours = open_tokenizer(str(path))
    assert ours.encode(SOURCE) == world.encode(SOURCE)
    assert ours.encode("a<tool>") == [98, 65530] and ours.decode_bytes([65530]) == b"<tool>"
    assert (ours.vocab_size, ours.eod, ours.unused) == (65531, 0, [])
    assert world.unused == list(range(65530, 65536))
    ours.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").identity() == ours.identity()
    assert open_tokenizer(str(tmp_path / "saved")).identity() == ours.identity()


@given(st.lists(st.binary(min_size=2, max_size=4), max_size=8, unique=True), TEXT)
def test_vocabularies_in_text_files_are_encoded_greedily(tokens, text):
    lines = (f"{300 + i} {token!r} {len(token)}\n" for i, token in enumerate(tokens))
    ours, data, ids = TextTokenizer(VOCABULARY + "".join(lines), "x"), text.encode(), []
    while data:
        longest = max((t for t in tokens if data.startswith(t)), key=len, default=data[:1])
        ids.append(300 + tokens.index(longest) if longest in tokens else longest[0] + 1)
        data = data[len(longest) :]
    assert ours.encode(text) == ids and ours.decode_bytes(ids) == text.encode()


@pytest.mark.parametrize(
    "line, message",
    [
        ("300 'ab' 3", "line 257 is not"),
        ("300 ab 2", "line 257 is not"),
        ("x 'ab' 2", "line 257 is not"),
        ("0 'ab' 2", "line 257 is not"),
        ("5 'ab' 2", "line 257 is not"),
        ("300 [1,2] 2", "line 257 is not"),
        ("300 '' 0", "line 257 is not"),
    ],
)
def test_damaged_vocabularies(tmp_path, line, message):
    path = tmp_path / "v.txt"
    path.write_text(f"{VOCABULARY}{line}\n")
    assert message in fault(open_tokenizer, str(path))
    path.write_text(VOCABULARY.split("\n", 3)[-1])
    assert "no token for the single byte 0x00" in fault(open_tokenizer, str(path))


@pytest.mark.parametrize("ids", [[-1], [1, 70000], [1 << 40]])
def test_ids_out_of_range(tokenizer, ids):
    assert f"token {ids[-1]}: the tokenizer" in fault(tokenizer.decode_bytes, ids)


def test_half_a_surrogate_pair_is_no_text(tokenizer):
    for text in ("ab\ud83d", "\udc80"):
        assert "half a surrogate pair" in fault(tokenizer.encode, text)
        assert "half a surrogate pair" in fault(tokenizer.encode_batch, ["a", text])


def fault(call, *arguments) -> str:
    with pytest.raises(TokenizerError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_such_tokenizer(tmp_path):
    assert fault(open_tokenizer, f"{tmp_path}/no.json") == (
        f"data.tokenizer = {tmp_path}/no.json: no such file; give a tokenizer.json,"
        " or one of bytes, bpe, world"
    )


def test_not_a_tokenizer_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model":\n 5}', encoding="utf-8")
    assert fault(open_tokenizer, str(path)).startswith(f"{path}: not a tokenizer.json (")
    path.with_suffix(".txt").write_text("hello\n1 'a' 1\n")
    message = fault(open_tokenizer, str(path.with_suffix(".txt")))
    assert "not an RWKV vocabulary (line 1 is not `ID REPR LENGTH`" in message
    path.write_bytes(b"\xff")
    assert "not UTF-8" in fault(open_tokenizer, str(path))


def test_no_end_of_document_token(tmp_path):
    path = tmp_path / "tokenizer.json"
    words().save(str(path))
    message = fault(open_tokenizer, str(path))
    assert "no end-of-document token; add one of <|endoftext|>, " in message


def test_missing_folder(tmp_path):
    message = fault(load_tokenizer, tmp_path / "tokenizer")
    assert message.startswith(f"{tmp_path}/tokenizer/meta.json: cannot be read (No such file")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '"bytes"'])
def test_damaged_meta(tmp_path, content):
    (tmp_path / "meta.json").write_text(content, encoding="utf-8")
    assert "meta.json: damaged" in fault(load_tokenizer, tmp_path)


def test_unknown_kind(tmp_path):
    (tmp_path / "meta.json").write_text('{"kind": "future"}', encoding="utf-8")
    assert "unknown kind 'future'" in fault(load_tokenizer, tmp_path)


def test_truncated_or_missing_vocabulary(tmp_path, bpe):
    bpe.save(tmp_path)
    content = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(content[:-100])
    assert "tokenizer.json: damaged or changed since it was saved" in fault(
        load_tokenizer, tmp_path
    )
    (tmp_path / "tokenizer.json").unlink()
    assert "tokenizer.json: cannot be read" in fault(load_tokenizer, tmp_path)


def test_another_world_vocabulary(tmp_path, world):
    world.save(tmp_path)
    (tmp_path / "meta.json").write_text('{"kind": "world", "checksum": "0"}', encoding="utf-8")
    assert "differs from the installed one" in fault(load_tokenizer, tmp_path)


def test_world_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyrwkv_tokenizer", None)
    assert "pip install pyrwkv-tokenizer" in fault(WorldTokenizer)
