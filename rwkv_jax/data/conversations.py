"""How conversations are written down, and which of it an assistant said.

    System: Be kind.

    User: hi

    Assistant: Hi. How can I help?

Turns are separated by an empty line, which is nowhere else but in replies. Sources: the templates
of BlinkDL's models, `RWKV-v7/RWKV7-G1x-templates.txt` of BlinkDL/RWKV-LM and `API_DEMO_CHAT.py` of
BlinkDL/ChatRWKV.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

END = "\n\n"
"""Between turns, and in training nowhere else but in replies."""


@dataclass(frozen=True)
class Template:
    """How the turns of a conversation are written down."""

    user: str = "User"
    bot: str = "Assistant"
    system: str = "System"
    """Whose turn the system prompt is; empty for models that know none."""
    opening: str = ""
    """Begins a conversation that has neither a system prompt nor a state to start from."""
    paragraphs: bool = True
    """Whether there may be empty lines in a reply; otherwise the first one ends it."""

    @property
    def stops(self) -> tuple[str, ...]:
        """What ends a reply: somebody's next turn, or an empty line."""
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
}
"""G1 models; World models; Raven and Pile ones, those with the 20B vocabulary."""

ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "bot", "gpt", "model"), "bot"),
}
"""What files call a template's roles."""

Spans = tuple[tuple[int, int], ...]
"""Parts of a text: first character, and the one after the last."""


class ConversationError(ValueError):
    """Turns that are not a conversation."""


def clean(text: str) -> str:
    """What is typed, without empty lines: they separate turns."""
    return re.sub(r"\n{2,}", "\n", text.replace("\r\n", "\n")).strip()


def written(turns: list[Any], template: Template) -> tuple[str, Spans]:
    """The conversation as text, and where in it the assistant speaks.

    A turn is a mapping with `role` and `content` (or `from` and `value`). A reply's part begins
    after the colon and reaches to the next turn, so that its end is learnt too. Raises
    `ConversationError` for anything else.

    >>> written([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hi."}],
    ...         TEMPLATES["g1"])
    ('User: hi\\n\\nAssistant: Hi.', ((20, 24),))
    """
    parts, spans, size = [], [], 0
    for number, turn in enumerate(turns, 1):
        role, content = _turn(turn, number)
        name = getattr(template, role)
        if not name:
            raise ConversationError(f"turn {number} is of role system, which the template has not")
        keeps = role == "bot" and template.paragraphs
        said = content.replace("\r\n", "\n").strip() if keeps else clean(content)
        text = f" {said}" + (END if number < len(turns) else "")
        if role == "bot":
            begin = size + len(name) + 1
            spans.append((begin, begin + len(text)))
        parts.append(f"{name}:{text}")
        size += len(parts[-1])
    return "".join(parts), tuple(spans)


def _turn(turn: Any, number: int) -> tuple[str, str]:
    if not isinstance(turn, Mapping):
        raise ConversationError(f"turn {number} is no object with role and content")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise ConversationError(f"turn {number} is of role {role!r}: one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ConversationError(f"turn {number} has no content that is text")
    return ROLES[role], content


def trained(text: str, spans: Spans, sizes: np.ndarray) -> np.ndarray | None:
    """Of each token of a text, whether some of it is in one of the spans; and last of all, whether
    the document's end is trained on: where a span reaches it.

    `sizes` are the tokens' lengths in bytes of UTF-8; None if they are not those of the text.
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
