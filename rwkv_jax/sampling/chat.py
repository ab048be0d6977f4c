"""Chat: the turns of a conversation, which lives in the recurrent state. Nothing is read twice.

A conversation is one text, as a `Template` writes it:

    System: SYSTEM

    User: QUESTION

    Assistant: REPLY

    User: QUESTION
    ...

Templates, cleaning and ways to think: `RWKV-v7/RWKV7-G1x-templates.txt` of BlinkDL/RWKV-LM; the
World models' first exchange and the sampling: `API_DEMO_CHAT.py` of BlinkDL/ChatRWKV; Bob and
Alice: `v2/chat.py` there.
"""

import codecs
import json
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rwkv_jax.config import ModelConfig
from rwkv_jax.data.conversations import END, TEMPLATES, Template, clean
from rwkv_jax.data.tokenizers import StreamDecoder, Tokenizer
from rwkv_jax.errors import UserError
from rwkv_jax.models import State, stack
from rwkv_jax.sampling.decode import Rows, extend, prefill, reseed
from rwkv_jax.sampling.session import (
    MAX_SEED,
    Finish,
    Pace,
    Piece,
    Reader,
    Sampling,
    Start,
    Writer,
    check_seed,
    check_tokens,
    read_block,
)
from rwkv_jax.typing import Array, Float

CHAT_SAMPLING = Sampling(temperature=1.0, top_p=0.3, presence=0.5, frequency=0.5, decay=0.996)
"""The official chat demo's. Its penalties, too, count anew in each reply."""

CHAT_TOKENS = 2000
"""The most tokens of a reply: thoughts are long."""

KEPT = 16
"""How many exchanges can be undone: for each, a state is kept, 2.4 MB of a 0.1B model of version 7
and 21 MB of a 2.9B one, and the logits after it."""

THINK = {
    "off": ("", ""),
    "fast": ("", " <think>\n</think"),
    "on": ("", " <think"),
    "a bit": (" (think a bit)", " <think"),
    "some": (" (think)", " <think"),
    "a lot": (" (think a lot)", " <think"),
}
"""Ways to think of the G1 models: what follows the question, and what the reply begins with.

`fast` is a thought already over; the last three set its length (newer G1 models)."""

OPEN, CLOSE = "<think>", "</think>"


# The 20B vocabulary splits empty lines, [187, 187], except at the end of a text.
_NEWLINE, _TWO_NEWLINES = [187], [535]


def template_for(cfg: ModelConfig, tokenizer: Tokenizer) -> Template:
    """The likeliest template of a model: its weights don't tell what it was trained on."""
    if tokenizer.encode(END) == _TWO_NEWLINES:
        return TEMPLATES["raven"]
    return TEMPLATES["g1" if cfg.version.startswith("7") else "world"]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a part of a conversation, as they would be in the whole of it."""
    ids = tokenizer.encode(text)
    if ids[-1:] == _TWO_NEWLINES and text.endswith(END) and tokenizer.encode("\n") == _NEWLINE:
        return ids[:-1] + 2 * _NEWLINE
    return ids


def parts(text: str) -> tuple[str, str]:
    """The thought and the answer in the beginning of a reply, as far as nothing that may follow can
    change them.

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
        begun = next(n for n in range(len(CLOSE) - 1, -1, -1) if thought.endswith(CLOSE[:n]))
        thought = thought[: len(thought) - begun]
    return thought.strip(), answer.strip()


def _closing(text: str) -> str:
    """What completes a thought that was cut off."""
    for end in ("", ">", f"\n{CLOSE}", f">\n{CLOSE}"):
        if re.match(rf"\s*{OPEN}.*{CLOSE}", text + end, re.DOTALL):
            return end
    return ""


@dataclass(frozen=True)
class ChatPiece(Piece):
    """Some new text of a reply; the last piece says why it is the last."""

    thought: str = ""
    """New text of the thought before the answer."""


@dataclass(frozen=True)
class _Point:
    """A conversation between two exchanges."""

    start: Start | None
    tokens: int = 0
    exchanges: int = 0


@dataclass(frozen=True)
class _Question:
    text: str
    think: str
    before: _Point
    ids: list[int]
    """All that was read for it."""
    rows: Rows[Array] | None
    """The model, having read it; of the last question only."""


