"""Chat: what the model reads, where replies end, and the state after each exchange."""

import json
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tolerances import assert_close

from rwkv_jax import models
from rwkv_jax.config import ModelConfig
from rwkv_jax.data.conversations import TEMPLATES, Template, clean
from rwkv_jax.data.tokenizers import ByteTokenizer, JsonTokenizer, WorldTokenizer
from rwkv_jax.errors import UserError
from rwkv_jax.sampling import Generator, Prefix, Sampling, chat, stream
from rwkv_jax.sampling import decode as device
from rwkv_jax.sampling.chat import THINK, Conversation, ReplySettings, encode, parts
from rwkv_jax.sampling.decode import NO_TOKEN
from tests.data.test_tokenizers import of_bytes_as_fallback, words
from tests.sampling.conftest import config, weights

STORY = Template(opening="Once.\n\n")


class Pieces(ByteTokenizer):
    """Bytes, and three longer tokens that lie across the ends of replies."""

    longer = (b"\n\n", b".\n", b"\nUs")
    vocab_size = 260

    def encode(self, text):
        found = re.findall(rb"\n\n|\.\n|\nUs|.", text.encode(), re.DOTALL)
        return [257 + self.longer.index(x) if x in self.longer else x[0] + 1 for x in found]

    def decode_bytes(self, ids):
        simple = super().decode_bytes
        return b"".join(self.longer[i - 257] if i > 256 else simple([i]) for i in ids)


class Scripted(Generator):
    """Writes the given reply of each seed, then `x` forever.

    In a reply, `\0` stands for the end of the document. The model reads the reply, so that states
    are those of the text.
    """

    replies = ()

    def decode(self, decoding, settings, steps):
        drawn, seed = int(decoding.drawn[0]), int(jax.random.key_data(decoding.keys)[0, 1])
        reply = self.replies[seed]
        if isinstance(reply, str):
            reply, *end = reply.split("\0")
            reply = self.tokenizer.encode(reply) + [self.tokenizer.eod for _ in end]
        reply = reply + self.tokenizer.encode("x") * (drawn + steps)
        ids = reply[drawn : drawn + steps]
        ids = ids[: ids.index(0) + 1] if 0 in ids else ids
        decoding = replace(
            device.extend(self.params, decoding, ids, cfg=self.cfg), drawn=decoding.drawn + len(ids)
        )
        return np.asarray([ids + [NO_TOKEN] * (steps - len(ids))]), decoding


@pytest.fixture(scope="module")
def scripted():
    return Scripted(weights("7"), config("7"), Pieces())


@pytest.fixture(scope="module")
def world():
    """A tiny random model with the World vocabulary."""
    cfg = ModelConfig(version="7", layers=1, width=32, head_size=16, vocab_size=65536)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: np.asarray(0.3 * rng.normal(size=leaf.shape), np.float32),
        models.abstract_params(cfg),
    )
    return Scripted(jax.tree.map(jax.numpy.asarray, params), cfg, WorldTokenizer())


def telling(generator, *replies):
    generator.replies = replies
    return generator


def talking(generator, *replies, template="g1", system="", **settings):
    """A conversation with these replies."""
    telling(generator, *replies)
    settings = ReplySettings(**settings)
    return Conversation(generator, TEMPLATES[template], system=system, settings=settings)


def said(chunks):
    chunks = list(chunks)
    assert all(not chunk.finish for chunk in chunks[:-1])
    return "".join(chunk.text for chunk in chunks), chunks[-1].finish


def thought(chunks):
    return "".join(chunk.thought for chunk in chunks)


def spy(monkeypatch, name, look):
    """Calls `look` with the arguments of a method before each call."""
    method = getattr(Scripted, name)
    monkeypatch.setattr(Scripted, name, lambda self, *a: look(*a) or method(self, *a))


def assert_as_if_read(talk):
    """The state and the logits are those after reading all the tokens."""
    read = talk.generator.prefill([talk.tokens], [0])
    assert_close(talk.logits, read.logits, "float32")
    for ours, theirs in zip(
        jax.tree.leaves(talk.state), jax.tree.leaves(models.stack(read.state)), strict=True
    ):
        assert_close(ours, theirs, "float32")


