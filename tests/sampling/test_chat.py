"""Chat: what the model is given to read, where replies end, and the state after each exchange."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_close

from rwkv_jax import models
from rwkv_jax.config import ModelConfig
from rwkv_jax.data.conversations import TEMPLATES, Template, clean
from rwkv_jax.data.tokenizers import ByteTokenizer, WorldTokenizer
from rwkv_jax.errors import UserError
from rwkv_jax.models import stack
from rwkv_jax.sampling import Sampling, Start, Writer, chat, session
from rwkv_jax.sampling.chat import THINK, Conversation, encode, parts
from rwkv_jax.sampling.decode import NO_TOKEN, extend, prefill
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


class Scripted(Writer):
    """Writes what it is told to, for the reply of each seed; then `x` forever.

    In a reply, `\0` stands for the end of the document.

    The model reads along, so that states are those of the text.
    """

    replies = ()

    def write(self, rows, settings, tokens):
        written, reply = (
            int(rows.written[0]),
            self.replies[int(jax.random.key_data(rows.key)[0, 1])],
        )
        if isinstance(reply, str):
            reply, *end = reply.split("\0")
            reply = self.tokenizer.encode(reply) + [self.tokenizer.eod for _ in end]
        reply = reply + self.tokenizer.encode("x") * (written + tokens)
        ids = reply[written : written + tokens]
        ids = ids[: ids.index(0) + 1] if 0 in ids else ids
        rows = replace(
            extend(self.params, rows, ids, cfg=self.cfg), written=rows.written + len(ids)
        )
        return np.asarray([ids + [NO_TOKEN] * (tokens - len(ids))]), rows


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


def telling(writer, *replies):
    writer.replies = replies
    return writer


def said(pieces):
    pieces = list(pieces)
    assert all(not piece.finish for piece in pieces[:-1])
    return "".join(piece.text for piece in pieces), pieces[-1].finish


def thought(pieces):
    return "".join(piece.thought for piece in pieces)


def assert_as_if_read(talk):
    """The state and the logits are those after reading all the tokens."""
    writer = talk.writer
    rows = prefill(writer.params, [talk.tokens], [0], cfg=writer.cfg, end=writer.tokenizer.eod)
    assert_close(talk.logits, rows.logits, "float32")
    for mine, read in zip(
        jax.tree.leaves(talk.state), jax.tree.leaves(stack(rows.state)), strict=True
    ):
        assert_close(mine, read, "float32")


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
    ],
)
def test_prompts_of_the_ways_to_think(scripted, monkeypatch, think, prompt):
    read = []
    monkeypatch.setattr(chat, "prefill", lambda *a, **k: read.extend(a[1]) or prefill(*a, **k))
    talk = Conversation(telling(scripted, "", ""), TEMPLATES["g1"], think=think, max_tokens=0)
    said(talk.say("hi"))
    assert read == [scripted.tokenizer.encode(prompt)]


def test_world_tokens(world):
    """Those of the official template's example."""
    question = "simulate SpaceX mars landing using python"
    talk = Conversation(telling(world, ">\n"), think="on", max_tokens=1)
    said(talk.say(question))
    ids = [24281, 59, 57236, 44898, 31377, 52092, 40085, 46966, 261, 5585, 41693, 59, 295, 35762]
    assert talk.tokens[: len(ids)] == ids


@pytest.mark.parametrize(
    "typed, read",
    [
        ("  hi \n", "hi"),
        ("a\r\n\r\nb\n\n\n\nc\nd", "a\nb\nc\nd"),
        ("\n\n", ""),
        ("a\n \nb", "a\n \nb"),
    ],
)
def test_clean(typed, read):
    assert clean(typed) == read


def test_whole_conversation(scripted):
    """System prompt, cleaned questions, and replies between the template's parts."""
    talk = Conversation(
        telling(scripted, " Hi.\n\nUser: x", " Bye\0"), TEMPLATES["g1"], system=" Be\n\nkind\r\n"
    )
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
    talk = Conversation(telling(scripted, " Yes.\n\n", " No.\n\n"), TEMPLATES["raven"])
    assert said(talk.say("Well?")) == ("Yes.", "stop")
    assert said(talk.say("Well?")) == ("No.", "stop")
    turn = "Bob: Well?\n\nAlice:"
    assert talk.transcript == f"{turn} Yes.\n\n{turn} No.\n\n"


