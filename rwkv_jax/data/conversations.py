"""Conversations as text by a template, and which parts of it the assistant said.

    System: Be kind.

    User: hi

    Assistant: Hi. How can I help?

Turns are separated by an empty line; inside a turn only replies have one. The flower template of
the G1 models since July 2026 has a mark instead, which no turn contains:

    System✿Be kind.✿
    User✿hi✿
    Bot✿Hi. How can I help?✿

Sources: the templates of BlinkDL's models, `RWKV-v7/RWKV7-G1x-templates.txt` of BlinkDL/RWKV-LM and
`API_DEMO_CHAT.py` of BlinkDL/ChatRWKV.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

FLOWER = "✿"
"""One token of the World vocabulary, 10060."""

END = "\n\n"
"""Between turns; in training text, otherwise only inside replies."""


@dataclass(frozen=True)
class Template:
    """The role names and rules by which the turns of a conversation become text."""

    user: str = "User"
    bot: str = "Assistant"
    system: str = "System"
    """Role of the system prompt; empty for models without one."""
    opening: str = ""
    """Text before the first turn of a conversation without a system prompt or an initial state."""
    paragraphs: bool = True
    """Whether a reply may have empty lines; otherwise the first one ends it."""
    mark: str = ""
    """What follows a role and ends a turn, `Role✿text✿`; empty: `Role: text`, then an empty line. A
    conversation with marks begins with the end-of-document token."""

    @property
    def colon(self) -> str:
        """Between a role and its text; the space after a plain colon belongs to the text."""
        return self.mark or ":"

    @property
    def end(self) -> str:
        """The end of a turn."""
        return f"{self.mark}\n" if self.mark else END

    def turn(self, role: str, text: str) -> str:
        """A turn of one of the roles, with its end."""
        return f"{role}{self.colon}{'' if self.mark else ' '}{text}{self.end}"

    def clean(self, text: str, role: str = "user") -> str:
        """The text of a turn: what people type without empty lines (`clean`), replies as they are.

        Raises ConversationError for a text that contains the mark.
        """
        if self.mark and self.mark in text:
            raise ConversationError(f"{self.mark} ends a turn in this template; leave it out")
        reply = role == "bot" and self.paragraphs
        return text.replace("\r\n", "\n").strip() if reply else clean(text)

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end a reply: the mark, the start of another turn, or an empty line."""
        if self.mark:
            return (self.mark,)
        roles = filter(None, (self.user, self.bot, self.system))
        return tuple(f"{END}{role}:" for role in roles) if self.paragraphs else (END,)


TEMPLATES = {
    "g1": Template(),
    "world": Template(
        opening="User: hi\n\nAssistant: Hi. I am your assistant and I will provide expert full"
        " response in full details. Please feel free to ask any question and I will always answer"
        " it.\n\n",
        paragraphs=False,
    ),
    "raven": Template("Bob", "Alice", system="", paragraphs=False),
    "flower": Template(bot="Bot", mark=FLOWER),
}
"""For G1 models, for World models, for those with the 20B vocabulary (Raven and Pile), and for G1
models since G1h."""

ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "bot", "gpt", "model"), "bot"),
}
"""Role names found in data sets, and the template's role that each one means."""

Spans = tuple[tuple[int, int], ...]
"""Parts of a text, as (first character, last + 1)."""


class ConversationError(ValueError):
    """A record that is not the text or conversation asked for."""


def clean(text: str) -> str:
    """A turn's content without empty lines, which would end the turn, and blanks at ends of lines.

    >>> clean("A  \\r\\n\\r\\n  B\\t  \\n\\n\\n")
    'A\\n  B'
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "\n".join(filter(None, (line.rstrip() for line in lines))).strip()


def render(turns: list[Any], template: Template) -> tuple[str, Spans]:
    """The conversation as text, and the spans of the assistant's replies in it.

    A turn is a mapping with `role` and `content` (or `from` and `value`). The span of a reply
    starts after the colon and ends at the next turn, so that the model also learns to stop. Raises
    ConversationError for anything else.

    >>> render([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hi."}],
    ...        TEMPLATES["g1"])
    ('User: hi\\n\\nAssistant: Hi.', ((20, 24),))
    """
    parts, spans, size = [], [], 0
    for number, turn in enumerate(turns, 1):
        role, content = _turn(turn, number)
        name = getattr(template, role)
        if not name:
            raise ConversationError(
                f"turn {number} has the role system, which the template does not support"
            )
        text = template.turn(name, template.clean(content, role))
        if number == len(turns) and not template.mark:
            text = text.removesuffix(template.end)
        if role == "bot":
            spans.append((size + len(name + template.colon), size + len(text)))
        parts.append(text)
        size += len(text)
    return "".join(parts), tuple(spans)


def _turn(turn: Any, number: int) -> tuple[str, str]:
    if not isinstance(turn, Mapping):
        raise ConversationError(f"turn {number} is not an object with role and content")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise ConversationError(
            f"turn {number} has the role {role!r}, not one of {', '.join(ROLES)}"
        )
    if not isinstance(content, str):
        raise ConversationError(f"turn {number} has no text as content")
    return ROLES[role], content


def loss_mask(text: str, spans: Spans, sizes: np.ndarray) -> np.ndarray | None:
    """bool [tokens + 1]: whether each token of a text overlaps one of the spans, and for the
    end-of-document id whether a span reaches the end of the text.

    `sizes` are the tokens' lengths in bytes of UTF-8; None if they do not add up to the text.
    """
    ends = np.cumsum(sizes)
    if (ends[-1] if len(ends) else 0) != len(text.encode()):
        return None
    begins = ends - sizes
    mask = np.zeros(len(sizes) + 1, bool)
    for first, last in spans:
        start = len(text[:first].encode())
        stop = start + len(text[first:last].encode())
        mask[:-1] |= (begins < stop) & (ends > start)
        mask[-1] |= last == len(text)
    return mask
