"""Conversations as text, and which of their tokens are trained on."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from rwkv_jax.config import DataConfig
from rwkv_jax.data.bpe import train_bpe
from rwkv_jax.data.conversations import TEMPLATES, ConversationError, loss_mask, render
from rwkv_jax.data.corpus import open_corpus
from rwkv_jax.data.files import CorpusError
from rwkv_jax.data.prepare import prepare
from rwkv_jax.data.tokenizers import open_tokenizer, token_sizes

TURNS = [
    {"role": "system", "content": "Be\n\nkind."},
    {"role": "user", "content": " Hi\r\n\r\nthere "},
    {"role": "assistant", "content": "<think>\nWell\n</think>\n\nHello é."},
    {"from": "human", "value": "Bye"},
    {"from": "gpt", "value": "Bye!"},
]


@pytest.mark.parametrize(
    "template, turns, text",
    [
        (
            "g1",
            TURNS,
            "System: Be\nkind.\n\nUser: Hi\nthere\n\nAssistant:{ <think>\nWell\n</think>\n\nHello"
            " é.\n\nUser:} Bye\n\nAssistant:{ Bye!}",
        ),
        (
            "world",
            TURNS,
            "System: Be\nkind.\n\nUser: Hi\nthere\n\nAssistant:{ <think>\nWell\n</think>\nHello"
            " é.\n\n}User: Bye\n\nAssistant:{ Bye!}",
        ),
        ("raven", TURNS[3:], "Bob: Bye\n\nAlice:{ Bye!}"),
        (
            "flower",
            TURNS,
            "System✿Be\nkind.✿\nUser✿Hi\nthere✿\nBot✿{<think>\nWell\n</think>\n\n"
            "Hello é.✿\n}User✿Bye✿\nBot✿{<think></think>Bye!✿\n}",
        ),
        ("flower", TURNS[1:2], "User✿Hi\nthere✿\n"),
        ("g1", TURNS[1:2], "User: Hi\nthere"),
        ("g1", [], ""),
    ],
)
def test_render(template, turns, text):
    got, spans = render(turns, TEMPLATES[template])
    marked = got
    for first, end in reversed(spans):
        marked = f"{marked[:first]}{{{marked[first:end]}}}{marked[end:]}"
    assert marked == text


@pytest.mark.parametrize(
    "turns, message",
    [
        (["hi"], "turn 1 is not an object with role and content"),
        (
            [TURNS[1], {"role": "cook", "content": ""}],
            "turn 2 has the role 'cook', not one of system",
        ),
        ([{"role": "user"}], "turn 1 has no text as content"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            "turn 1 has a part of type 'image_",
        ),
        ([{"role": "user", "content": 5}], "turn 1 has a part of type 'int'"),
        ([{"role": "assistant", "tool_calls": [{"id": "x"}]}], "turn 1 has no text as content"),
        ([{"role": ["user"], "content": ""}], r"turn 1 has the role \['user'\], not one of system"),
    ],
)
def test_turns_that_are_not_a_conversation(turns, message):
    with pytest.raises(ConversationError, match=message):
        render(turns, TEMPLATES["g1"])
    for role in ("user", "assistant"):
        with pytest.raises(ConversationError, match="✿ ends a turn in this template"):
            render([{"role": role, "content": "a✿b"}], TEMPLATES["flower"])
    with pytest.raises(ConversationError, match="role system, which the template does not support"):
        render(TURNS, TEMPLATES["raven"])


def test_turns_as_people_write_them():
    """Roles in any case and of any library, contents in parts, tools; the text is the same."""
    official = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi\nthere"},
        {"role": "assistant", "content": '```json\n{"name": "f", "arguments": {"x": "é"}}\n```'},
        {"role": "user", "content": "Function output:\n5"},
        {"role": "assistant", "content": "Five."},
    ]
    call = {"name": "f", "arguments": '{"x": "é"}'}
    others = [
        {"role": "Developer", "content": "Be kind."},
        {"role": " HUMAN", "content": [{"type": "text", "text": "hi"}, "there"]},
        {"role": "ai", "content": None, "tool_calls": [{"type": "function", "function": call}]},
        {"speaker": "tool", "text": "5", "tool_call_id": "7"},
        {"from": "ChatGPT", "value": "Five."},
    ]
    assert render(others, TEMPLATES["g1"]) == render(official, TEMPLATES["g1"])
    others[2] = {"role": "assistant", "function_call": call | {"arguments": {"x": "é"}}}
    assert render(others, TEMPLATES["flower"]) == render(official, TEMPLATES["flower"])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_reply_is_trained_with_what_a_chat_stops_at(name):
    template = TEMPLATES[name]
    turns = [x for x in TURNS if x.get("role") != "system"]
    text, spans = render([*turns, *turns], template)
    assert len(spans) == 4
    for first, last in spans[:-1]:
        assert any(stop in text[first:last] for stop in template.stops)
        assert text[first:last].endswith((*template.stops, f"{template.mark}\n"))
    assert spans[-1][1] == len(text)  # there the end of the document stops it, or the mark


@given(st.lists(st.text(max_size=20), min_size=1, max_size=6), st.integers(0, 63))
def test_tokens_that_overlap_a_span_are_trained_on(parts, chosen):
    """Against the text's bytes one by one; and the end of the document if a span reaches it."""
    text, spans, at = "".join(parts), [], 0
    for i, part in enumerate(parts):
        if chosen >> i & 1:
            spans.append((at, at + len(part)))
        at += len(part)
    inside = np.zeros(len(text.encode()) + 1, bool)
    for first, last in spans:
        inside[len(text[:first].encode()) : len(text[:last].encode())] = True
    ids = np.array(open_tokenizer("world").encode(text), int)
    sizes = token_sizes(open_tokenizer("world"))[ids]
    mask = loss_mask(text, tuple(spans), sizes)
    assert mask is not None
    ends = np.cumsum(sizes)
    expected = [inside[end - size : end].any() for end, size in zip(ends, sizes, strict=True)]
    assert mask[:-1].tolist() == expected
    assert mask[-1] == any(last == len(text) for _, last in spans)
    assert loss_mask(text + "x", (), sizes) is None


