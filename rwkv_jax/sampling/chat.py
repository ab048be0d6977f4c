"""Chat: conversations kept in the recurrent state, so that no turn is read twice.

A conversation is one text in the format of a `Template`:

    System: SYSTEM

    User: QUESTION

    Assistant: REPLY

    User: QUESTION
    ...

or with a mark instead of colons and empty lines (the flower template). Templates, cleaning and ways
to think: `RWKV-v7/RWKV7-G1x-templates.txt` of BlinkDL/RWKV-LM; the World models' first exchange and
the sampling: `API_DEMO_CHAT.py` of BlinkDL/ChatRWKV; Bob and Alice: `v2/chat.py` there.
"""

import json
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rwkv_jax.config import ModelConfig
from rwkv_jax.data.conversations import END, TEMPLATES, ConversationError, Template
from rwkv_jax.data.tokenizers import StreamDecoder, Tokenizer
from rwkv_jax.errors import UserError
from rwkv_jax.models import VERSIONS, State
from rwkv_jax.sampling.decode import DecodeState, Prefix, reseed
from rwkv_jax.sampling.presets import PRESETS
from rwkv_jax.sampling.prompts import continuation
from rwkv_jax.sampling.settings import MAX_SEED, Sampling, check_max_tokens, check_seed
from rwkv_jax.sampling.stream import Finish, Generator, Stream, TextChunk
from rwkv_jax.typing import Array, Float

KEPT = 16
"""Number of exchanges that can be undone. Each keeps a state, 2.4 MB for a 0.1B model of version 7
and 21 MB for a 2.9B one, and the logits after it."""

THINK = {
    "off": ("", ""),
    "fast": ("", " <think>\n</think"),
    "on": ("", " <think"),
    "a bit": (" (think a bit)", " <think"),
    "some": (" (think)", " <think"),
    "a lot": (" (think a lot)", " <think"),
    "compact": ("", " <think></think"),
    "tool": ("", " ```json"),
}
"""Thinking modes of the G1 models: suffix of the question, start of the reply.

`fast` is an empty thought, `compact` the same as models since G1h prefer it; `a bit`, `some` and
`a lot` set the length of the thought (newer G1 models); `tool` is a call of a tool instead."""

MARKED_THINK: dict[str, str] = {
    **dict.fromkeys(("off", "fast", "compact"), "<think></think"),
    "tool": "```json",
}
"""Starts of replies in templates with a mark, `<think` in the other modes. Without a thought they
begin with an empty one."""

OPEN, CLOSE = "<think>", "</think>"


def beginning(template: Template, think: str) -> str:
    """The start of a reply that a thinking mode sets; the model writes the `>` that is missing."""
    return MARKED_THINK.get(think, "<think") if template.mark else THINK[think][1]


# The 20B vocabulary splits empty lines, [187, 187], except at the end of a text.
_NEWLINE, _TWO_NEWLINES = [187], [535]


def template_for(cfg: ModelConfig, tokenizer: Tokenizer) -> Template:
    """A guess of a model's template, as its weights do not say what it was trained on."""
    if tokenizer.encode(END) == _TWO_NEWLINES:
        return TEMPLATES["raven"]
    return TEMPLATES[VERSIONS[cfg.version].chat_template]


def preset_for(template: Template, think: str) -> str:
    """The name of the sampling preset of a template's models."""
    if think == "tool":
        return "tool"
    if not template.mark:
        return "chat"
    return "answer" if think in MARKED_THINK else "think"


def encode(tokenizer: Tokenizer, text: str, first: bool = False) -> list[int]:
    """The tokens of a part of a conversation, equal to those within the whole conversation; `first`
    is whether it begins that."""
    ids = tokenizer.encode(text) if first else continuation(tokenizer, text)
    if ids[-1:] == _TWO_NEWLINES and text.endswith(END) and tokenizer.encode("\n") == _NEWLINE:
        return ids[:-1] + 2 * _NEWLINE
    return ids


def parts(text: str) -> tuple[str, str]:
    """Thought and answer in an unfinished reply, as far as later text cannot change them.

    >>> parts(" <think>\\nWell</thi"), parts(" <think>\\nWell</think>\\nYes. ")
    (('Well', ''), ('Well', 'Yes.'))
    """
    text = text.lstrip()
    if OPEN.startswith(text):
        return "", ""
    if not text.startswith(OPEN):
        return "", text.rstrip()
    thought, closed, answer = text.removeprefix(OPEN).partition(CLOSE)
    if not closed:
        partial = next(n for n in range(len(CLOSE) - 1, -1, -1) if thought.endswith(CLOSE[:n]))
        thought = thought[: len(thought) - partial]
    return thought.strip(), answer.strip()