def test_an_opening_is_for_conversations_with_nothing_before(scripted):
    turn = "User: a\n\nAssistant:\n\n"
    telling(scripted, "", "")

    def first(**settings):
        talk = Conversation(scripted, STORY, max_tokens=0, **settings)
        said(talk.say("a"))
        said(talk.say("a"))
        return talk.transcript

    rows = prefill(scripted.params, [[5]], [0], cfg=scripted.cfg, end=0)
    assert first() == f"Once.\n\n{turn}{turn}"
    assert first(system="Be kind") == f"System: Be kind\n\n{turn}{turn}"
    assert first(start=Start(rows.state, scripted.cfg)) == f"{turn}{turn}"


def test_which_template_for_which_model(world):
    class Pile(ByteTokenizer):
        def encode(self, text):
            return [535] if text == "\n\n" else super().encode(text)

    seven, six = config("7"), replace(config("7"), version="6")
    assert chat.template_for(seven, world.tokenizer) == TEMPLATES["g1"]
    assert chat.template_for(six, world.tokenizer) == TEMPLATES["world"]
    assert chat.template_for(config("4"), Pile()) == TEMPLATES["raven"]


def test_two_newlines_of_the_20b_vocabulary():
    """It has them in one token, which its models only saw where a text ended with them."""

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


# Where replies end, and what stands then.


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
    """What was shown stands, two newlines follow, and the next turn goes on from there."""
    monkeypatch.setattr(session, "CALL_SECONDS", pace)
    talk = Conversation(telling(scripted, reply, " Yes.\0"), TEMPLATES["g1"], max_tokens=tokens)
    assert said(talk.say("a")) == (answer.lstrip(), finish)
    assert talk.transcript == f"User: a\n\nAssistant:{answer}\n\n"
    assert_as_if_read(talk)
    talk.max_tokens = 9
    assert said(talk.say("b")) == ("Yes.", "end")
    assert talk.transcript == (f"User: a\n\nAssistant:{answer}\n\nUser: b\n\nAssistant: Yes.\n\n")
    assert_as_if_read(talk)


@pytest.mark.parametrize("how", ["break", "interrupt", "close", "forgotten"])
def test_a_reply_left_early(scripted, monkeypatch, how):
    """It stands as far as it was handed out."""
    monkeypatch.setattr(session, "CALL_SECONDS", 0.0)
    talk = Conversation(telling(scripted, " A long reply", " Yes.\0"), TEMPLATES["g1"])
    pieces, shown = talk.say("a"), ""
    if how == "interrupt":
        with monkeypatch.context() as patched:
            patched.setattr(Scripted, "write", interrupted_after(7))
            with pytest.raises(KeyboardInterrupt):
                for piece in pieces:
                    shown += piece.text
    for piece in pieces if not shown else ():
        shown += piece.text
        if len(shown) == 6:
            break
    if how == "close":
        pieces.close()
    if how != "forgotten":
        assert talk.transcript == "User: a\n\nAssistant: A long\n\n"
    assert said(talk.say("b")) == ("Yes.", "end")
    assert list(pieces) == []
    assert shown == "A long"
    assert talk.transcript == "User: a\n\nAssistant: A long\n\nUser: b\n\nAssistant: Yes.\n\n"
    assert_as_if_read(talk)


def interrupted_after(calls):
    write = Scripted.write

    def interrupted(*arguments):
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise KeyboardInterrupt
        return write(*arguments)

    return interrupted


def test_ctrl_c_while_the_question_is_read_leaves_all_as_it_was(scripted, monkeypatch):
    talk = Conversation(telling(scripted, " Hi.\0", " Yes.\0"), TEMPLATES["g1"])
    said(talk.say("a"))
    before = talk.notes()
    with monkeypatch.context() as patched:
        patched.setattr(chat, "prefill", lambda *_, **__: exec("raise KeyboardInterrupt"))
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
def test_any_reply_cut_anywhere(scripted, reply, tokens, think):
    """What was shown is in the transcript, and there a reply ends once and properly."""
    talk = Conversation(telling(scripted, reply), TEMPLATES["g1"], think=think, max_tokens=tokens)
    pieces = list(talk.say("a"))
    transcript = talk.transcript
    assert transcript.startswith(f"User: a\n\nAssistant:{THINK[think][1]}")
    assert transcript.endswith("\n\n")
    body = transcript.removeprefix("User: a\n\nAssistant:").removesuffix("\n\n")
    assert body == body.rstrip() and not any(stop in body for stop in talk.template.stops)
    assert not body.lstrip().startswith("<think>") or "</think>" in body
    assert (thought(pieces), said(pieces)[0]) == parts(transcript.partition("Assistant:")[2])
    assert sum(piece.tokens for piece in pieces) <= tokens


# Thoughts.