def source(tmp_path, *records):
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in records), encoding="utf-8")
    return path


def config(tmp_path, path, **settings):
    base = {"tokenizer": "world", "heldout": 0.0, "cache": str(tmp_path / "cache")}
    return DataConfig(source=str(path), **base | settings)


def test_only_answers_are_trained(tmp_path):
    path = source(tmp_path, {"messages": TURNS}, {"messages": TURNS[3:]}, {"messages": TURNS[1:2]})
    cfg = config(tmp_path, path, field="messages", train_on="answers")
    tokens = prepare(cfg, progress=False)
    again = prepare(cfg, progress=False)
    assert tokens.mask is not None and (tokens.mask == again.mask).all()
    assert len(tokens.mask) == len(tokens.train)
    replies = [
        open_tokenizer("world").decode_bytes(tokens.train[part]).decode()
        for part in np.split(np.arange(len(tokens.train)), np.flatnonzero(np.diff(tokens.mask)) + 1)
        if tokens.mask[part[0]]
    ]
    assert replies == [" <think>\nWell\n</think>\n\nHello é.\n\nUser:", " Bye!", " Bye!"]
    ends = np.flatnonzero(tokens.train == 0)
    assert tokens.mask[ends].tolist() == [True, True, False]
    older = prepare(replace(cfg, train_stops=False), progress=False)
    assert older.mask is not None and older.digest != tokens.digest
    stops = tokens.train[tokens.mask & ~older.mask]
    assert open_tokenizer("world").decode_bytes(stops) == b"User:"
    everything = prepare(config(tmp_path, path, field="messages"), progress=False)
    assert everything.mask is None and (everything.train == tokens.train).all()


def test_spans_of_text(tmp_path):
    answer = {"text": "Question? Answer.", "spans": [[10, 17]]}
    path = source(tmp_path, answer, {"text": "é", "spans": []})
    tokens = prepare(config(tmp_path, path, train_on="spans"), progress=False)
    assert tokens.mask is not None
    assert open_tokenizer("world").decode_bytes(tokens.train[tokens.mask]) == b" Answer."
    assert tokens.mask[tokens.train == 0].tolist() == [True, False]