# What the model reads.


@pytest.mark.parametrize(
    "think, prompt",
    [
        ("off", "User: hi\n\nAssistant:"),
        ("fast", "User: hi\n\nAssistant: <think>\n</think"),
        ("on", "User: hi\n\nAssistant: <think"),
        ("a bit", "User: hi (think a bit)\n\nAssistant: <think"),
        ("some", "User: hi (think)\n\nAssistant: <think"),
        ("a lot", "User: hi (think a lot)\n\nAssistant: <think"),
        ("compact", "User: hi\n\nAssistant: <think></think"),
        ("tool", "User: hi\n\nAssistant: ```json"),
    ],
)
def test_prompts_of_the_ways_to_think(scripted, monkeypatch, think, prompt):
    read = []
    spy(monkeypatch, "prefill", lambda prompts, *_: read.extend(prompts))
    talk = talking(scripted, "", "", think=think, max_tokens=0)
    said(talk.say("hi"))
    assert read == [scripted.tokenizer.encode(prompt)]


def test_world_tokens(world):
    """Those of the official template's example."""
    question = "simulate SpaceX mars landing using python"
    talk = talking(world, ">\n", think="on", max_tokens=1)
    said(talk.say(question))
    ids = [24281, 59, 57236, 44898, 31377, 52092, 40085, 46966, 261, 5585, 41693, 59, 295, 35762]
    assert talk.tokens[: len(ids)] == ids


@pytest.mark.parametrize(
    "typed, read",
    [
        ("  hi \n", "hi"),
        ("a\r\n\r\nb\n\n\n\nc\nd", "a\nb\nc\nd"),
        ("\n\n", ""),
        ("a\n \n  b", "a\n  b"),
        ("A  \r\n\r\nB\t  \n\n\n", "A\nB"),
    ],
)
def test_clean(typed, read):
    assert clean(typed) == read


def test_whole_conversation(scripted):
    """System prompt, cleaned questions, and replies between the template's parts."""
    talk = talking(scripted, " Hi.\n\nUser: x", " Bye\0", system=" Be\n\nkind\r\n")
    assert said(talk.say("hello\n\nthere ")) == ("Hi.", "stop")
    assert said(talk.say("more")) == ("Bye", "end")
    assert talk.transcript == (
        "System: Be\nkind\n\n"
        "User: hello\nthere\n\nAssistant: Hi.\n\nUser: more\n\nAssistant: Bye\n\n"
    )
    assert_as_if_read(talk)


def test_templates(scripted):
    assert TEMPLATES["g1"].stops == ("\n\nUser:", "\n\nAssistant:", "\n\nSystem:")
    assert TEMPLATES["world"].stops == TEMPLATES["raven"].stops == ("\n\n",)
    talk = talking(scripted, " Yes.\n\n", " No.\n\n", template="raven")
    assert said(talk.say("Well?")) == ("Yes.", "stop")
    assert said(talk.say("Well?")) == ("No.", "stop")
    turn = "Bob: Well?\n\nAlice:"
    assert talk.transcript == f"{turn} Yes.\n\n{turn} No.\n\n"


def test_an_opening_is_for_conversations_with_nothing_before(scripted):
    turn = "User: a\n\nAssistant:\n\n"
    telling(scripted, "", "")

    def first(**given):
        talk = Conversation(scripted, STORY, settings=ReplySettings(max_tokens=0), **given)
        said(talk.say("a"))
        said(talk.say("a"))
        return talk.transcript

    before = scripted.prefill([[5]], [0])
    assert first() == f"Once.\n\n{turn}{turn}"
    assert first(system="Be kind") == f"System: Be kind\n\n{turn}{turn}"
    assert first(prefix=Prefix(before.state, scripted.cfg)) == f"{turn}{turn}"


def test_which_template_for_which_model(world):
    class Pile(ByteTokenizer):
        def encode(self, text):
            return [535] if text == "\n\n" else super().encode(text)

    seven, six = config("7"), replace(config("7"), version="6")
    assert chat.template_for(seven, world.tokenizer) == TEMPLATES["g1"]
    assert chat.template_for(six, world.tokenizer) == TEMPLATES["world"]
    assert chat.template_for(config("4"), Pile()) == TEMPLATES["raven"]