def _closing(text: str) -> str:
    """The text that closes an unfinished thought; empty if there is none."""
    for end in ("", ">", f"\n{CLOSE}", f">\n{CLOSE}"):
        if re.match(rf"\s*{OPEN}.*{CLOSE}", text + end, re.DOTALL):
            return end
    return ""


@dataclass(frozen=True)
class ReplySettings:
    """How replies are written. Raises `UserError` for a value out of range.

    think       a thinking mode, one of `THINK`
    max_tokens  of one reply, with its thought
    seed        of the next reply; each reply increments it
    """

    think: str = "off"
    sampling: Sampling = PRESETS["chat"]
    max_tokens: int = 2000
    seed: int = 0

    def __post_init__(self):
        if self.think not in THINK:
            raise UserError(f"think {self.think}: one of {', '.join(THINK)}")
        check_max_tokens(self.max_tokens)
        check_seed(self.seed)


DEFAULTS = ReplySettings()


@dataclass(frozen=True)
class ChatChunk(TextChunk):
    """New text of a reply. The last chunk has a `finish`."""

    thought: str = ""
    """New text of the thought before the answer."""


@dataclass(frozen=True)
class _Position:
    """A conversation between two exchanges."""

    prefix: Prefix | None
    tokens: int = 0
    exchanges: int = 0


@dataclass(frozen=True)
class _Question:
    """A question that was read: `ids` are its tokens, `decoding` is the state after them (kept for
    the last question only)."""

    text: str
    think: str
    before: _Position
    ids: list[int]
    decoding: DecodeState[Array] | None


@dataclass
class _Reply:
    """A reply while it is written.

    ids    all tokens drawn, which may run past the end of the reply
    base   the state after the first `base_tokens`, whose text (`base_length` characters) is final
    shown  number of characters of the thought and of the answer that were yielded
    """

    question: _Question
    ids: list[int]
    base: DecodeState[Array]
    beginning: str = ""
    """What the thinking mode sets."""
    base_tokens: int = 0
    base_length: int = 0
    text: str = ""
    shown: tuple[int, int] = (0, 0)

    def grow(self, chunk: TextChunk, decoding: DecodeState[Array], tokenizer: Tokenizer) -> None:
        """Adds a chunk; `decoding` is the state after the last of `ids`."""
        self.text += chunk.text
        tokens, length = self.spelling(self.text.rstrip(), tokenizer)
        if tokens == len(self.ids) and chunk.finish != "end":
            self.base, self.base_tokens, self.base_length = decoding, tokens, length

    def spelling(self, text: str, tokenizer: Tokenizer) -> tuple[int, int]:
        """The longest run of drawn tokens whose text is a prefix of `text`: how many tokens, and
        how many characters."""
        before = [*self.question.ids, *self.ids[: self.base_tokens]]
        decoder, length = StreamDecoder(tokenizer, before), self.base_length
        found = self.base_tokens, length
        for count, token in enumerate(self.ids[self.base_tokens :], self.base_tokens + 1):
            written = decoder.push([token])
            if not text.startswith(written, length):
                break
            length += len(written)
            if decoder.whole:
                found = count, length
        return found

    def next_chunk(self, text: str, tokens: int, finish: Finish) -> ChatChunk:
        """The part of `text`, the reply so far, that was not yielded yet."""
        thought, answer = parts(text)
        thinking, answering = self.shown
        self.shown = len(thought), len(answer)
        return ChatChunk(0, answer[answering:], tokens, finish, thought=thought[thinking:])


