"""A model that writes: `Generator`, the one decode loop (`Stream`) and `generate`.

The text depends on parameters, prompt, settings and seed, not on how it is cut into chunks.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax.checkpoint.fingerprint import fingerprint
from rwkv_jax.config import ModelConfig
from rwkv_jax.data.tokenizers import StreamDecoder, Tokenizer, token_bytes
from rwkv_jax.errors import PREDICTS_NAN, UserError
from rwkv_jax.models import Model
from rwkv_jax.models.checks import check_config
from rwkv_jax.sampling import decode as device
from rwkv_jax.sampling.decode import BLOCK, NO_TOKEN, NOT_FINITE, DecodeState, Prefix
from rwkv_jax.sampling.presets import sampling_of
from rwkv_jax.sampling.prompts import Prompt, as_ids
from rwkv_jax.sampling.scores import TokenScore, check_alternatives, score
from rwkv_jax.sampling.settings import MAX_SEED, Sampling, check_max_tokens, check_seed
from rwkv_jax.sampling.text import StopStrings
from rwkv_jax.sampling.transforms import Settings, Vocabulary
from rwkv_jax.typing import Array

UNCOUNTED = " \t0123456789"
"""Tokens whose text is a part of this, and not empty, add nothing to the frequency penalty."""

NO_LOGITS = "the state to start from has no logits of the next token: give a prompt"

CALL_SECONDS = 0.1
"""A call to the device decodes about as many tokens as take this long: text should flow."""

Finish = Literal["", "stop", "end", "length"]
"""Why a text ended: a stop string, the end of the document, or `max_tokens`. Empty: not ended."""


class Generator:
    """A model and its tokenizer, prepared for decoding: make one, use it for many texts.

    `report` is called with the tokens read so far, and their total, while prompts are read and when
    they are. Raises `UserError` if the tokenizer has more tokens than the model.
    """

    def __init__(
        self,
        params: Model[Array],
        cfg: ModelConfig,
        tokenizer: Tokenizer,
        report: Callable[[int, int], None] = lambda done, total: None,
    ):
        check_config(cfg)
        if not hasattr(tokenizer, "vocab_size"):
            raise ValueError(
                f"tokenizer is {type(tokenizer).__name__}, not a tokenizer: `load_with_tokenizer`"
                " returns params, cfg and tokenizer"
            )
        if tokenizer.vocab_size > cfg.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model {cfg.vocab_size}: "
                "they do not belong together; use the tokenizer that the model was trained with"
            )
        self.params = device.decoding_layout(params, cfg)
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary_of(tokenizer, cfg.vocab_size)
        self.report = report

    @cached_property
    def weights(self) -> str:
        """The fingerprint of the model."""
        return fingerprint(self.params, self.cfg)

    def check_tokenizer(self, identity: str | None) -> None:
        """Raises `UserError` if a state was written with another tokenizer. None: not recorded."""
        if identity not in (None, ours := self.tokenizer.identity()):
            raise UserError(
                f"written with the tokenizer {identity}, but this is {ours}; use the model that"
                " it was written with"
            )

    def prefill(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], prefix: Prefix | None = None
    ) -> DecodeState[Array]:
        """`decode.prefill`. Raises `UserError` for a seed out of range, and for an empty prompt
        after a prefix without logits."""
        for seed in seeds:
            check_seed(seed)
        if prefix is not None and prefix.logits is None and not all(prompts):
            raise UserError(NO_LOGITS)
        eod = self.tokenizer.eod
        with self._reported(sum(map(len, prompts))) as report:
            return device.prefill(
                self.params, prompts, seeds, cfg=self.cfg, end=eod, prefix=prefix, report=report
            )

    def extend(self, decoding: DecodeState[Array], tokens: Sequence[int]) -> DecodeState[Array]:
        """Reads `tokens` into every row, and reports progress (`decode.extend`)."""
        with self._reported(len(tokens)) as report:
            return device.extend(self.params, decoding, tokens, cfg=self.cfg, report=report)

    @contextlib.contextmanager
    def _reported(self, total: int) -> Iterator[Callable[[int], None]]:
        """A function that adds to the tokens read."""
        done = 0

        def add(tokens: int) -> None:
            nonlocal done
            done += tokens
            self.report(done, total)

        yield add
        self.report(total, total)

    def restart(
        self, decoding: DecodeState[Array], prefix: Prefix | None = None
    ) -> DecodeState[Array]:
        """Rows that start a new document, or from `prefix` (`decode.restart`)."""
        return device.restart(self.params, decoding, cfg=self.cfg, prefix=prefix)

    def decode(
        self, decoding: DecodeState[Array], settings: Settings[Array], steps: int
    ) -> tuple[np.ndarray, DecodeState[Array]]:
        """`decode.decode`, the tokens as int32 [b, steps] on the host."""
        # JAX would compile again if some of the arrays were committed to a device, others not.
        place = decoding.logits.sharding
        if len(place.device_set) == 1:
            decoding = jax.device_put(decoding, place)
        eod = self.tokenizer.eod
        tokens, decoding = device.decode(
            self.params, decoding, settings, self.vocabulary, steps, cfg=self.cfg, end=eod
        )
        return np.asarray(tokens)[:, :steps], decoding


def vocabulary_of(tokenizer: Tokenizer, vocab_size: int) -> Vocabulary[Array]:
    """The `Vocabulary` of a model with `vocab_size` rows."""
    increment, uncounted = np.ones(vocab_size, np.float32), UNCOUNTED.encode()
    for token, text in enumerate(token_bytes(tokenizer)):
        if 0 < len(text) <= len(uncounted) and text in uncounted:
            increment[token] = 0
    allowed = np.arange(vocab_size) < tokenizer.vocab_size
    allowed[list(tokenizer.unused)] = False
    return Vocabulary(allowed=jnp.asarray(allowed), increment=jnp.asarray(increment))


@dataclass(frozen=True)
class TextChunk:
    """New text of one prompt. The last chunk of a prompt has a `finish`."""

    index: int
    """Index of the prompt."""
    text: str
    tokens: int
    """Number of tokens drawn for it."""
    finish: Finish = ""
    logprobs: tuple[TokenScore, ...] = ()
    """One for each of its tokens, if asked for."""
    drawn: float = field(default=0.0, compare=False)
    """When its tokens were drawn (`time.perf_counter`): the same for all of one call."""


class BlockSizer:
    """The number of tokens in the next block: one at first, then about `CALL_SECONDS` worth."""

    def __init__(self):
        self._tokens = 1
        self._since = time.perf_counter()

    def next(self, left: int) -> int:
        """At most `left`. A slow call halves the size at most, as the first one compiles."""
        now = time.perf_counter()
        elapsed, self._since = now - self._since, now
        self._tokens = min(2 * self._tokens, BLOCK) if elapsed < CALL_SECONDS / 2 else self._tokens
        self._tokens = max(self._tokens // 2, 1) if elapsed > 2 * CALL_SECONDS else self._tokens
        return min(self._tokens, left)


class TokenReader:
    """Turns the tokens of one row into text, up to the end of the text."""

    def __init__(self, index: int, decoder: StreamDecoder, eod: int, stop: Sequence[str]):
        self._index = index
        self._decoder = decoder
        self._eod = eod
        self._gate = StopStrings(stop)
        self.finish: Finish = ""
        self.ids: list[int] = []
        """All tokens read, without the end of the document."""

    def read(self, block: np.ndarray) -> TextChunk:
        """The text that more tokens complete. Raises `UserError` if the model predicts NaN before
        the text ends."""
        text, used = [], 0
        for token in block.tolist():
            if self.finish or token == NO_TOKEN:
                break
            if token == NOT_FINITE:
                raise UserError(PREDICTS_NAN)
            text.append(self._push(token))
            used += 1
        return TextChunk(self._index, "".join(text), used, self.finish)

    def _push(self, token: int) -> str:
        if token == self._eod:
            self.finish = "end"
            return self._gate.push(self._decoder.finish()) + self._gate.flush()
        self.ids.append(token)
        text = self._gate.push(self._decoder.push([token]))
        if self._gate.reached:
            self.finish = "stop"
        return text

    def cut(self) -> TextChunk:
        """Ends the text at `max_tokens`, with what was held back as the start of a stop string;
        half a character is dropped."""
        self.finish = "length"
        return TextChunk(self._index, self._gate.flush(), 0, "length")


class Stream:
    """Iterates over the texts that continue the rows of `decoding`, in `TextChunk`s.

    Tokens are decoded block by block, as chunks are asked for. A block may run past a stop string;
    `state_after` undoes that. `decoders` know the text that each row continues. With `logprobs`,
    the number of alternatives to each token, a block is one token.
    """

    def __init__(
        self,
        generator: Generator,
        decoding: DecodeState[Array],
        sampling: Sampling,
        max_tokens: int,
        stop: Sequence[str] = (),
        decoders: Sequence[StreamDecoder] = (),
        logprobs: int | None = None,
    ):
        batch, tokenizer = decoding.done.shape[0], generator.tokenizer
        self._generator = generator
        self._settings = sampling.batched(batch)
        self._max_tokens = max_tokens
        self._logprobs = logprobs
        self._before, self._steps = decoding, 0
        self.decoding = decoding
        """The state after the last block."""
        decoders = decoders or [StreamDecoder(tokenizer) for _ in range(batch)]
        self.readers = [
            TokenReader(index, decoder, tokenizer.eod, stop)
            for index, decoder in enumerate(decoders)
        ]

    def __iter__(self) -> Iterator[TextChunk]:
        sizer, left = BlockSizer(), self._max_tokens
        while left and not all(reader.finish for reader in self.readers):
            # The device does not know about stop strings.
            done = np.asarray([bool(reader.finish) for reader in self.readers])
            self._before = replace(self.decoding, done=jnp.asarray(done))
            self._steps = sizer.next(left) if self._logprobs is None else 1
            block, self.decoding = self._generator.decode(self._before, self._settings, self._steps)
            left, drawn = left - self._steps, time.perf_counter()
            scores = self._scores(block)
            for reader, tokens, row in zip(self.readers, block, scores, strict=True):
                if not reader.finish:
                    yield replace(reader.read(tokens), logprobs=row, drawn=drawn)
        for reader in self.readers:
            if not reader.finish:
                yield reader.cut()

    def _scores(self, block: np.ndarray) -> list[tuple[TokenScore, ...]]:
        if self._logprobs is None:
            return [()] * len(block)
        allowed = self._generator.vocabulary.allowed
        scores = score(self._before.logits, allowed, block[:, 0], self._logprobs)
        return [() if one is None else (one,) for one in scores]

    def state_after(self, chunk: TextChunk) -> DecodeState[Array]:
        """The state after the last chunk of a single row.

        If a stop string ended it inside a block, the same tokens are decoded again up to there.
        """
        if chunk.finish == "stop" and chunk.tokens < self._steps:
            return self._generator.decode(self._before, self._settings, chunk.tokens)[1]
        return self.decoding


def generate(
    params: Model[Array],
    cfg: ModelConfig,
    tokenizer: Tokenizer,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_tokens: int = 200,
    sampling: Sampling | str | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    logprobs: int | None = None,
) -> Iterator[TextChunk]:
    """Continues each prompt, as a stream of chunks; the prompts are decoded as one batch.

    A prompt is a text, in which the names of special tokens are those tokens, or a list of token
    ids; one alone is a batch of one.

    Prompt i is drawn with seed `seed + i` (modulo 2**32): alone with that seed it gives the same
    text. An empty prompt starts a document. A text ends with its document, at a stop string (never
    part of the text), or after `max_tokens`. `sampling` is a `Sampling`, or the name of a preset.
    With `logprobs`, a number of alternatives, chunks have the log p of their tokens, at the price
    of a call to the device for each. To use a model many times, make a `Generator` once and call
    `generate_with`.

    Raises `UserError` for a setting out of range, at the call; and during iteration, if the model
    predicts NaN.

    >>> chunks = generate(params, cfg, tokenizer, ["def main("], max_tokens=50)  # doctest: +SKIP
    >>> print("".join(chunk.text for chunk in chunks))  # doctest: +SKIP
    """
    generator = Generator(params, cfg, tokenizer)
    return generate_with(
        generator,
        prompts,
        max_tokens=max_tokens,
        sampling=sampling,
        seed=seed,
        stop=stop,
        logprobs=logprobs,
    )


def generate_with(
    generator: Generator,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_tokens: int = 200,
    sampling: Sampling | str | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    prefix: Prefix | None = None,
    logprobs: int | None = None,
) -> Iterator[TextChunk]:
    """`generate` with an existing `Generator`; every prompt follows `prefix`, if given."""
    check_max_tokens(max_tokens)
    check_seed(seed)
    check_alternatives(logprobs)
    sampling = sampling_of(sampling)
    if not isinstance(stop, str) and "" in stop:
        raise UserError("stop holds an empty string; give texts to stop before")
    tokens = as_ids(generator.tokenizer, prompts, continue_text=prefix is not None)
    seeds = [(seed + index) % (MAX_SEED + 1) for index in range(len(tokens))]
    decoding = generator.prefill(tokens, seeds, prefix)
    decoders = [StreamDecoder(generator.tokenizer, ids) for ids in tokens]
    return iter(Stream(generator, decoding, sampling, max_tokens, stop, decoders, logprobs))
