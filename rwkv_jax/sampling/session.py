"""Text in, text out: `generate` for prompts side by side, `Session` for one text that goes on.

Both stream: each iteration hands out what can be printed so far. The text depends on parameters,
prompt, settings and seed, not on how it is cut into pieces.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax.config import ModelConfig
from rwkv_jax.data.tokenizers import StreamDecoder, Tokenizer
from rwkv_jax.errors import PREDICTS_NAN, UserError
from rwkv_jax.models import Model, State, check_state, stack, unstack
from rwkv_jax.sampling.decode import (
    BLOCK,
    NO_TOKEN,
    NOT_FINITE,
    Rows,
    decode,
    decoding_layout,
    extend,
    forget,
    prefill,
    reseed,
)
from rwkv_jax.sampling.text import StopStrings
from rwkv_jax.sampling.transforms import Settings, Vocabulary
from rwkv_jax.typing import Array, Float

UNCOUNTED = " \t0123456789"
"""Tokens whose text is a substring of this add nothing to the frequency penalty."""

CALL_SECONDS = 0.1
"""A call to the device writes about as many tokens as take this long: text should flow."""

MAX_SEED = 2**32 - 1

SILENT = "the state to start from does not say what comes next: give a prompt to go on with"

Finish = Literal["", "stop", "end", "length"]
"""Why a text ended: a stop string, the end of the document, or `max_tokens`. Empty: it goes on."""


@dataclass(frozen=True)
class Sampling:
    """How text is drawn. The defaults are those of PyPI `rwkv`; `transforms` says what each does.

    Raises `UserError` for a value out of range.
    """

    temperature: float = 1.0
    top_p: float = 0.85
    top_k: int = 0
    presence: float = 0.2
    frequency: float = 0.2
    decay: float = 0.996

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(
                f"temperature {self.temperature}: 0 (always the likeliest token) or more"
            )
        for name in ("top_p", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} {getattr(self, name)}: between 0 and 1")
        if not 0 <= self.top_k <= 2**31 - 1:
            raise UserError(f"top_k {self.top_k}: 0 (no limit) or more")
        for name in ("presence", "frequency"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name} {getattr(self, name)}: a finite number")

    def rows(self, batch: int) -> Settings[Array]:
        """The same for every row of a batch."""
        columns = {field.name: [getattr(self, field.name)] * batch for field in fields(self)}
        kinds = {"top_k": jnp.int32}
        return Settings(
            **{k: jnp.asarray(v, kinds.get(k, jnp.float32)) for k, v in columns.items()}
        )


@dataclass(frozen=True)
class Piece:
    """Some new text of one prompt; the last piece of a prompt says why it is the last."""

    index: int
    """Which prompt."""
    text: str
    tokens: int
    """How many tokens were drawn for it."""
    finish: Finish = ""


class Start:
    """Where texts start instead of at nothing: a state of one row, and the logits of the next token
    if they are known.

    Raises `UserError` unless it is one row of `cfg`'s model.
    """

    def __init__(self, state: State, cfg: ModelConfig, logits: Float[Array, "1 V"] | None = None):
        try:
            check_state(state, cfg, 1)
        except ValueError as error:
            raise UserError(f"{error}; give one row of a state of this model") from None
        self.state = state if isinstance(state.blocks, tuple) else unstack(state)
        self.logits = logits


class Writer:
    """A model and its tokenizer made ready for decoding: make one, use it for many texts.

    Raises `UserError` if the model has fewer tokens than the tokenizer.
    """

    def __init__(self, params: Model[Array], cfg: ModelConfig, tokenizer: Tokenizer):
        if tokenizer.vocab_size > cfg.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model {cfg.vocab_size}: "
                "they do not belong together; take the tokenizer that the model was trained with"
            )
        self.params = decoding_layout(params, cfg)
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary_of(tokenizer, cfg.vocab_size)

    def check_wrote(self, tokenizer: str | None) -> None:
        """Raises `UserError` if a state's `tokenizer`, an identity, is another; None: not known."""
        if tokenizer not in (None, mine := self.tokenizer.identity()):
            raise UserError(
                f"written with the tokenizer {tokenizer}, and this is {mine}; take the model that"
                " it was written with"
            )

    def start(
        self, prompts: Sequence[str], seeds: Sequence[int], start: "Start | None" = None
    ) -> Rows[Array]:
        """Rows that have read their prompts, each from `start` if given.

        Raises `UserError` for a seed out of range, and for a prompt without a token from a start
        that does not know what comes next.
        """
        for seed in seeds:
            check_seed(seed)
        tokens = [self.tokenizer.encode(prompt) for prompt in prompts]
        if start is None:
            return prefill(self.params, tokens, seeds, cfg=self.cfg, end=self.tokenizer.eod)
        if start.logits is None and not all(tokens):
            raise UserError(SILENT)
        return prefill(
            self.params,
            tokens,
            seeds,
            cfg=self.cfg,
            end=self.tokenizer.eod,
            start=start.state,
            start_logits=start.logits,
        )

    def write(
        self, rows: Rows[Array], settings: Settings[Array], tokens: int
    ) -> tuple[np.ndarray, Rows[Array]]:
        """Up to `tokens` more tokens in every row, int32 [b, tokens], and the rows after them; what
        is no token is told by `decode`."""
        # JAX compiles again when some arrays are bound to a device that were not before.
        rows = jax.device_put(rows, rows.logits.sharding)
        written, rows = decode(
            self.params,
            rows,
            settings,
            self.vocabulary,
            tokens,
            cfg=self.cfg,
            end=self.tokenizer.eod,
        )
        return np.asarray(written)[:, :tokens], rows