@dataclass
class _Reply:
    """A reply while it is written."""

    question: _Question
    rows: Rows[Array]
    """After all tokens drawn, which may go beyond the reply's end."""
    base: Rows[Array]
    """After the first `base_tokens`, whose text, `base_length` characters, will stand."""
    base_tokens: int = 0
    base_length: int = 0
    ids: list[int] = field(default_factory=list)
    text: str = ""
    shown: tuple[int, int] = (0, 0)
    """How many characters of the thought and of the answer were handed out."""

    @property
    def beginning(self) -> str:
        """What the template has the reply begin with."""
        return THINK[self.question.think][1]

    def grow(self, text: str, drawn: list[int], rows: Rows[Array], tokenizer: Tokenizer) -> None:
        """Takes in more tokens, and the text that they make certain."""
        self.text += text
        self.ids += [token for token in drawn if token != tokenizer.eod]
        self.rows = rows
        tokens, length = self.fitting(self.text.rstrip(), tokenizer)
        if tokens == len(self.ids) and tokenizer.eod not in drawn:
            self.base, self.base_tokens, self.base_length = rows, tokens, length

    def fitting(self, text: str, tokenizer: Tokenizer) -> tuple[int, int]:
        """How many tokens, at most, write a beginning of `text`, and its length."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        length = self.base_length
        found = self.base_tokens, length
        for count, token in enumerate(self.ids[self.base_tokens :], self.base_tokens + 1):
            written = decoder.decode(tokenizer.decode_bytes([token]))
            if not text.startswith(written, length):
                break
            length += len(written)
            if not decoder.getstate()[0]:  # no half character
                found = count, length
        return found

    def news(self, text: str, tokens: int, finish: Finish = "") -> ChatPiece:
        """What of `text`, the reply so far, was not handed out yet."""
        thought, answer = parts(text)
        thinking, answering = self.shown
        self.shown = len(thought), len(answer)
        return ChatPiece(0, answer[answering:], tokens, finish, thought[thinking:])


class Conversation:
    """Turns of a person and a model; made from a `Writer`, gone on with by `say`.

    However a reply ends, by itself, at `max_tokens`, by `break` or by Ctrl-C, it stands as far as
    it was handed out, a thought that was cut off is closed, and `"\\n\\n"` follows, once: where the
    model wrote more than that, or less, the state is one from before, which then reads what is
    missing: at most some tokens of the last calls to the device are read again for that.

    `think`, `sampling`, `max_tokens` and `seed` may be set at any time and hold from the next reply
    on. Each reply is drawn with a seed of its own, the last one's plus 1. With `start`, all begins
    there instead of at nothing.

    Raises `UserError` for a way to think, a system prompt or a start that cannot be, and while a
    reply is iterated, if the model predicts NaN.

    >>> chat = Conversation(writer, system="Answer in French.")  # doctest: +SKIP
    >>> for piece in chat.say("Hello!"):  # doctest: +SKIP
    ...     print(piece.text, end="")
    """

    def __init__(
        self,
        writer: Writer,
        template: Template | None = None,
        *,
        system: str = "",
        think: str = "off",
        sampling: Sampling = CHAT_SAMPLING,
        max_tokens: int = CHAT_TOKENS,
        seed: int = 0,
        start: Start | None = None,
    ):
        self.writer = writer
        self.template = template or template_for(writer.cfg, writer.tokenizer)
        self.think = think
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.seed = seed
        self._start = start
        self.reset(system)

    @property
    def think(self) -> str:
        """The way to think, one of `THINK`."""
        return self._think

    @think.setter
    def think(self, way: str) -> None:
        if way not in THINK:
            raise UserError(f"think {way}: one of {', '.join(THINK)}")
        if way != "off" and not self.template.paragraphs:
            raise UserError(
                f"think {way}: this template ends a reply at an empty line, and thoughts have some;"
                " take the template g1, of the models that think"
            )
        self._think = way

    @property
    def system(self) -> str:
        """The system prompt, empty if there is none."""
        return self._system

    def reset(self, system: str | None = None) -> None:
        """Forgets what was said, and begins anew, with another system prompt if given."""
        system = self._system if system is None else clean(system)
        if system and not self.template.system:
            raise UserError(f"system prompt {system[:20]!r}: this template has none; leave it out")
        self._system = system
        self._point = _Point(self._start)
        self._tokens: list[int] = []
        self._questions: deque[_Question] = deque(maxlen=KEPT)
        self._reply: _Reply | None = None

    def say(self, text: str) -> Iterator[ChatPiece]:
        """The reply to `text`, piece by piece."""
        text = clean(text)
        if not text:
            raise UserError("there is nothing to reply to: say something")
        self._check()
        return self._say(text)

    def retry(self) -> Iterator[ChatPiece]:
        """Another reply, drawn with the next seed, in place of the last one."""
        self._check()
        self._settle()
        question = self._last()
        if question.rows is None or question.think != self.think:
            return self._say(question.text, question.before)
        return self._answer(question)

    def undo(self) -> None:
        """Forgets the last exchange."""
        self._settle()
        self._point = self._last().before
        del self._tokens[self._point.tokens :]
        self._questions.pop()

    @property
    def exchanges(self) -> int:
        """How many questions were asked."""
        self._settle()
        return self._point.exchanges

    @property
    def tokens(self) -> list[int]:
        """All that the model has read and written: reading these, it comes to the same state."""
        self._settle()
        return list(self._tokens)

    @property
    def transcript(self) -> str:
        """The text of the tokens."""
        return self.writer.tokenizer.decode_bytes(self.tokens).decode(errors="replace")

    @property
    def state(self) -> State:
        """After the last exchange, layers stacked: a value, to keep or to save."""
        return stack(self._begun().state)

    @property
    def logits(self) -> Float[Array, "1 V"]:
        """Of the next token after the last exchange."""
        logits = self._begun().logits
        assert logits is not None, "known after every exchange"
        return logits

    def notes(self) -> dict[str, str]:
        """What `resumed` has to know, to be saved beside the state and the logits."""
        settings = {
            "template": asdict(self.template),
            "system": self.system,
            "think": self.think,
            "sampling": asdict(self.sampling),
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "exchanges": self.exchanges,
            "tokens": self.tokens,
        }
        return {
            "tokenizer": self.writer.tokenizer.identity(),
            "transcript": self.transcript,
            "chat": json.dumps(settings),
        }

    @classmethod
    def resumed(
        cls,
        writer: Writer,
        state: State,
        logits: Float[Array, "1 V"] | None,
        notes: Mapping[str, str],
        start: Start | None = None,
    ) -> "Conversation":
        """The conversation with this state, these logits and `notes`, as if it had never stopped,
        except that exchanges before now can no longer be undone.

        `start` is where `reset` begins. Raises `UserError` unless they are of a conversation.
        """
        writer.check_wrote(notes.get("tokenizer"))
        try:
            said: dict[str, Any] = json.loads(notes["chat"])
            tokens, exchanges = list(said.pop("tokens")), int(said.pop("exchanges"))
            said["template"] = Template(**said["template"])
            said["sampling"] = Sampling(**said["sampling"])
            new = cls(writer, start=start, **said)
            new._check()
            if logits is None or not all(0 <= x < writer.tokenizer.vocab_size for x in tokens):
                raise ValueError
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(
                "no conversation goes with this state, or a damaged one; it can still be a state"
                " to start from"
            ) from None
        new._tokens = tokens
        new._point = _Point(Start(state, writer.cfg, logits), len(tokens), exchanges)
        return new

    def _check(self) -> None:
        check_seed(self.seed)
        check_tokens(self.max_tokens)

    def _last(self) -> _Question:
        if not self._questions:
            raise UserError(f"no exchange to go back to; the last {KEPT} of this session are kept")
        return self._questions[-1]

    def _begun(self) -> Start:
        self._settle()
        if not self._point.exchanges or self._point.start is None:
            raise UserError("nothing was said yet: say something first")
        return self._point.start

    def _say(self, text: str, before: _Point | None = None) -> Iterator[ChatPiece]:
        self._settle()
        yield from self._answer(self._read(text, before or self._point))

    def _read(self, text: str, before: _Point) -> _Question:
        writer, template = self.writer, self.template
        after, beginning = THINK[self.think]
        begin = "" if before.exchanges else self._opening()
        turn = f"{begin}{template.user}: {text}{after}{END}{template.bot}:{beginning}"
        ids = encode(writer.tokenizer, turn)
        rows = prefill(
            writer.params,
            [ids],
            [self.seed],
            cfg=writer.cfg,
            end=writer.tokenizer.eod,
            start=before.start.state if before.start else None,
        )
        return _Question(text, self.think, before, ids, rows)

    def _opening(self) -> str:
        if self.system:
            return f"{self.template.system}: {self.system}{END}"
        return "" if self._start else self.template.opening

    def _answer(self, question: _Question) -> Iterator[ChatPiece]:
        assert question.rows is not None, "callers have had it read"
        self._settle()
        tokenizer = self.writer.tokenizer
        rows = reseed(question.rows, [self.seed])
        self._reply = reply = _Reply(question, rows, rows)
        self.seed = (self.seed + 1) % (MAX_SEED + 1)
        reader = Reader(StreamDecoder(tokenizer), tokenizer.eod, self.template.stops)
        settings, pace = self.sampling.rows(1), Pace()
        left, tokens = self.max_tokens, 0
        while left and not reader.finish:
            if tokens:
                yield reply.news(reply.beginning + reply.text, tokens)
                if self._reply is not reply:
                    return  # something else was done meanwhile
            block, rows = self.writer.write(reply.rows, settings, pace.next(left))
            piece = read_block(0, reader, block[0])
            tokens = piece.tokens
            left -= tokens
            reply.grow(piece.text, block[0, :tokens].tolist(), rows, tokenizer)
        yield reply.news(self._settle(), tokens, reader.finish or "length")

    def _settle(self) -> str:
        """Ends the reply being written, if one is; returns all of it."""
        reply = self._reply
        if reply is None:
            return ""
        writer, question, before = self.writer, reply.question, reply.question.before
        text = reply.text.rstrip()
        text += _closing(reply.beginning + text) + END
        tokens, length = reply.fitting(text, writer.tokenizer)
        missing = encode(writer.tokenizer, text[length:])
        unread = reply.ids[reply.base_tokens : tokens] + missing
        rows = extend(writer.params, reply.base, unread, cfg=writer.cfg)
        start = Start(rows.state, writer.cfg, rows.logits)
        self._tokens[before.tokens :] = question.ids + reply.ids[:tokens] + missing
        self._point = _Point(start, len(self._tokens), before.exchanges + 1)
        if self._questions:
            last = self._questions.pop()
            if last.before is not before:  # it is, where this is another reply to the same
                self._questions.append(replace(last, rows=None))
        self._questions.append(question)
        self._reply = None
        return reply.beginning + text
