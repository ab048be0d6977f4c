"""Records of JSON and tables as texts: which field they have, and what of it is trained on.

A record holds a text, the turns of a conversation, or a question and its answer, which are a
conversation of two turns:

    text                                               "..."
    messages, conversations, conversation, turns       [{"role": ..., "content": ...}, ...]
    instruction (and input), output                    Alpaca; also system, and history as pairs
    prompt, completion                                 TRL; both may be turns
    question, answer; query, response

`data.field` names one. Where it is left at `text` and the records have none, the first of the
others that they have is taken.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rwkv_jax.config import DataConfig
from rwkv_jax.data.conversations import TEMPLATES, ConversationError, Spans, render
from rwkv_jax.data.files import CorpusError

TEXT = "text"
CONVERSATIONS = ("messages", "conversations", "conversation", "turns")
"""Fields that hold the turns of a conversation."""

ANSWERS = {
    "instruction": ("output", "response"),
    "prompt": ("completion",),
    "question": ("answer",),
    "query": ("response",),
}
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
    one that they have."""
    if wanted != TEXT or not isinstance(record, Mapping) or TEXT in record:
        return wanted
    pairs = (x for x, answers in ANSWERS.items() if any(y in record for y in answers))
    return next((x for x in (*CONVERSATIONS, *pairs) if x in record), wanted)


def text_of(record: Any, cfg: DataConfig) -> tuple[str, Spans | None]:
    """The text of a record, and the parts of it that are trained on; None: all.

    Raises NoTextError for one without a text, ConversationError for one of another kind.
    """
    if record is None:
        raise NoTextError("null")
    if not isinstance(record, Mapping):
        kind = type(record).__name__
        raise ConversationError(f"a JSON {kind}, not an object with a field {cfg.field!r}")
    if cfg.field not in record:
        found = ", ".join(sorted(map(str, record))) or "none"
        raise ConversationError(
            f"no field {cfg.field!r}; set data.field to one of its fields: {found}"
        )
    try:
        text, spans = _text(record, cfg)
    except ConversationError as error:
        raise ConversationError(f"field {cfg.field!r}: {error}") from error
    try:
        text.encode()
    except UnicodeEncodeError:
        raise NoTextError(f"field {cfg.field!r} holds half a surrogate pair") from None
    return text, spans


def _text(record: Mapping[str, Any], cfg: DataConfig) -> tuple[str, Spans | None]:
    value = _turns(record, cfg.field)
    if value is None:
        raise NoTextError(f"field {cfg.field!r} is null")
    if isinstance(value, list):
        text, answers = render(value, TEMPLATES[cfg.template], stops=cfg.train_stops)
        if cfg.train_on == "spans":
            raise ConversationError('turns have no spans; set data.train_on = "answers"')
        return text, answers if cfg.train_on == "answers" else None
    if not isinstance(value, str):
        kind = type(value).__name__
        raise ConversationError(f"a {kind}, not text or a list of turns; set data.field")
    if cfg.train_on == "answers":
        raise ConversationError('text, not a list of turns, which data.train_on = "answers" needs')
    return value, _spans(record, value) if cfg.train_on == "spans" else None


def _turns(record: Mapping[str, Any], field: str) -> Any:
    """The turns of a record with a question and an answer; of any other one what its field has."""
    value = record[field]
    reply = next((record[x] for x in ANSWERS.get(field, ()) if record.get(x) is not None), None)
    if reply is None or value is None:
        return value
    if isinstance(value, list) and isinstance(reply, list):
        return value + reply
    if not isinstance(value, str) or not isinstance(reply, str):
        raise ConversationError("question and answer are not both text, or both lists of turns")
    more = record.get("input")
    question = f"{value}\n{more}" if field == "instruction" and isinstance(more, str) else value
    turns = [("user", question), ("assistant", reply)]
    for pair in reversed(record.get("history") or ()):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ConversationError("the field 'history' is not a list of [question, answer]")
        turns[:0] = zip(("user", "assistant"), pair, strict=True)
    if isinstance(system := record.get("system"), str) and system.strip():
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