def vocabulary_of(tokenizer: Tokenizer, vocab_size: int) -> Vocabulary[Array]:
    """What sampling needs to know about the tokens of a model with `vocab_size` of them."""
    increment = np.ones(vocab_size, np.float32)
    for token in range(tokenizer.vocab_size):
        text = tokenizer.decode_bytes([token])
        if len(text) <= len(UNCOUNTED) and text in UNCOUNTED.encode():
            increment[token] = 0
    allowed = np.arange(vocab_size) < tokenizer.vocab_size
    return Vocabulary(allowed=jnp.asarray(allowed), increment=jnp.asarray(increment))


class Reader:
    """Turns one row's tokens into text, and notices its end."""

    def __init__(self, decoder: StreamDecoder, eod: int, stop: Sequence[str]):
        self._decoder = decoder
        self._eod = eod
        self._gate = StopStrings(stop)
        self.finish: Finish = ""

    def push(self, token: int) -> str:
        """The text that this token makes certain."""
        if token == self._eod:
            self.finish = "end"
            return self._gate.push(self._decoder.finish()) + self._gate.flush()
        text = self._gate.push(self._decoder.push([token]))
        if self._gate.reached:
            self.finish = "stop"
        return text

    def cut(self) -> str:
        """What might have become a stop string, as no more tokens come; not half a character."""
        self.finish = "length"
        return self._gate.flush()