def test_two_newlines_of_the_20b_vocabulary():
    """Its token for two newlines occurs in training only at the end of a text."""

    class Pile(ByteTokenizer):
        def encode(self, text):
            body = text.removesuffix("\n\n")
            ids = [187 if c == "\n" else ord(c) for c in body]
            return ids + [535] * (body != text)

    assert encode(Pile(), "a\n\nb") == [97, 187, 187, 98]
    assert encode(Pile(), "a\n\n") == [97, 187, 187]
    assert encode(Pile(), "\n\n") == [187, 187]
    assert encode(ByteTokenizer(), "a\n\n") == ByteTokenizer().encode("a\n\n")
    assert encode(WorldTokenizer(), "\n\n") == [261]


# Where replies end, and what the conversation then contains.


@pytest.mark.parametrize(
    "reply, tokens, answer, finish",
    [
        (" Hi.\n\nUser: you", 99, " Hi.", "stop"),
        (" Hi.\n\nUser: you", 12, " Hi.", "stop"),
        (" Hi.\n\nAssistant: I", 99, " Hi.", "stop"),
        (" Hi.\n\nSystem: be", 99, " Hi.", "stop"),
        (" One.\n\nTwo.\n\n\nUser: you", 99, " One.\n\nTwo.", "stop"),
        (" Hi \n\nUser:", 99, " Hi", "stop"),
        ("\n\nUser:", 99, "", "stop"),
        (" Hi.\0", 99, " Hi.", "end"),
        (" Hi.\n\n\0", 99, " Hi.", "end"),
        (" Hi.\n\nUse\0", 99, " Hi.\n\nUse", "end"),
        ("\0", 99, "", "end"),
        (" Hi there", 5, " Hi t", "length"),
        (" Hi there", 4, " Hi", "length"),
        (" Hi.\n\nUser: you", 7, " Hi.", "length"),
        (" \u00e9\u00e9", 4, " \u00e9", "length"),
        (" \u00e9\u00e9", 0, "", "length"),
    ],
)
@pytest.mark.parametrize("pace", [0.0, 1e9], ids=["a token a call", "as many as fit a call"])
def test_however_a_reply_ends(scripted, monkeypatch, reply, tokens, answer, finish, pace):
    """The conversation has what was shown and two newlines, and the next turn follows."""
    monkeypatch.setattr(stream, "CALL_SECONDS", pace)
    talk = talking(scripted, reply, " Yes.\0", max_tokens=tokens)
    assert said(talk.say("a")) == (answer.lstrip(), finish)
    assert talk.transcript == f"User: a\n\nAssistant:{answer}\n\n"
    assert_as_if_read(talk)
    talk.configure(max_tokens=9)
    assert said(talk.say("b")) == ("Yes.", "end")
    assert talk.transcript == (f"User: a\n\nAssistant:{answer}\n\nUser: b\n\nAssistant: Yes.\n\n")
    assert_as_if_read(talk)


@pytest.mark.parametrize("how", ["break", "interrupt", "close", "forgotten"])
def test_a_reply_left_early(scripted, monkeypatch, how):
    """The conversation has it as far as it was yielded."""
    monkeypatch.setattr(stream, "CALL_SECONDS", 0.0)
    talk = talking(scripted, " A long reply", " Yes.\0")
    chunks, shown = talk.say("a"), ""
    if how == "interrupt":
        with monkeypatch.context() as patched:
            patched.setattr(Scripted, "decode", interrupted_after(7))
            with pytest.raises(KeyboardInterrupt):
                for chunk in chunks:
                    shown += chunk.text
    for chunk in chunks if not shown else ():
        shown += chunk.text
        if len(shown) == 6:
            break
    if how == "close":
        chunks.close()
    if how != "forgotten":
        assert talk.transcript == "User: a\n\nAssistant: A long\n\n"
    assert said(talk.say("b")) == ("Yes.", "end")
    assert list(chunks) == []
    assert shown == "A long"
    assert talk.transcript == "User: a\n\nAssistant: A long\n\nUser: b\n\nAssistant: Yes.\n\n"
    assert_as_if_read(talk)