@given(st.lists(PARTS, max_size=12).map("".join), st.integers(0, 40))
def test_what_is_certain_of_a_reply_stays(text, cut):
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
    ],
)
def test_thoughts_are_told_apart(scripted, think, reply, expected):
    talk = Conversation(telling(scripted, reply), TEMPLATES["g1"], think=think)
    pieces = list(talk.say("a"))
    assert (thought(pieces), said(pieces)[0]) == expected


@pytest.mark.parametrize(
    "think, reply, tokens, stands",
    [
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
    telling(scripted, reply + "\0")
    talk = Conversation(scripted, TEMPLATES["g1"], think=think, max_tokens=tokens)
    said(talk.say("a"))
    stands = stands or f" <think{reply}"
    assert talk.transcript.partition("Assistant:")[2] == f"{stands}\n\n"
    assert_as_if_read(talk)


def test_thinking_needs_paragraphs(scripted):
    with pytest.raises(UserError, match="think on: this template ends a reply at an empty line"):
        Conversation(scripted, TEMPLATES["world"], think="on")
    with pytest.raises(UserError, match="think hard: one of off, fast, on, a bit, some, a lot"):
        Conversation(scripted, think="hard")


# The conversation as a value.


def random_talk(writer, **settings):
    settings = {"max_tokens": 12, "seed": 5, "sampling": Sampling(top_p=1.0)} | settings
    return Conversation(writer, TEMPLATES["g1"], **settings)


def test_turns_equal_reading_it_all(writer7):
    """A model that writes what it likes, half characters too."""
    talk = random_talk(writer7, system="Be kind.", think="on")
    for text in ("a", "b\nc", "d"):
        said(talk.say(text))
        assert_as_if_read(talk)


def test_a_world_model_reads_what_encoding_the_transcript_gives(world):
    """If its own tokens are those that encoding gives, cuts between turns make no difference."""
    telling(world, " Hi\u4f60\u597d\u3002\n\nUser: b", " One.\n\nTwo.\0", ">\nWell</think>\nYes\0")
    talk = Conversation(world, TEMPLATES["g1"], system="Be kind.")
    for text, think in (("a", "off"), ("(b", "fast"), ("c", "on")):
        talk.think = think
        said(talk.say(text))
        assert_as_if_read(talk)
    assert talk.tokens == world.tokenizer.encode(talk.transcript)
    assert talk.transcript.endswith("User: c\n\nAssistant: <think>\nWell</think>\nYes\n\n")


def test_a_world_model_writes(world):
    """Whatever it likes, from all of its vocabulary."""
    talk = random_talk(Writer(world.params, world.cfg, world.tokenizer))
    for text in ("a", "b"):
        said(talk.say(text))
        assert_as_if_read(talk)


def test_nothing_is_read_twice(scripted, monkeypatch):
    """Each turn reads its own text, and of the reply at most what its last calls wrote."""
    questions, again = [], []
    monkeypatch.setattr(session, "CALL_SECONDS", 1e9)  # 2, 4 and 8 tokens a call
    monkeypatch.setattr(chat, "prefill", lambda *a, **k: questions.extend(a[1]) or prefill(*a, **k))
    monkeypatch.setattr(chat, "extend", lambda *a, **k: again.append(a[2]) or extend(*a, **k))
    telling(scripted, " Hi.\n\nUser: b", " Yes.\n\nUser: c", " Nothing.")
    talk = Conversation(scripted, TEMPLATES["g1"], max_tokens=15)
    for text in ("a", "b", "c"):
        said(talk.say(text))
    ids = scripted.tokenizer.encode
    assert questions == [ids(f"User: {text}\n\nAssistant:") for text in "abc"]
    # ` H` and ` Y` came first; the calls after them wrote too much.
    assert again == [ids("i.\n\n"), ids("es.\n\n"), ids("\n\n")]


def test_same_seed_same_text(writer7):
    first, second = random_talk(writer7), random_talk(writer7)
    for text in ("a", "b"):
        assert said(first.say(text)) == said(second.say(text))
    assert first.seed == 7
    first.reset()
    first.seed = 5
    assert said(first.say("a")) != said(random_talk(writer7, seed=6).say("a"))
    assert first.tokens == second.tokens[: len(first.tokens)]


def test_retry(writer7):
    """Another reply in place of the last one: as if that one had never been."""
    talk, other = random_talk(writer7), random_talk(writer7)
    said(talk.say("a")), said(other.say("a"))
    first = said(talk.say("b"))
    second, third = said(talk.retry()), said(talk.retry())
    assert len({first, second, third}) == 3 and talk.seed == 9
    other.seed = 8
    assert said(other.say("b")) == third
    assert (talk.tokens, talk.exchanges) == (other.tokens, 2)
    assert (talk.logits == other.logits).all()
    other.seed = 6
    assert said(other.retry()) == first


def test_retry_with_another_way_to_think_reads_the_question_again(scripted):
    talk = Conversation(telling(scripted, " Yes.\0", ">\nWell</think>No.\0"), TEMPLATES["g1"])
    said(talk.say("a"))
    talk.think = "a bit"
    assert said(talk.retry()) == ("No.", "end")
    assert talk.transcript == ("User: a (think a bit)\n\nAssistant: <think>\nWell</think>No.\n\n")
    assert_as_if_read(talk)


def test_undo(writer7):
    talk = random_talk(writer7)
    said(talk.say("a"))
    tokens, state, logits = talk.tokens, talk.state, talk.logits
    first = said(talk.say("b"))
    talk.undo()
    assert (talk.tokens, talk.exchanges) == (tokens, 1)
    jax.tree.map(np.testing.assert_array_equal, (talk.state, talk.logits), (state, logits))
    talk.seed = 6
    assert said(talk.say("b")) == first
    talk.undo()
    talk.seed = 5
    assert said(talk.retry())[0]  # of the first question, which is read again
    assert talk.tokens == tokens
    assert_as_if_read(talk)
    talk.undo()
    assert talk.tokens == [] and talk.exchanges == 0
    for action in (talk.undo, talk.retry):
        with pytest.raises(UserError, match="no exchange to go back to"):
            action()


def test_no_more_than_some_exchanges_can_be_undone(scripted, monkeypatch):
    talk = Conversation(telling(scripted, *["\0"] * (chat.KEPT + 3)), TEMPLATES["g1"])
    for _ in range(chat.KEPT + 3):
        said(talk.say("a"))
    assert sum(question.rows is not None for question in talk._questions) == 1
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


def test_from_a_start(writer7):
    """A state alone, as a tuned one is, or with logits: turns are read from there."""
    rows = prefill(writer7.params, [[5, 6, 7]], [0], cfg=writer7.cfg, end=0)
    for logits in (None, rows.logits):
        start = Start(rows.state, writer7.cfg, logits)
        talk = random_talk(writer7, start=start)
        first = said(talk.say("a"))
        read = prefill(writer7.params, [[5, 6, 7, *talk.tokens]], [0], cfg=writer7.cfg, end=0)
        assert_close(talk.logits, read.logits, "float32")
        talk.reset()
        talk.seed = 5
        assert said(talk.say("a")) == first


@pytest.mark.parametrize("cut", [False, True], ids=["after a reply", "in a reply"])
def test_resumed(writer7, cut):
    """Whatever it was, it goes on as if it had never stopped."""
    talk = random_talk(writer7, system="Be kind.", think="a bit", sampling=Sampling(top_k=9))
    said(talk.say("a"))
    pieces = talk.say("b")
    _ = next(pieces) if cut else said(pieces)
    again = Conversation.resumed(writer7, talk.state, talk.logits, talk.notes())
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


def test_notes_of_something_else(writer7):
    talk = random_talk(writer7)
    said(talk.say("a"))
    notes, state, logits = talk.notes(), talk.state, talk.logits
    edits = ("top_p", "top"), ('"seed": 6', '"seed": "6"'), ('"tokens": [', '"tokens": [-1, ')
    edited = [notes["chat"].replace(*edit) for edit in edits]
    for damaged in ("", "[]", "{}", '{"tokens": 1}', *edited):
        with pytest.raises(UserError, match="no conversation goes with this state"):
            Conversation.resumed(writer7, state, logits, notes | {"chat": damaged})
    with pytest.raises(UserError, match="the tokenizer world, and this is bytes"):
        Conversation.resumed(writer7, state, logits, notes | {"tokenizer": "world"})
    with pytest.raises(UserError, match="no conversation goes"):
        Conversation.resumed(writer7, state, logits, {"tokenizer": "bytes"})
    with pytest.raises(UserError, match="no conversation goes"):
        Conversation.resumed(writer7, state, None, notes)


def test_what_cannot_be(writer7):
    talk = random_talk(writer7)
    with pytest.raises(UserError, match="say something"):
        talk.say(" \r\n")
    for nothing in ("state", "logits"):
        with pytest.raises(UserError, match="nothing was said yet"):
            getattr(talk, nothing)
    with pytest.raises(UserError, match="'Be kind': this template has none"):
        Conversation(writer7, TEMPLATES["raven"], system="Be kind")
    for setting, message in (("seed", "seed -1: between"), ("max_tokens", "tokens -1: 0 or more")):
        with pytest.raises(UserError, match=message):
            random_talk(writer7, **{setting: -1}).say("a")