@pytest.mark.parametrize(
    "record, settings, message",
    [
        ({"text": "x"}, {"train_on": "answers"}, "text, not a list of turns, which data.train_on"),
        ({"text": [1]}, {}, "turn 1 is not an object"),
        ({"text": TURNS}, {"train_on": "spans"}, 'turns have no spans; set data.train_on = "ans'),
        ({"text": "ab", "spans": [[0, 3]]}, {"train_on": "spans"}, r"holds \[0, 3\], not \[first"),
        ({"text": "ab"}, {"train_on": "spans"}, "'spans' holds None, not"),
        ({"text": "ab", "spans": [[1, 0]]}, {"train_on": "spans"}, r"holds \[1, 0\], not"),
    ],
)
def test_records_that_do_not_fit(tmp_path, record, settings, message):
    path = source(tmp_path, {"text": "ok", "spans": []} if settings else {"text": "ok"}, record)
    if settings.get("train_on") == "answers":
        path = source(tmp_path, record)
    cfg = config(tmp_path, path, **settings)
    with pytest.raises(CorpusError, match=rf"chat.jsonl:\d: field 'text': .*{message}"):
        list(open_corpus(cfg).documents())


def test_special_tokens_in_training_text(tmp_path):
    """Letters, or tokens if asked; a cache has one or the other, and masks fit both."""
    made = train_bpe(["a b c <|im_start|>"], 300)
    made.add_special_tokens(["<|im_start|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    path = source(tmp_path, {"text": "<|im_start|>user b", "spans": [[12, 16]]})
    settings = {"tokenizer": str(tmp_path / "tokenizer.json"), "train_on": "spans"}
    special = made.token_to_id("<|im_start|>")
    for asked in (False, True):
        cfg = config(tmp_path, path, **settings, special_tokens=asked)
        tokens = prepare(cfg, progress=False)
        assert (special in tokens.train) == asked and tokens.mask is not None
        assert tokens.tokenizer.decode_bytes(tokens.train[tokens.mask]) == b"user"
    assert tokens.tokenizer.encode("<|im_start|>") != [special]  # of the run, for chats


def test_masks_of_words(tmp_path):
    """Where a token's bytes depend on the tokens before it."""
    made = Tokenizer(models.WordLevel({"one": 0, "two": 1, "[SEP]": 2}, unk_token="one"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    path = source(tmp_path, {"text": "one two one", "spans": [[4, 7]]})
    cfg = config(tmp_path, path, tokenizer=str(tmp_path / "tokenizer.json"), train_on="spans")
    tokens = prepare(cfg, progress=False)
    assert tokens.mask is not None and tokens.mask.tolist() == [False, True, False, False]


def test_nothing_to_train_on(tmp_path):
    path = source(tmp_path, {"text": "ok", "spans": []})
    with pytest.raises(CorpusError, match=r"data.train_on = spans: nothing of .* is trained on"):
        prepare(config(tmp_path, path, train_on="spans"), progress=False)


def test_other_spans_are_other_data(tmp_path):
    digests = set()
    for last in (1, 5, 5):
        path = source(tmp_path, {"text": "a b c", "spans": [[0, last]]})
        digests.add(prepare(config(tmp_path, path, train_on="spans"), progress=False).digest)
    assert len(digests) == 2


@pytest.mark.parametrize("text", ["[" * 100_000, '{"text": ' + "1" * 5000 + "}"])
def test_json_beyond_pythons_limits_is_one_line(tmp_path, text):
    path = tmp_path / "chat.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(CorpusError, match=r"chat.jsonl:1: JSON that cannot be read"):
        list(open_corpus(config(tmp_path, path)).documents())


def test_plain_text_does_not_say_who_speaks(tmp_path):
    (tmp_path / "a.txt").write_text("hi")
    cfg = config(tmp_path, tmp_path / "a.txt", train_on="answers")
    with pytest.raises(CorpusError, match=r"data\.train_on = 'answers' needs JSON lines"):
        list(open_corpus(cfg).documents())