class Pace:
    """How many tokens to ask the device for next: one at first, then about `CALL_SECONDS` worth."""

    def __init__(self):
        self._tokens = 1
        self._since = time.perf_counter()

    def next(self, left: int) -> int:
        """The first of all calls compiles, so a slow call lowers the number by half at most."""
        now = time.perf_counter()
        elapsed, self._since = now - self._since, now
        self._tokens = min(2 * self._tokens, BLOCK) if elapsed < CALL_SECONDS / 2 else self._tokens
        self._tokens = max(self._tokens // 2, 1) if elapsed > 2 * CALL_SECONDS else self._tokens
        return min(self._tokens, left)


def generate(
    params: Model[Array],
    cfg: ModelConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int = 200,
    temperature: float = 1.0,
    top_p: float = 0.85,
    top_k: int = 0,
    presence: float = 0.2,
    frequency: float = 0.2,
    decay: float = 0.996,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> Iterator[Piece]:
    """What the model writes after each prompt, piece by piece, the prompts side by side.

    Prompt i is drawn with seed `seed + i`: alone with that seed it gives the same text. An empty
    prompt starts a document. A text ends with its document, at a stop string (never part of the
    text), or after `max_tokens`. To use a model many times, make a `Writer` and `generate_with`.

    Raises `UserError` for a setting out of range, at the call; and while it is iterated, if the
    model predicts NaN.

    >>> pieces = generate(params, cfg, tokenizer, ["def main("], max_tokens=50)  # doctest: +SKIP
    >>> print("".join(piece.text for piece in pieces))  # doctest: +SKIP
    """
    sampling = Sampling(temperature, top_p, top_k, presence, frequency, decay)
    writer = Writer(params, cfg, tokenizer)
    return generate_with(
        writer, prompts, max_tokens=max_tokens, sampling=sampling, seed=seed, stop=stop
    )


def generate_with(
    writer: Writer,
    prompts: Sequence[str],
    *,
    max_tokens: int = 200,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    start: Start | None = None,
) -> Iterator[Piece]:
    """`generate` from a model made ready before; every prompt goes on from `start`, if given."""
    check_tokens(max_tokens)
    rows = writer.start(prompts, [seed + index for index in range(len(prompts))], start)
    return _pieces(writer, rows, sampling or Sampling(), max_tokens, stop)


def check_seed(seed: int) -> None:
    """Raises `UserError` for a seed that is no 32-bit number."""
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed {seed}: between 0 and {MAX_SEED}")


def check_tokens(max_tokens: int) -> None:
    """Raises `UserError` for a number of tokens below 0."""
    if max_tokens < 0:
        raise UserError(f"tokens {max_tokens}: 0 or more")


def _pieces(
    writer: Writer, rows: Rows[Array], sampling: Sampling, max_tokens: int, stop: Sequence[str]
) -> Iterator[Piece]:
    batch = rows.ended.shape[0]
    settings, pace = sampling.rows(batch), Pace()
    tokenizer = writer.tokenizer
    readers = [Reader(StreamDecoder(tokenizer), tokenizer.eod, stop) for _ in range(batch)]
    left = max_tokens
    while left and not all(reader.finish for reader in readers):
        block, rows = writer.write(rows, settings, pace.next(left))
        left -= block.shape[1]
        for index, reader in enumerate(readers):
            if not reader.finish:
                yield read_block(index, reader, block[index])
        ended = np.asarray([bool(reader.finish) for reader in readers])
        rows = replace(rows, ended=jnp.asarray(ended))
    for index, reader in enumerate(readers):
        if not reader.finish:
            yield Piece(index, reader.cut(), 0, "length")


def read_block(index: int, reader: Reader, tokens: np.ndarray) -> Piece:
    """What a row's new tokens say, up to its end. Raises `UserError` if the model predicts NaN
    before that."""
    text, used = [], 0
    for token in tokens:
        if reader.finish or token == NO_TOKEN:
            break
        if token == NOT_FINITE:
            raise UserError(PREDICTS_NAN)
        text.append(reader.push(int(token)))
        used += 1
    return Piece(index, "".join(text), used, reader.finish)


class Session:
    """One text that grows: what is fed and what is written both stay in its recurrent state.

    However a stream ends, at a stop string, by `break` or by Ctrl-C, the state is then that after
    the last token handed out (a stop string is part of the state, though not of the text). After
    the end of a document a new one starts. With `start`, all begins there instead of at nothing.
    """

    def __init__(self, writer: Writer, seed: int = 0, start: Start | None = None):
        self._writer = writer
        self._start = start
        self.reset(seed)

    def reset(self, seed: int | None = None) -> None:
        """Forgets the text, and starts the random numbers again, with another seed if given."""
        seed = self.seed if seed is None else seed
        start = self._start
        known = start is not None and start.logits is not None
        # Without logits something has to be read before anything can be written.
        self._rows = self._writer.start([""], [seed], start if known else None)
        self._begun = known
        if start is not None and not known:
            self._rows = self._restarted()
        self._decoder = StreamDecoder(self._writer.tokenizer)
        self.seed = seed

    def reseed(self, seed: int) -> None:
        """Starts the random numbers again with another seed; the text stays."""
        check_seed(seed)
        self._rows = reseed(self._rows, [seed])
        self.seed = seed

    def feed(self, text: str) -> None:
        """Appends text to what the model has read."""
        tokens = self._writer.tokenizer.encode(text)
        if tokens:
            self._read(tokens)
            self._decoder = StreamDecoder(self._writer.tokenizer)

    @property
    def writer(self) -> Writer:
        """What it is written with."""
        return self._writer

    @property
    def begun(self) -> bool:
        """Whether anything has been read or written since the start."""
        return self._begun

    @property
    def state(self) -> State:
        """The state after all of the text so far, layers stacked: a value, to keep or to save."""
        return stack(self._rows.state)

    @property
    def logits(self) -> Float[Array, "1 V"]:
        """Of the next token; of no use before something is read, from a start without them."""
        return self._rows.logits

    def _restarted(self) -> Rows[Array]:
        """The row as it was at the start, or of a fresh document; the random numbers go on."""
        start, writer = self._start, self._writer
        state = None if start is None else start.state
        rows = forget(writer.params, self._rows, cfg=writer.cfg, start=state)
        if start is not None and start.logits is not None:
            rows = replace(rows, logits=start.logits, ended=jnp.zeros_like(rows.ended))
        return rows

    def _read(self, tokens: Sequence[int]) -> None:
        """As a prompt if nothing came before, else as more of the text."""
        writer = self._writer
        rows = self._rows if self._begun else self._restarted()
        self._rows = extend(writer.params, rows, tokens, cfg=writer.cfg)
        self._begun = True

    def stream(
        self,
        *,
        max_tokens: int = 200,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[Piece]:
        """What the model writes next, piece by piece; arguments as in `generate`.

        Raises `UserError` while it is iterated, if the model predicts NaN; the state is then that
        after the last piece.
        """
        check_tokens(max_tokens)
        return self._stream(max_tokens, (sampling or Sampling()).rows(1), stop)

    def _stream(self, left: int, settings: Settings[Array], stop: Sequence[str]) -> Iterator[Piece]:
        reader = Reader(self._decoder, self._writer.tokenizer.eod, stop)
        pace = Pace()
        if left and not self._begun and self._start is not None:
            if self._start.logits is None:
                raise UserError(SILENT)
            self._rows, self._begun = self._restarted(), True
        if left and not self._begun:
            self._read([self._writer.tokenizer.eod])
        while left and not reader.finish:
            before = self._rows
            block, after = self._writer.write(before, settings, pace.next(left))
            piece = read_block(0, reader, block[0])
            if piece.finish == "stop" and piece.tokens < block.shape[1]:
                # The block ran past the stop string: the same tokens again, up to it.
                _, after = self._writer.write(before, settings, piece.tokens)
            self._rows, self._begun = after, piece.finish != "end"
            left -= piece.tokens
            yield piece
        if not reader.finish:
            yield Piece(0, reader.cut(), 0, "length")
