"""Records of JSON and tables as texts: which field they have, and what of it is trained on.

A record holds a text, the turns of a conversation, or a question and its answer, which are a
conversation of two turns:

    text                                           "...", also a string alone
    messages, conversations, conversation, turns   [{"role": ..., "content": ...}, ...]
    instruction and its output                     Alpaca; also input, system, history as pairs
    prompt, question or query and its completion, answer, response or output

`data.field` names one, or with a comma a question and its answer. Where it is left at `text` and
the records have none, the first of the others that they have is taken.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rwkv_jax.config import DataConfig
from rwkv_jax.data.conversations import (
    TEMPLATES,
    ConversationError,
    EmptyTurnError,
    Spans,
    render,
)
from rwkv_jax.data.files import CorpusError

TEXT = "text"
CONVERSATIONS = ("messages", "conversations", "conversation", "turns")
"""Fields that hold the turns of a conversation."""

QUESTIONS = ("instruction", "prompt", "question", "query")
ANSWERS = ("output", "completion", "answer", "response")
"""Fields that hold a question, and those that then hold its answer."""

MORE_FIELDS = ("spans", "input", "system", "history")
"""Fields that may be read beside the one that is named."""

MOST = 0.01
"""The share of records without a text that is left out; more are an error."""


class NoTextError(ValueError):
    """A record that holds no text, such as null, where others have one."""


@dataclass
class LeftOut:
    """Counts records, and those of them that hold no text."""

    strict: bool = False
    """Whether the first one is an error."""
    records: int = 0
    count: int = 0
    first: str = ""
    """Place and reason of the first one."""

    def add(self, place: str, why: object) -> None:
        """Leaves out one more. Raises CorpusError if that is not allowed."""
        self.count += 1
        self.first = self.first or f"{place}: {why}"
        if self.strict:
            raise CorpusError(f"{self.first}; correct it, or set data.strict = false")

    def merge(self, other: "LeftOut") -> None:
        """Adds what another part of the same source has counted."""
        self.records += other.records
        self.count += other.count
        self.first = self.first or other.first

    def check(self) -> None:
        """Raises CorpusError for more of them than `MOST`."""
        if self.count > MOST * self.records:
            raise CorpusError(
                f"{self.count:,} of {self.records:,} records have no text, the first at"
                f" {self.first}; remove them, or name another data.field"
            )

    def __str__(self) -> str:
        if not self.count:
            return ""
        return f"{self.count:,} of {self.records:,} records without text, the first at {self.first}"


def field_of(record: Any, wanted: str) -> str:
    """The field of such records: `wanted`, or if that is `text` and they have none, the first other
    one that they have; of a question and its answer both, with a comma."""
    if wanted != TEXT or not isinstance(record, Mapping) or TEXT in record:
        return wanted
    if found := next((x for x in CONVERSATIONS if x in record), ""):
        return found
    pair = [next((x for x in names if x in record), "") for names in (QUESTIONS, ANSWERS)]
    return ",".join(pair) if all(pair) else wanted


def fields_of(wanted: str) -> list[str]:
    """The fields that a `data.field` names: one, or a question and its answer."""
    return [name.strip() for name in wanted.split(",", 1)]


def has_fields(record: Any, wanted: str) -> bool:
    """Whether a record has what a `data.field` names; a string is its own text."""
    if isinstance(record, str):
        return wanted == TEXT
    return isinstance(record, Mapping) and all(name in record for name in fields_of(wanted))


def text_of(record: Any, cfg: DataConfig) -> tuple[str, Spans | None]:
    """The text of a record, and the parts of it that are trained on; None: all.

    Raises NoTextError for one without a text, ConversationError for one of another kind.
    """
    if record is None:
        raise NoTextError("null")
    if isinstance(record, str) and cfg.field == TEXT:
        record = {TEXT: record}
    if not isinstance(record, Mapping):
        raise ConversationError(f"{_kind(record)}, not an object with a field {cfg.field!r}")
    names = fields_of(cfg.field)
    if names[0] not in record:
        found = ", ".join(sorted(map(str, record)))
        remedy = f"set data.field to one of its fields: {found}" if found else "it has no field"
        raise ConversationError(f"no field {names[0]!r}; {remedy}")
    try:
        text, spans = _text(record, cfg)
    except ConversationError as error:
        empty = isinstance(error, EmptyTurnError)
        kind = NoTextError if empty else ConversationError
        raise kind(f"field {cfg.field!r}: {error}") from error
    try:
        text.encode()
    except UnicodeEncodeError:
        raise NoTextError(f"field {cfg.field!r} holds half a surrogate pair") from None
    return text, spans


def _text(record: Mapping[str, Any], cfg: DataConfig) -> tuple[str, Spans | None]:
    names = fields_of(cfg.field)
    value = record[names[0]] if len(names) == 1 else _turns(record, *names)
    if value is None:
        raise NoTextError(f"field {cfg.field!r} is null")
    if isinstance(value, list):
        text, answers = render(value, TEMPLATES[cfg.template], stops=cfg.train_stops)
        if cfg.train_on == "spans":
            raise ConversationError('turns have no spans; set data.train_on = "answers"')
        return text, answers if cfg.train_on == "answers" else None
    if not isinstance(value, str):
        raise ConversationError(f"{_kind(value)}, not text or a list of turns; set data.field")
    if cfg.train_on == "answers":
        other = field_of({x: y for x, y in record.items() if x != TEXT}, TEXT)
        hint = "" if other == TEXT else f"; set data.field = {other}"
        raise ConversationError(
            f'text, not a list of turns, which data.train_on = "answers" needs{hint}'
        )
    return value, _spans(record, value) if cfg.train_on == "spans" else None


def _kind(value: Any) -> str:
    """What a JSON value is, in its own words."""
    names = {bool: "true or false", list: "a list", dict: "an object", str: "a text"}
    return names.get(type(value), "a number")


def _turns(record: Mapping[str, Any], asked: str, answered: str) -> list[Any]:
    """A question and its answer as turns. Raises NoTextError if one of them is missing."""
    question, reply = record[asked], record.get(answered)
    for name, value in (asked, question), (answered, reply):
        if value is None or value == "":
            raise NoTextError(f"field {name!r} is {'empty' if name in record else 'missing'}")
    if isinstance(question, list) and isinstance(reply, list):
        return question + reply
    if not isinstance(question, str) or not isinstance(reply, str):
        raise ConversationError("question and answer are not both text, or both lists of turns")
    for name in "input", "system":
        if not isinstance(record.get(name) or "", str):
            raise ConversationError(f"field {name!r} is {_kind(record[name])}, not text")
    more = (record.get("input") or "") if asked == "instruction" else ""
    turns = [("user", f"{question}\n{more}" if more else question), ("assistant", reply)]
    for pair in reversed(record.get("history") or ()):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ConversationError("the field 'history' is not a list of [question, answer]")
        turns[:0] = zip(("user", "assistant"), pair, strict=True)
    if system := (record.get("system") or "").strip():
        turns.insert(0, ("system", system))
    return [{"role": role, "content": content} for role, content in turns]


def _spans(record: Mapping[str, Any], text: str) -> Spans:
    spans = record.get("spans")
    found = []
    for pair in spans if isinstance(spans, list) else [spans]:
        numbers = pair if isinstance(pair, list) and [type(x) for x in pair] == [int, int] else None
        if numbers is None or not 0 <= numbers[0] <= numbers[1] <= len(text):
            raise ConversationError(
                f"the field 'spans' holds {pair!r}, not [first, last + 1] of the text's"
                f" {len(text):,} characters"
            )
        found.append((numbers[0], numbers[1]))
    return tuple(found)