def interrupted_after(calls):
    decode = Scripted.decode

    def interrupted(*arguments):
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise KeyboardInterrupt
        return decode(*arguments)

    return interrupted


def test_ctrl_c_while_the_question_is_read_changes_nothing(scripted, monkeypatch):
    talk = talking(scripted, " Hi.\0", " Yes.\0")
    said(talk.say("a"))
    before = talk.notes()
    with monkeypatch.context() as patched:
        patched.setattr(Scripted, "prefill", lambda *_: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            said(talk.say("b"))
    assert talk.notes() == before
    assert said(talk.say("b")) == ("Yes.", "end")


PARTS = st.sampled_from(
    [*"a .\n<\u00e9>", "\n\n", "\n\nUser:", "<think>", "</think>", "\nUs", "\0"]
)


@given(
    reply=st.lists(PARTS, max_size=12).map("".join),
    tokens=st.integers(0, 30),
    think=st.sampled_from(["on", "off"]),
)
@example(reply=" ", tokens=1, think="on")
def test_any_reply_cut_anywhere(scripted, reply, tokens, think):
    """The transcript has what was shown, with one complete end of the reply."""
    talk = talking(scripted, reply, think=think, max_tokens=tokens)
    chunks = list(talk.say("a"))
    transcript = talk.transcript
    assert transcript.startswith(f"User: a\n\nAssistant:{THINK[think][1]}")
    assert transcript.endswith("\n\n")
    body = transcript.removeprefix("User: a\n\nAssistant:").removesuffix("\n\n")
    assert body == body.rstrip() and not any(stop in body for stop in talk.template.stops)
    assert not body.lstrip().startswith("<think>") or "</think>" in body
    assert (thought(chunks), said(chunks)[0]) == parts(transcript.partition("Assistant:")[2])
    assert sum(chunk.tokens for chunk in chunks) <= tokens


# Thoughts.


@given(st.lists(PARTS, max_size=12).map("".join), st.integers(0, 40))
def test_parts_of_an_unfinished_reply_never_change(text, cut):
    for before, after in zip(parts(text[:cut]), parts(text), strict=True):
        assert after.startswith(before)


@pytest.mark.parametrize(
    "think, reply, expected",
    [
        ("on", ">\nWell, \n\nso.</think>\nYes.\n\nUser:", ("Well, \n\nso.", "Yes.")),
        ("fast", ">\nYes.\n\nUser:", ("", "Yes.")),
        ("off", " Yes <think>.\n\nUser:", ("", "Yes <think>.")),
        ("off", " <think>Well</think>Yes.\0", ("Well", "Yes.")),
        ("off", " <\0", ("", "<")),
        ("on", "ing hard\0", ("", "<thinking hard")),
        ("tool", '\n{"a": 1}\n```\0', ("", '```json\n{"a": 1}\n```')),
    ],
)
def test_thoughts_and_answers_are_separated(scripted, think, reply, expected):
    talk = talking(scripted, reply, think=think)
    chunks = list(talk.say("a"))
    assert (thought(chunks), said(chunks)[0]) == expected


@pytest.mark.parametrize(
    "think, reply, tokens, stands",
    [
        ("on", " ", 1, " <think>\n</think>"),
        ("on", ">\nWell, so", 6, " <think>\nWell\n</think>"),
        ("on", ">\nWell</think>\nYes", 99, None),
        ("on", ">\nWell\n\nUser:", 99, " <think>\nWell\n</think>"),
        ("on", "", 0, " <think>\n</think>"),
        ("on", ">", 1, " <think>\n</think>"),
        ("fast", "", 0, " <think>\n</think>"),
        ("fast", ">\nYes", 4, " <think>\n</think>\nYe"),
    ],
)
def test_a_thought_cut_off_is_closed(scripted, think, reply, tokens, stands):
    talk = talking(scripted, reply + "\0", think=think, max_tokens=tokens)
    said(talk.say("a"))
    stands = stands or f" <think{reply}"
    assert talk.transcript.partition("Assistant:")[2] == f"{stands}\n\n"
    assert_as_if_read(talk)


def test_thinking_needs_paragraphs(scripted):
    with pytest.raises(UserError, match="think on: this template ends a reply at a blank line"):
        talking(scripted, template="world", think="on")
    with pytest.raises(UserError, match="think hard: one of off, fast, on, a bit, some, a lot"):
        talking(scripted, think="hard")


# The flower template.


@pytest.mark.parametrize(
    "think, begins",
    [
        ("off", "User✿hi✿\nBot✿<think></think"),
        ("fast", "User✿hi✿\nBot✿<think></think"),
        ("on", "User✿hi✿\nBot✿<think"),
        ("a bit", "User✿hi (think a bit)✿\nBot✿<think"),
        ("tool", "User✿hi✿\nBot✿```json"),
    ],
)
def test_prompts_with_flowers(scripted, monkeypatch, think, begins):
    read = []
    spy(monkeypatch, "prefill", lambda prompts, *_: read.extend(prompts))
    said(talking(scripted, "", template="flower", think=think, max_tokens=0).say("hi"))
    assert read == [[0, *scripted.tokenizer.encode(begins)]]


def test_a_conversation_with_flowers(scripted):
    """Begins with the token between documents; a flower ends each turn, and is no part of it."""
    replies = ">2✿\nUser✿", ">Well\n\nso</think>4✿", ">\n\nUser: x\n✿\n"
    talk = talking(scripted, *replies, template="flower", system=" Be\n\nkind\t\r\n")
    assert said(talk.say("1+1?  \n\n")) == ("2", "stop")
    talk.configure(think="on")
    chunks = list(talk.say("2+2?"))
    assert (thought(chunks), said(chunks)) == ("Well\n\nso", ("4", "stop"))
    talk.configure(think="off")
    assert said(talk.say("x")) == ("User: x", "stop")
    assert talk.transcript == (
        "System✿Be\nkind✿\nUser✿1+1?✿\nBot✿<think></think>2✿\n"
        "User✿2+2?✿\nBot✿<think>Well\n\nso</think>4✿\n"
        "User✿x✿\nBot✿<think></think>\n\nUser: x✿\n"
    )
    assert talk.tokens[0] == 0 and talk.tokens.count(0) == 1
    assert_as_if_read(talk)


def test_flowers_are_one_token_of_the_world_vocabulary(world):
    """As the official prompt has them; the reply is read once."""
    talk = talking(world, ">2✿", ">4✿", template="flower")
    said(talk.say("1+1?"))
    said(talk.say("2+2?"))
    assert talk.tokens == [0, *world.tokenizer.encode(talk.transcript)]
    assert talk.tokens.count(10060) == 8
    assert talk.transcript == (
        "User✿1+1?✿\nBot✿<think></think>2✿\nUser✿2+2?✿\nBot✿<think></think>4✿\n"
    )
    assert_as_if_read(talk)


def test_retry_and_undo_with_flowers(scripted):
    talk = talking(scripted, ">2✿", ">3✿", ">4✿", template="flower")
    said(talk.say("a"))
    assert said(talk.retry()) == ("3", "stop")
    talk.undo()
    assert talk.tokens == []
    said(talk.say("b"))
    assert talk.transcript == "User✿b✿\nBot✿<think></think>4✿\n"
    assert talk.tokens[0] == 0
    assert_as_if_read(talk)


def test_a_flower_that_is_typed_is_refused(scripted):
    talk = talking(scripted, ">2✿", template="flower")
    for action in (talk.say, talk.reset):
        with pytest.raises(UserError, match="✿ ends a turn in this template; leave it out"):
            action("a✿b")
    assert said(talking(scripted, " Yes.\0").say("a✿"))[0] == "Yes."  # letters elsewhere


@given(
    reply=st.lists(PARTS | st.sampled_from([">", "✿"]), max_size=12).map("".join),
    tokens=st.integers(0, 30),
    think=st.sampled_from(["on", "off"]),
)
@example(reply=" ", tokens=1, think="on")
def test_any_reply_with_flowers_cut_anywhere(scripted, reply, tokens, think):
    talk = talking(scripted, reply, think=think, max_tokens=tokens, template="flower")
    chunks = list(talk.say("a"))
    head, _, body = talk.transcript.partition("Bot✿")
    assert head == "User✿a✿\n" and body.endswith("✿\n")
    body = body.removesuffix("✿\n")
    assert body == body.rstrip() and "✿" not in body
    assert not body.startswith("<think>") or "</think>" in body
    assert (thought(chunks), said(chunks)[0]) == parts(body + "\n\n")


# Tokenizers that are not lossless.


def test_sentence_pieces_get_no_space_between_turns():
    """Llama's vocabulary puts one before each text that it encodes."""
    tokenizer = JsonTokenizer(of_bytes_as_fallback([], True).to_str(), "file", "x")
    generator = Scripted(weights("7", vocab_size=300), config("7", vocab_size=300), tokenizer)
    talk = talking(generator, "Hi.\n\nUser:", "Bye.\0")
    assert [said(talk.say(text))[0] for text in ("a a", "b")] == ["Hi.", "Bye."]
    assert talk.transcript == ("User: a a\n\nAssistant: Hi.\n\nUser: b\n\nAssistant: Bye.\n\n")
    assert_as_if_read(talk)


def test_words_without_a_token_for_the_end_of_a_turn():
    tokenizer = JsonTokenizer(words("[SEP]").to_str(), "file", "x")
    talk = random_talk(Generator(weights("7"), config("7"), tokenizer))
    for text in ("one", "two"):
        reply, _ = said(talk.say(text))
        assert set(reply.split()) <= {"one", "two"}
        assert_as_if_read(talk)


# The conversation as a value.


def random_talk(generator, *, system="", prefix=None, **settings):
    settings = {"max_tokens": 12, "seed": 5, "sampling": Sampling(top_p=1.0)} | settings
    return Conversation(
        generator, TEMPLATES["g1"], system=system, settings=ReplySettings(**settings), prefix=prefix
    )


def test_turns_equal_reading_it_all(generator7):
    """A model that writes freely, half characters too."""
    talk = random_talk(generator7, system="Be kind.", think="on")
    for text in ("a", "b\nc", "d"):
        said(talk.say(text))
        assert_as_if_read(talk)


def test_a_world_model_reads_what_encoding_the_transcript_gives(world):
    """If the model writes the tokens that encoding gives, cuts between turns do not matter."""
    telling(world, " Hi\u4f60\u597d\u3002\n\nUser: b", " One.\n\nTwo.\0", ">\nWell</think>\nYes\0")
    talk = Conversation(world, TEMPLATES["g1"], system="Be kind.")
    for text, think in (("a", "off"), ("(b", "fast"), ("c", "on")):
        talk.configure(think=think)
        said(talk.say(text))
        assert_as_if_read(talk)
    assert talk.tokens == world.tokenizer.encode(talk.transcript)
    assert talk.transcript.endswith("User: c\n\nAssistant: <think>\nWell</think>\nYes\n\n")


def test_a_world_model_writes(world):
    """Freely, from all of its vocabulary."""
    talk = random_talk(Generator(world.params, world.cfg, world.tokenizer))
    for text in ("a", "b"):
        said(talk.say(text))
        assert_as_if_read(talk)


def test_nothing_is_read_twice(scripted, monkeypatch):
    """Each turn reads its own text, and of the reply at most the tokens of its last calls."""
    questions, again = [], []
    monkeypatch.setattr(stream, "CALL_SECONDS", 1e9)  # 2, 4 and 8 tokens a call
    spy(monkeypatch, "prefill", lambda prompts, *_: questions.extend(prompts))
    spy(monkeypatch, "extend", lambda _, tokens: again.append(tokens))
    replies = " Hi.\n\nUser: b", " Yes.\n\nUser: c", " Nothing."
    talk = talking(scripted, *replies, max_tokens=15)
    for text in ("a", "b", "c"):
        said(talk.say(text))
    ids = scripted.tokenizer.encode
    assert questions == [ids(f"User: {text}\n\nAssistant:") for text in "abc"]
    # ` H` and ` Y` came first; the calls after them wrote too much.
    assert again == [ids("i.\n\n"), ids("es.\n\n"), ids("\n\n")]


def test_same_seed_same_text(generator7):
    first, second = random_talk(generator7), random_talk(generator7)
    for text in ("a", "b"):
        assert said(first.say(text)) == said(second.say(text))
    assert first.settings.seed == 7
    first.reset()
    first.configure(seed=5)
    assert said(first.say("a")) != said(random_talk(generator7, seed=6).say("a"))
    assert first.tokens == second.tokens[: len(first.tokens)]


def test_retry(generator7):
    """Another reply in place of the last one, as if that had never been written."""
    talk, other = random_talk(generator7), random_talk(generator7)
    said(talk.say("a")), said(other.say("a"))
    first = said(talk.say("b"))
    second, third = said(talk.retry()), said(talk.retry())
    assert len({first, second, third}) == 3 and talk.settings.seed == 9
    other.configure(seed=8)
    assert said(other.say("b")) == third
    assert (talk.tokens, talk.exchanges) == (other.tokens, 2)
    assert (talk.logits == other.logits).all()
    other.configure(seed=6)
    assert said(other.retry()) == first


def test_retry_with_another_way_to_think_reads_the_question_again(scripted):
    talk = talking(scripted, " Yes.\0", ">\nWell</think>No.\0")
    said(talk.say("a"))
    talk.configure(think="a bit")
    assert said(talk.retry()) == ("No.", "end")
    assert talk.transcript == ("User: a (think a bit)\n\nAssistant: <think>\nWell</think>No.\n\n")
    assert_as_if_read(talk)


def test_undo(generator7):
    talk = random_talk(generator7)
    said(talk.say("a"))
    tokens, state, logits = talk.tokens, talk.state, talk.logits
    first = said(talk.say("b"))
    talk.undo()
    assert (talk.tokens, talk.exchanges) == (tokens, 1)
    jax.tree.map(np.testing.assert_array_equal, (talk.state, talk.logits), (state, logits))
    talk.configure(seed=6)
    assert said(talk.say("b")) == first
    talk.undo()
    talk.configure(seed=5)
    assert said(talk.retry())[0]  # of the first question, which is read again
    assert talk.tokens == tokens
    assert_as_if_read(talk)
    talk.undo()
    assert talk.tokens == [] and talk.exchanges == 0
    for action in (talk.undo, talk.retry):
        with pytest.raises(UserError, match="no exchange to go back to"):
            action()


def test_no_more_than_some_exchanges_can_be_undone(scripted, monkeypatch):
    talk = talking(scripted, *["\0"] * (chat.KEPT + 3))
    for _ in range(chat.KEPT + 3):
        said(talk.say("a"))
    assert sum(question.decoding is not None for question in talk._questions) == 1
    for _ in range(chat.KEPT):
        talk.undo()
    with pytest.raises(UserError, match=f"the last {chat.KEPT} "):
        talk.undo()
    assert talk.exchanges == 3 and talk.transcript == "User: a\n\nAssistant:\n\n" * 3


def test_reset(scripted):
    telling(scripted, *[" Yes.\0"] * 4)
    talk = Conversation(scripted, TEMPLATES["g1"], system="Be kind.")
    turn = "User: a\n\nAssistant: Yes.\n\n"
    for system, begin in ((None, "System: Be kind.\n\n"), ("Be\n\nshort", "System: Be\nshort\n\n")):
        said(talk.say("a"))
        talk.reset(system)
        assert (talk.tokens, talk.exchanges) == ([], 0)
        said(talk.say("a"))
        assert talk.transcript == begin + turn


def test_from_a_prefix(generator7):
    """A state alone, as a tuned one is, or with logits: turns are read after it."""
    before = generator7.prefill([[5, 6, 7]], [0])
    for logits in (None, before.logits):
        prefix = Prefix(before.state, generator7.cfg, logits)
        talk = random_talk(generator7, prefix=prefix)
        first = said(talk.say("a"))
        read = generator7.prefill([[5, 6, 7, *talk.tokens]], [0])
        assert_close(talk.logits, read.logits, "float32")
        talk.reset()
        talk.configure(seed=5)
        assert said(talk.say("a")) == first


@pytest.mark.parametrize("cut", [False, True], ids=["after a reply", "in a reply"])
def test_resumed(generator7, cut):
    """The conversation continues as if it had never stopped."""
    talk = random_talk(generator7, system="Be kind.", think="a bit", sampling=Sampling(top_k=9))
    said(talk.say("a"))
    chunks = talk.say("b")
    _ = next(chunks) if cut else said(chunks)
    again = Conversation.resumed(generator7, talk.state, talk.logits, talk.notes())
    assert again.notes() == talk.notes() and again.exchanges == 2
    for text in ("c", "d"):
        assert said(again.say(text)) == said(talk.say(text))
    assert (again.tokens, again.transcript) == (talk.tokens, talk.transcript)
    again.undo()
    again.undo()
    with pytest.raises(UserError, match="of this session"):
        again.undo()
    again.reset()
    talk.reset()
    assert said(again.say("e")) == said(talk.say("e"))


def test_the_format_of_saved_settings(generator7):
    """Files of earlier releases have these names, too."""
    saved = json.loads(random_talk(generator7).notes()["chat"])
    assert list(saved) == [
        *("template", "system", "think", "sampling", "max_tokens", "seed", "exchanges", "tokens")
    ]
    names = ["temperature", "top_p", "top_k", "presence", "frequency", "decay"]
    assert list(saved["sampling"]) == names


def test_conversations_saved_before_there_were_flowers(generator7):
    talk = random_talk(generator7)
    said(talk.say("a"))
    notes = talk.notes()
    earlier = json.loads(notes["chat"])
    assert earlier["template"].pop("mark") == ""
    notes |= {"chat": json.dumps(earlier)}
    again = Conversation.resumed(generator7, talk.state, talk.logits, notes)
    assert again.notes() == talk.notes()


def test_min_p_is_saved_if_it_is_set(generator7):
    talk = random_talk(generator7, sampling=Sampling(min_p=0.1))
    said(talk.say("a"))
    again = Conversation.resumed(generator7, talk.state, talk.logits, talk.notes())
    assert again.settings.sampling.min_p == 0.1


def test_notes_of_something_else(generator7):
    talk = random_talk(generator7)
    said(talk.say("a"))
    notes, state, logits = talk.notes(), talk.state, talk.logits
    edits = ("top_p", "top"), ('"seed": 6', '"seed": "6"'), ('"tokens": [', '"tokens": [-1, ')
    edited = [notes["chat"].replace(*edit) for edit in edits]
    for damaged in ("", "[]", "{}", '{"tokens": 1}', *edited):
        with pytest.raises(UserError, match="has no conversation, or a damaged one"):
            Conversation.resumed(generator7, state, logits, notes | {"chat": damaged})
    with pytest.raises(UserError, match="the tokenizer world, but this is bytes"):
        Conversation.resumed(generator7, state, logits, notes | {"tokenizer": "world"})
    with pytest.raises(UserError, match="has no conversation"):
        Conversation.resumed(generator7, state, logits, {"tokenizer": "bytes"})
    with pytest.raises(UserError, match="has no conversation"):
        Conversation.resumed(generator7, state, None, notes)


def test_invalid_arguments(generator7):
    talk = random_talk(generator7)
    with pytest.raises(UserError, match="say something"):
        talk.say(" \r\n")
    for nothing in ("state", "logits"):
        with pytest.raises(UserError, match="nothing was said yet"):
            getattr(talk, nothing)
    with pytest.raises(UserError, match="'Be kind': this template has none"):
        Conversation(generator7, TEMPLATES["raven"], system="Be kind")
    for setting, message in (("seed", "seed -1: between"), ("max_tokens", "tokens -1: 0 or more")):
        with pytest.raises(UserError, match=message):
            random_talk(generator7, **{setting: -1})
