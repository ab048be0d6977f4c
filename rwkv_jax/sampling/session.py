"""One text that grows: prompts and continuations share one recurrent state."""

from collections.abc import Iterator, Sequence

from rwkv_jax.data.tokenizers import StreamDecoder
from rwkv_jax.errors import UserError
from rwkv_jax.models import State, stack
from rwkv_jax.sampling.decode import DecodeState, Prefix, reseed
from rwkv_jax.sampling.presets import sampling_of
from rwkv_jax.sampling.prompts import Prompt, as_ids
from rwkv_jax.sampling.settings import Sampling, check_max_tokens, check_seed
from rwkv_jax.sampling.stream import NO_LOGITS, Generator, Stream, TextChunk
from rwkv_jax.typing import Array, Float


class Session:
    """One text that grows by `feed` (what the model reads) and `stream` (what it writes).

    However a stream ends, at a stop string, by `break` or by Ctrl-C, the state is then the one
    after the last token that was yielded (a stop string is part of the state, though not of the
    text). Whatever is fed or streamed before it has ended ends it. After the end of a document a
    new one starts, at `prefix` if given. `started` is whether the model has read or written
    anything since the last document ended.
    """

    def __init__(self, generator: Generator, seed: int = 0, prefix: Prefix | None = None):
        if prefix is not None and not isinstance(prefix, Prefix):
            kind = type(prefix).__name__
            raise ValueError(f"prefix must be a Prefix, got {kind}: Prefix(state, cfg) makes one")
        self.generator = generator
        self._prefix, self._turn = prefix, 0
        self.reset(seed)

    def reset(self, seed: int | None = None) -> None:
        """Drops the text and restarts the random numbers, from another seed if given."""
        self._turn += 1
        seed = self.seed if seed is None else seed
        prefix, decoding = self._prefix, self.generator.prefill([[]], [seed])
        if prefix is not None:
            decoding = self.generator.restart(decoding, prefix)
        self._decoding = decoding
        self.started = prefix is not None and prefix.logits is not None
        self._decoder = StreamDecoder(self.generator.tokenizer)
        self.seed = seed

    def reseed(self, seed: int) -> None:
        """Restarts the random numbers from another seed; the text stays."""
        check_seed(seed)
        self._decoding = reseed(self._decoding, [seed])
        self.seed = seed

    def feed(self, text: Prompt) -> None:
        """Appends text, or token ids, to what the model has read."""
        [tokens] = as_ids(self.generator.tokenizer, [text], continue_text=self.started)
        self._turn += 1
        if tokens:
            self._read(tokens)
            self._decoder = StreamDecoder(self.generator.tokenizer, tokens)

    @property
    def state(self) -> State:
        """The state after all of the text so far, stacked."""
        return stack(self._decoding.state)

    @property
    def logits(self) -> Float[Array, "1 V"]:
        """Logits of the next token; undefined until `started`."""
        return self._decoding.logits

    def _restarted(self) -> DecodeState[Array]:
        return self.generator.restart(self._decoding, self._prefix)

    def _read(self, tokens: Sequence[int]) -> None:
        decoding = self._decoding if self.started else self._restarted()
        self._decoding, self.started = self.generator.extend(decoding, tokens), True

    def stream(
        self,
        *,
        max_tokens: int = 200,
        sampling: Sampling | str | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[TextChunk]:
        """What the model writes next, chunk by chunk; arguments as for `generate`.

        Raises `UserError` during iteration if the model predicts NaN; the state is then the one
        after the last chunk.
        """
        check_max_tokens(max_tokens)
        return self._stream(max_tokens, sampling_of(sampling), stop)

    def _stream(
        self, max_tokens: int, sampling: Sampling, stop: Sequence[str]
    ) -> Iterator[TextChunk]:
        self._turn = turn = self._turn + 1
        if max_tokens and not self.started:
            if self._prefix is None:
                self._read([self.generator.tokenizer.eod])
            elif self._prefix.logits is None:
                raise UserError(NO_LOGITS)
            else:
                self._decoding, self.started = self._restarted(), True
        decoders = [self._decoder]
        stream = Stream(self.generator, self._decoding, sampling, max_tokens, stop, decoders)
        for chunk in stream:
            if chunk.tokens:
                self._decoding, self.started = stream.state_after(chunk), chunk.finish != "end"
            yield chunk
            if self._turn != turn:
                return
