"""Streams of text: chunks, stop strings, seeds, and the state of a session."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax import states
from rwkv_jax.data.tokenizers import ByteTokenizer, StreamDecoder, open_tokenizer
from rwkv_jax.errors import UserError
from rwkv_jax.sampling import (
    Generator,
    Prefix,
    Sampling,
    Session,
    generate,
    generate_with,
    stream,
)
from rwkv_jax.sampling.chat import Conversation, ReplySettings
from rwkv_jax.sampling.decode import NOT_FINITE, decoding_layout
from rwkv_jax.sampling.stream import TokenReader, vocabulary_of
from tests.sampling.conftest import VOCAB, config, weights

PROMPTS = ["def", "", "é"]
WILD = Sampling(top_p=1.0)


class Ascii(ByteTokenizer):
    """Every token is printable, so that texts compare character by character."""

    def decode_bytes(self, ids):
        return bytes(33 + i % 90 for i in map(int, ids) if i != self.eod)


@pytest.fixture(scope="module")
def ascii_generator():
    return Generator(weights("7"), config("7"), Ascii())


def texts(chunks, count):
    joined = [""] * count
    for chunk in chunks:
        joined[chunk.index] += chunk.text
    return joined


def text(chunks):
    return "".join(chunk.text for chunk in chunks)


@pytest.fixture(params=[0.0, 1e9], ids=["a token a call", "as many as fit a call"])
def pace(request, monkeypatch):
    monkeypatch.setattr(stream, "CALL_SECONDS", request.param)


def test_chunks_are_the_text_of_the_tokens(generator7, pace):
    """Streamed bytes, many of them halves of characters, equal those decoded at once."""
    prompts = [generator7.tokenizer.encode(prompt) for prompt in PROMPTS]
    decoding = generator7.prefill(prompts, [1, 2, 3])
    tokens, _ = generator7.decode(decoding, WILD.batched(3), 60)
    chunks = list(generate_with(generator7, PROMPTS, max_tokens=60, sampling=WILD, seed=1))
    assert len(chunks) > 10
    for index, joined in enumerate(texts(chunks, 3)):
        mine = [chunk for chunk in chunks if chunk.index == index]
        assert [chunk.finish for chunk in mine[:-1]] == [""] * (len(mine) - 1)
        used = sum(chunk.tokens for chunk in mine)
        row = tokens[index, :used].tolist()
        if mine[-1].finish == "end":
            assert row.index(0) == used - 1
        else:
            assert mine[-1].finish == "length" and used == 60 and 0 not in row
        whole = generator7.tokenizer.decode_bytes(row).decode(errors="replace")
        # A character cut off by the length is omitted.
        assert whole.startswith(joined) and set(whole[len(joined) :]) <= {"\ufffd"}
        assert len(whole) - len(joined) <= 1


def test_seeds(generator7):
    first = texts(generate_with(generator7, PROMPTS, max_tokens=30, seed=7), 3)
    assert first == texts(generate_with(generator7, PROMPTS, max_tokens=30, seed=7), 3)
    assert first[1] == text(generate_with(generator7, [""], max_tokens=30, seed=8))
    assert first[1] != text(generate_with(generator7, [""], max_tokens=30, seed=9))
    assert text(generate_with(generator7, [""], max_tokens=3, seed=2**32 - 1))


def test_generate_is_the_front_door():
    params, cfg = weights("4"), config("4")
    options = {"max_tokens": 20, "sampling": Sampling(temperature=0.5, top_k=5), "seed": 3}
    chunks = generate(params, cfg, Ascii(), ["a", "b"], **options)
    again = generate_with(Generator(params, cfg, Ascii()), ["a", "b"], **options)
    assert texts(chunks, 2) == texts(again, 2)


def test_stop_strings(ascii_generator, pace):
    free = text(generate_with(ascii_generator, ["x"], max_tokens=60, seed=1, sampling=WILD))
    stops = [free[20:23], free[40:42]]
    *_, last = chunks = list(
        generate_with(ascii_generator, ["x"], max_tokens=60, seed=1, sampling=WILD, stop=stops)
    )
    assert last.finish == "stop"
    assert text(chunks) == free[: free.index(stops[0])]
    assert sum(chunk.tokens for chunk in chunks) == free.index(stops[0]) + 3


def test_a_held_back_beginning_is_printed_at_the_end(ascii_generator):
    free = text(generate_with(ascii_generator, ["x"], max_tokens=10, seed=1))
    stop = [free[-2:] + "\n"]
    assert text(generate_with(ascii_generator, ["x"], max_tokens=10, seed=1, stop=stop)) == free


def test_one_row_stopping_leaves_the_others(ascii_generator):
    free = texts(generate_with(ascii_generator, ["x", "y"], max_tokens=40, seed=1), 2)
    stop = next(c for c in free[0] if c not in free[1])
    stopped = texts(
        generate_with(ascii_generator, ["x", "y"], max_tokens=40, seed=1, stop=[stop]), 2
    )
    assert stopped == [free[0][: free[0].index(stop)], free[1]]


def test_a_session_continues_the_same_text(ascii_generator, pace):
    whole = text(generate_with(ascii_generator, ["once"], max_tokens=50, seed=4, sampling=WILD))
    talk = Session(ascii_generator, seed=4)
    talk.feed("on")
    talk.feed("")
    talk.feed("ce")
    parts = [text(talk.stream(max_tokens=n, sampling=WILD)) for n in (1, 20, 0, 29)]
    assert "".join(parts) == whole


def test_after_a_stop_string_the_session_continues_behind_it(ascii_generator, pace):
    whole = text(generate_with(ascii_generator, ["once"], max_tokens=50, seed=4, sampling=WILD))
    stop = whole[17:20]
    talk = Session(ascii_generator, seed=4)
    talk.feed("once")
    before = text(talk.stream(max_tokens=50, sampling=WILD, stop=[stop]))
    rest = text(talk.stream(max_tokens=50 - len(before + stop), sampling=WILD))
    assert before + stop + rest == whole


def test_a_stream_left_early_leaves_the_state_after_the_last_chunk(ascii_generator):
    whole = text(generate_with(ascii_generator, ["once"], max_tokens=50, seed=4, sampling=WILD))
    talk = Session(ascii_generator, seed=4)
    talk.feed("once")
    shown = ""
    for chunk in talk.stream(max_tokens=50, sampling=WILD):
        shown += chunk.text
        if len(shown) > 5:
            break
    assert len(shown) < 50
    assert shown + text(talk.stream(max_tokens=50 - len(shown), sampling=WILD)) == whole


def test_a_stream_ends_when_something_else_is_read_or_written(ascii_generator):
    """Nothing that was fed is lost."""

    def after(action):
        session = Session(ascii_generator, seed=3)
        session.feed("ab")
        chunks = session.stream(max_tokens=40, sampling=WILD)
        next(chunks)
        action(session)
        logits = np.asarray(session.logits)
        assert list(chunks) == []
        np.testing.assert_array_equal(session.logits, logits)
        return logits

    untouched = after(lambda session: session.feed(""))
    assert not np.array_equal(after(lambda session: session.feed("Z")), untouched)
    after(lambda session: text(session.stream(max_tokens=3, sampling=WILD)))
    after(lambda session: session.reset())


def test_a_prefix_must_be_one(ascii_generator):
    state = ascii_generator.prefill([[1]], [0]).state
    unchecked = inspect.unwrap(Session.__init__)  # by the type checks of the tests
    with pytest.raises(ValueError, match="prefix must be a Prefix, got State: Prefix"):
        unchecked(object.__new__(Session), ascii_generator, 0, state)


@pytest.mark.parametrize("spec", [(), (None,)])
def test_generate_on_an_explicit_mesh(spec):
    """With replicated parameters, the text is that of one device."""
    prompts = [*"abcdefgh"]
    expected = texts(generate(weights("7"), config("7"), Ascii(), prompts, max_tokens=5), 8)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        params = jax.device_put(weights("7"), place) if not spec else weights("7")
        found = texts(generate(params, config("7"), Ascii(), prompts, max_tokens=5), 8)
    assert found == expected


def test_reset_and_reseed(ascii_generator):
    talk = Session(ascii_generator, seed=4)
    first = text(talk.stream(max_tokens=20))
    talk.reset()
    assert text(talk.stream(max_tokens=20)) == first
    talk.reset(5)
    other = text(talk.stream(max_tokens=20))
    talk.reset()
    talk.reseed(4)
    assert text(talk.stream(max_tokens=20)) == first != other
    with pytest.raises(UserError, match="seed -1: between 0"):
        talk.reset(-1)
    assert talk.seed == 4


def test_after_the_end_of_a_document_a_new_one_starts():
    """The end token is replaced by one that the model certainly writes."""
    tokenizer = Ascii()
    generator = Generator(weights("7"), config("7"), tokenizer)
    greedy = Sampling(temperature=0.0, presence_penalty=0.0, frequency_penalty=0.0)
    decoding = generator.prefill([tokenizer.encode("once")], [0])
    tokenizer.eod = int(generator.decode(decoding, greedy.batched(1), 5)[0][0, 4])
    for text_after in ("twice", ""):
        talk = Session(generator, seed=0)
        talk.feed("once")
        *_, last = list(talk.stream(max_tokens=50, sampling=greedy))
        assert last.finish == "end"
        talk.feed(text_after)
        document = [tokenizer.eod, *tokenizer.encode(text_after)]
        decoding = generator.prefill([document], [0])
        ids = generator.decode(decoding, greedy.batched(1), 20)[0][0].tolist()
        expected = tokenizer.decode_bytes(ids[: [*ids, tokenizer.eod].index(tokenizer.eod)])
        assert text(talk.stream(max_tokens=20, sampling=greedy)) == expected.decode()


def test_zero_tokens(generator7):
    (chunk,) = generate_with(generator7, ["a"], max_tokens=0)
    assert (chunk.text, chunk.tokens, chunk.finish) == ("", 0, "length")


@pytest.mark.parametrize(
    "setting, value",
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("top_k", 2**31),
        ("penalty_decay", 1.5),
        ("presence_penalty", float("inf")),
        ("frequency_penalty", float("nan")),
    ],
)
def test_settings_out_of_range(setting, value):
    with pytest.raises(UserError, match=f"^{setting} {value}: .+$"):
        Sampling(**{setting: value})


def test_other_bad_input(generator7):
    for seed in (-1, 2**32):
        with pytest.raises(UserError, match=f"seed {seed}"):
            generate_with(generator7, ["a"], seed=seed)
    with pytest.raises(UserError, match="tokens -1"):
        generate_with(generator7, ["a"], max_tokens=-1)
    small = ByteTokenizer()
    small.vocab_size = 300
    with pytest.raises(UserError, match="300 tokens and the model 260"):
        Generator(weights("7"), config("7"), small)


def test_the_end_of_a_document_counts():
    """As any token whose text is empty does; PyPI `rwkv` counts it for the World vocabulary."""
    vocabulary = vocabulary_of(open_tokenizer("world"), 65536)
    assert np.flatnonzero(~np.asarray(vocabulary.allowed)).tolist() == list(range(65530, 65536))
    increment = np.asarray(vocabulary.increment)
    assert increment[0] == 1 and increment[65530:].all()
    assert np.flatnonzero(increment == 0).tolist()[:4] == [10, 33, 49, 50]


def test_blanks_and_digits_are_not_counted(generator7):
    increment = np.asarray(generator7.vocabulary.increment)
    nothing = [*(1 + byte for byte in b" \t0123456789")]
    assert sorted(np.flatnonzero(increment == 0)) == sorted(nothing)


@pytest.mark.parametrize("committed", [False, True], ids=["uncommitted", "committed"])
def test_decoding_is_compiled_once_whatever_happens_in_between(committed, caplog):
    """Weights of a checkpoint are committed to a device, fresh ones are not."""
    sizes = {"layers": 1, "vocab_size": VOCAB + committed}  # that no other test has compiled
    params = weights("7", **sizes)
    params = jax.device_put(params, jax.devices()[0]) if committed else params
    generator = Generator(params, config("7", **sizes), Ascii())
    with jax.log_compiles():
        own = Session(generator, seed=1)
        for _ in range(2):
            own.feed("def")
            list(own.stream(max_tokens=9))
            list(own.stream(max_tokens=9))
            own.reseed(5)
            list(own.stream(max_tokens=9))
            own.reset()
    done = [r.getMessage() for r in caplog.records if "Finished XLA compilation" in r.getMessage()]
    assert sum("jit(decode)" in message for message in done) == 1


def test_a_document_starts_at_the_prefix_again(generator7):
    """With its logits a new text starts there; without them, only a prompt can start one."""
    first = Session(generator7, 1)
    first.feed("def")
    prefix = Prefix(first.state, generator7.cfg, first.logits)
    session = Session(generator7, 1, prefix)
    expected = text(session.stream(max_tokens=8))
    session.started = False  # as after the end of a document
    session.reseed(1)
    assert text(session.stream(max_tokens=8)) == expected
    silent = Session(generator7, 1, Prefix(first.state, generator7.cfg))
    assert not silent.started
    assert states.compare(silent.state, first.state)[-1].relative == 0
    with pytest.raises(UserError, match="no logits of the next token"):
        next(silent.stream(max_tokens=8))
    silent.feed(" f")
    first.feed(" f")
    assert max(row.relative for row in states.compare(silent.state, first.state)) < 1e-6


def test_decoding_keeps_decays_in_float32():
    """Also with bfloat16 matrices: version 5.2 has a decay per head and channel."""
    for version in ("5.2", "6", "7a"):
        params = decoding_layout(weights(version), config(version), jnp.bfloat16)
        att = params.blocks[0].att
        names = ("w0", "r_k") if version == "7a" else ("time_decay", "time_faaaa")
        assert {getattr(att, name).dtype for name in names} == {jnp.dtype("float32")}
        factors = {"5.2": (), "6": ("time_maa_w2", "time_decay_w1"), "7a": ("w1", "g2")}[version]
        assert {getattr(att, name).dtype for name in factors} <= {jnp.dtype("bfloat16")}
        assert params.head.dtype == jnp.bfloat16


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_predicts_nan_is_an_error(temperature):
    """One line, however the text is sampled; no error if the text ends before."""
    params, tokenizer = weights("7"), ByteTokenizer()
    broken = params.replace(emb=params.emb.at[tokenizer.encode("x")[0]].set(jnp.nan))
    generator, sampling = (
        Generator(broken, config("7"), tokenizer),
        Sampling(temperature=temperature),
    )
    one = Session(generator)
    one.feed("ax")
    for chunks in (
        generate_with(generator, ["ax"], sampling=sampling),
        generate_with(generator, ["a", "x"], sampling=sampling),
        one.stream(sampling=sampling),
        Conversation(generator, settings=ReplySettings(sampling=sampling)).say("ax"),
    ):
        with pytest.raises(UserError, match="the model predicts NaN"):
            list(chunks)
    reader = TokenReader(0, StreamDecoder(tokenizer), tokenizer.eod, ["b"])
    chunk = reader.read(np.array([*tokenizer.encode("ab"), NOT_FINITE]))
    assert (chunk.text, chunk.finish) == ("a", "stop")