class Conversation:
    """A conversation between a user and a model; `say` takes a turn.

    A reply ends by itself, at `max_tokens`, by `break` or by Ctrl-C. The conversation then contains
    it as far as it was yielded, an unfinished thought closed, and one end of a turn after it. If
    the model wrote more or less than that, the conversation returns to an earlier state and reads
    the missing tokens: at most some tokens of the last calls to the device are read again.

    `settings` can be changed at any time (`configure`) and apply from the next reply on. With
    `prefix`, conversations start there instead of from a fresh state.

    Raises `UserError` for settings or a system prompt that the template does not support, and
    during iteration over a reply, if the model predicts NaN.

    >>> chat = Conversation(generator, system="Answer in French.")  # doctest: +SKIP
    >>> for chunk in chat.say("Hello!"):  # doctest: +SKIP
    ...     print(chunk.text, end="")
    """

    def __init__(
        self,
        generator: Generator,
        template: Template | None = None,
        *,
        system: str = "",
        settings: ReplySettings = DEFAULTS,
        prefix: Prefix | None = None,
    ):
        self.generator = generator
        self.template = template or template_for(generator.cfg, generator.tokenizer)
        self.settings = settings
        self._prefix = prefix
        self.reset(system)

    @property
    def settings(self) -> ReplySettings:
        """How the next reply is written."""
        return self._settings

    @settings.setter
    def settings(self, settings: ReplySettings) -> None:
        if settings.think != "off" and not self.template.paragraphs:
            raise UserError(
                f"think {settings.think}: this template ends a reply at a blank line, and thoughts"
                " may contain some; use template g1"
            )
        self._settings = settings

    def configure(self, **changes: Any) -> None:
        """Changes some of the settings."""
        self.settings = replace(self.settings, **changes)

    @property
    def system(self) -> str:
        """The system prompt, empty if there is none."""
        return self._system

    def reset(self, system: str | None = None) -> None:
        """Starts a new conversation, with another system prompt if given."""
        system = self._system if system is None else self._clean(system)
        if system and not self.template.system:
            raise UserError(f"system prompt {system[:20]!r}: this template has none; leave it out")
        self._system = system
        self._position = _Position(self._prefix)
        self._tokens: list[int] = []
        self._questions: deque[_Question] = deque(maxlen=KEPT)
        self._reply: _Reply | None = None

    def say(self, text: str) -> Iterator[ChatChunk]:
        """The reply to `text`, chunk by chunk."""
        text = self._clean(text)
        if not text:
            raise UserError("there is nothing to reply to: say something")
        return self._say(text)

    def retry(self) -> Iterator[ChatChunk]:
        """Another reply, drawn with the next seed, in place of the last one."""
        self._settle()
        question = self._last()
        if question.decoding is None or question.think != self.settings.think:
            return self._say(question.text, question.before)
        return self._answer(question)

    def undo(self) -> None:
        """Drops the last exchange."""
        self._settle()
        self._position = self._last().before
        del self._tokens[self._position.tokens :]
        self._questions.pop()

    @property
    def exchanges(self) -> int:
        """Number of questions asked."""
        self._settle()
        return self._position.exchanges

    @property
    def tokens(self) -> list[int]:
        """All tokens that the model has read and written: reading these gives the same state."""
        self._settle()
        return list(self._tokens)

    @property
    def transcript(self) -> str:
        """The text of `tokens`."""
        return self.generator.tokenizer.decode_bytes(self.tokens).decode(errors="replace")

    @property
    def state(self) -> State:
        """The state after the last exchange, stacked."""
        return self._after_exchange().state

    @property
    def logits(self) -> Float[Array, "1 V"]:
        """Logits of the next token after the last exchange."""
        logits = self._after_exchange().logits
        assert logits is not None, "known after every exchange"
        return logits

    def notes(self) -> dict[str, str]:
        """The metadata that `resumed` needs, to be saved with the state and the logits."""
        sampling = self.settings.sampling.flags()
        settings = {
            "template": asdict(self.template),
            "system": self.system,
            **asdict(self.settings),
            "sampling": {x: y for x, y in sampling.items() if x != "min_p" or y},  # it is newer
            "exchanges": self.exchanges,
            "tokens": self.tokens,
        }
        return {
            "tokenizer": self.generator.tokenizer.identity(),
            "transcript": self.transcript,
            "chat": json.dumps(settings),
        }

    @classmethod
    def resumed(
        cls,
        generator: Generator,
        state: State,
        logits: Float[Array, "1 V"] | None,
        notes: Mapping[str, str],
        prefix: Prefix | None = None,
    ) -> "Conversation":
        """The conversation with this state, these logits and `notes`, as if it had never stopped,
        except that its exchanges so far cannot be undone.

        `prefix` is where `reset` starts. Raises `UserError` unless they belong to a conversation.
        """
        generator.check_tokenizer(notes.get("tokenizer"))
        try:
            saved: dict[str, Any] = json.loads(notes["chat"])
            tokens, exchanges = list(saved.pop("tokens")), int(saved.pop("exchanges"))
            template, system = Template(**saved.pop("template")), saved.pop("system")
            saved["sampling"] = Sampling().with_flags(saved["sampling"])
            settings = ReplySettings(**saved)
            new = cls(generator, template, system=system, settings=settings, prefix=prefix)
            if logits is None or not all(0 <= x < generator.tokenizer.vocab_size for x in tokens):
                raise ValueError
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(
                "the file of this state has no conversation, or a damaged one; it may still be a"
                " state to start from"
            ) from None
        new._tokens = tokens
        end = Prefix(state, generator.cfg, logits)
        new._position = _Position(end, len(tokens), exchanges)
        return new

    def _clean(self, text: str) -> str:
        try:
            return self.template.clean(text)
        except ConversationError as error:
            raise UserError(str(error)) from None

    def _last(self) -> _Question:
        if not self._questions:
            raise UserError(f"no exchange to go back to; the last {KEPT} of this session are kept")
        return self._questions[-1]

    def _after_exchange(self) -> Prefix:
        self._settle()
        if not self._position.exchanges or self._position.prefix is None:
            raise UserError("nothing was said yet: say something first")
        return self._position.prefix

    def _say(self, text: str, before: _Position | None = None) -> Iterator[ChatChunk]:
        self._settle()
        yield from self._answer(self._read(text, before or self._position))

    def _read(self, text: str, before: _Position) -> _Question:
        generator, template, settings = self.generator, self.template, self.settings
        opening = "" if before.exchanges else self._opening()
        turn = opening + template.turn(template.user, text + THINK[settings.think][0])
        turn += template.bot + template.colon + beginning(template, settings.think)
        first = not before.tokens and self._prefix is None
        ids = encode(generator.tokenizer, turn, first)
        ids = [generator.tokenizer.eod, *ids] if template.mark and first else ids
        decoding = generator.prefill([ids], [settings.seed], before.prefix)
        return _Question(text, settings.think, before, ids, decoding)

    def _opening(self) -> str:
        if self.system:
            return self.template.turn(self.template.system, self.system)
        return "" if self._prefix else self.template.opening

    def _answer(self, question: _Question) -> Iterator[ChatChunk]:
        assert question.decoding is not None, "callers pass a question that was read"
        self._settle()
        generator, settings = self.generator, self.settings
        decoding = reseed(question.decoding, [settings.seed])
        decoders = [StreamDecoder(generator.tokenizer, question.ids)]
        stops, most = self.template.stops, settings.max_tokens
        stream = Stream(generator, decoding, settings.sampling, most, stops, decoders)
        start = beginning(self.template, question.think)
        self._reply = reply = _Reply(question, stream.readers[0].ids, decoding, start)
        self.configure(seed=(settings.seed + 1) % (MAX_SEED + 1))
        for chunk in stream:
            if chunk.finish != "length":  # its text may be the start of a stop string
                reply.grow(chunk, stream.decoding, generator.tokenizer)
            # Blanks at the end are dropped if the reply ends here: `<think ` may become `<think>`.
            text = self._settle() if chunk.finish else (reply.beginning + reply.text).rstrip()
            yield replace(reply.next_chunk(text, chunk.tokens, chunk.finish), drawn=chunk.drawn)
            if self._reply is not reply:
                return  # the reply was ended while the caller had control

    def _settle(self) -> str:
        """Ends the reply being written, if there is one; returns all of its text."""
        reply = self._reply
        if reply is None:
            return ""
        generator, question, before = self.generator, reply.question, reply.question.before
        text = reply.text.rstrip()
        text += _closing(reply.beginning + text) + self.template.end
        tokens, length = reply.spelling(text, generator.tokenizer)
        missing = encode(generator.tokenizer, text[length:])
        unread = reply.ids[reply.base_tokens : tokens] + missing
        # A vocabulary of words may have no token for the end of a turn.
        decoding = generator.extend(reply.base, unread) if unread else reply.base
        end = Prefix(decoding.state, generator.cfg, decoding.logits)
        self._tokens[before.tokens :] = question.ids + reply.ids[:tokens] + missing
        self._position = _Position(end, len(self._tokens), before.exchanges + 1)
        if self._questions:
            last = self._questions.pop()
            if last.before is not before:  # else this is another reply to the same question
                self._questions.append(replace(last, decoding=None))
        self._questions.append(question)
        self._reply = None
        return reply.beginning + text.removesuffix(self.template.end) + END
