"""Prompts as texts and as ids, and the log-probabilities of what follows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import assert_close

from rwkv_jax.data.bpe import train_bpe
from rwkv_jax.data.conversations import FLOWER
from rwkv_jax.data.tokenizers import JsonTokenizer, open_tokenizer
from rwkv_jax.errors import UserError
from rwkv_jax.models import forward
from rwkv_jax.sampling import Generator, Sampling, Session, generate_with
from rwkv_jax.sampling.prompts import as_ids, between
from tests.sampling.conftest import VOCAB, config, weights


def texts(chunks):
    joined = {}
    for chunk in chunks:
        joined[chunk.index] = joined.get(chunk.index, "") + chunk.text
    return joined


def test_texts_and_ids_are_the_same_prompts(generator7):
    ids = generator7.tokenizer.encode("def")
    first = texts(generate_with(generator7, ["def", "x"], max_tokens=8, seed=3))
    for prompts in (
        [ids, "x"],
        [np.array(ids, np.uint16), "x"],
        [tuple(ids), "x"],
        [jnp.array(ids), "x"],
    ):
        assert texts(generate_with(generator7, prompts, max_tokens=8, seed=3)) == first
    for one in ("def", ids, np.array(ids), jnp.array(ids), jnp.array([ids])):
        assert texts(generate_with(generator7, one, max_tokens=8, seed=3)) == {0: first[0]}
    session = Session(generator7, seed=3)
    session.feed(ids)
    assert texts(session.stream(max_tokens=8)) == {0: first[0]}


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([], "no prompts: give at least one"),
        ([[3, 257]], r"prompt with the token 257: the tokenizer has the ids 0 to 256"),
        ([[-1]], "prompt with the token -1"),
        ([[1.5]], "prompt with 1.5: a text, or a list of token ids"),
        ([[True]], "prompt with True"),
        ([[2, "a"]], "prompt with 'a'"),
        (b"abc", "prompt b'abc': a text, or a list"),
        (None, "prompt None: a text, or a list"),
        ({"def"}, "prompt {'def'}: a text, or a list"),
        (["def", None], "prompt None: a text"),
        (np.ones(3), "prompt 1.0: a text"),
        (jnp.array(5), "prompt 5: a text"),
    ],
)
def test_what_is_no_prompt(generator7, prompts, message):
    with pytest.raises(UserError, match=message):
        as_ids(generator7.tokenizer, prompts)


def test_special_tokens_are_tokens_in_prompts():
    made = train_bpe(["a b c"], 300)
    made.add_special_tokens(["<|x|>"])
    tokenizer = JsonTokenizer(made.to_str(), "file", "x")
    [ids] = as_ids(tokenizer, "a<|x|>")
    assert ids[-1] == made.token_to_id("<|x|>") and len(ids) == 2
    [letters] = as_ids(tokenizer.with_special_tokens(False), "a<|x|>")
    assert letters == tokenizer.encode("a<|x|>") != ids


def test_a_text_between_two():
    world = open_tokenizer("world")
    ids = between(world, "def f(", ")\n")
    assert ids[0] == world.eod and ids.count(10060) == 6
    text = f"{FLOWER}prefix{FLOWER}{FLOWER}suffix{FLOWER})\n{FLOWER}middle{FLOWER}def f("
    assert world.decode_bytes(ids).decode() == text


def test_the_last_seed_is_followed_by_the_first(generator7):
    last = texts(generate_with(generator7, ["a", "a"], max_tokens=8, seed=2**32 - 1))
    assert last[1] == texts(generate_with(generator7, "a", max_tokens=8, seed=0))[0]
    with pytest.raises(UserError, match=r"seed 4294967296: between"):
        generate_with(generator7, ["a", "a"], seed=2**32)


def test_one_stop_string_is_not_its_letters(generator7):
    text = texts(generate_with(generator7, "x", max_tokens=8, seed=1))
    assert texts(generate_with(generator7, "x", max_tokens=8, seed=1, stop="\0never")) == text


def test_logprobs_are_those_of_the_model_alone(generator7):
    """Whatever the sampling; and the text is the one without them."""
    sampling = Sampling(temperature=0.7, top_k=5, presence_penalty=1.0, frequency_penalty=1.0)
    limits = {"max_tokens": 8, "seed": 5, "sampling": sampling}
    chunks = list(generate_with(generator7, ["def", "é"], logprobs=3, **limits))
    assert texts(chunks) == texts(generate_with(generator7, ["def", "é"], **limits))
    assert all(len(chunk.logprobs) == chunk.tokens for chunk in chunks)
    run = jax.jit(lambda tokens: forward(weights("7"), tokens, cfg=config("7"))[0])
    for index, prompt in enumerate(["def", "é"]):
        scores = [one for chunk in chunks if chunk.index == index for one in chunk.logprobs]
        before = generator7.tokenizer.encode(prompt)
        tokens = [*before, *(one.token for one in scores)]
        logits = run(np.asarray([tokens]))[0, len(before) - 1 : -1]
        log_p = np.asarray(jax.nn.log_softmax(logits))[:, : generator7.tokenizer.vocab_size]
        drawn = log_p[range(len(scores)), tokens[len(before) :]]
        assert_close(np.array([x.logprob for x in scores]), drawn, "float32")
        for one, row in zip(scores, log_p, strict=True):
            best = np.argsort(-row)[:3]
            assert [token for token, _ in one.top] == best.tolist()
            assert_close(np.array([p for _, p in one.top]), row[best], "float32")


def test_logprobs_out_of_range(generator7):
    for count in (-1, 129):
        with pytest.raises(UserError, match=f"logprobs {count}: between 0 and 128"):
            generate_with(generator7, "a", logprobs=count)
    *_, last = generate_with(generator7, "a", max_tokens=2, logprobs=0)
    assert last.finish == "length" and VOCAB > 128


def test_streams_continue_the_words_of_a_prompt():
    """Where the space between words belongs to no token."""
    from tests.data.test_tokenizers import words

    tokenizer = JsonTokenizer(words("[SEP]").to_str(), "file", "x")
    generator = Generator(weights("7"), config("7"), tokenizer)
    for prompt, begins in (("one two", (" one", " two")), ("", ("one", "two"))):
        text = texts(generate_with(generator, prompt, max_tokens=4, seed=2))[0]
        assert text == "" or text.startswith(begins)
        session = Session(generator, seed=2)
        session.feed(prompt)
        assert "".join(chunk.text for chunk in session.stream(max_tokens=4)) == text
