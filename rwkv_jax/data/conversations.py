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

import contextlib
import json
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
    thoughtless: str = ""
    """How a reply without a thought begins."""

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
    "flower": Template(bot="Bot", mark=FLOWER, thoughtless="<think></think>"),
}
"""For G1 models, for World models, for those with the 20B vocabulary (Raven and Pile), and for G1
models since G1h."""

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "bot", "gpt", "model", "ai", "chatgpt", "chatbot", "bing", "bard"), "bot"
    ),
    **dict.fromkeys(("tool", "function", "ipython", "observation"), "tool"),
}
"""Role names found in data sets, in small letters, and what each one means: a role of the template,
or the result of a tool, which the official templates put into the user's turn."""

ROLE_KEYS, CONTENT_KEYS = ("role", "from", "speaker"), ("content", "value", "text")
RESULT = "Function output:\n"
"""What precedes the result of a tool. Source: RWKV7-G1x-templates.txt."""

Spans = tuple[tuple[int, int], ...]
"""Parts of a text, as (first character, last + 1)."""


class ConversationError(ValueError):
    """A record that is not the text or conversation asked for."""


class EmptyTurnError(ConversationError):
    """A turn without a text, such as an empty reply."""


def clean(text: str) -> str:
    """A turn's content without empty lines, which would end the turn, and blanks at ends of lines.

    >>> clean("A  \\r\\n\\r\\n  B\\t  \\n\\n\\n")
    'A\\n  B'
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "\n".join(filter(None, (line.rstrip() for line in lines))).strip()


def render(turns: list[Any], template: Template, *, stops: bool = True) -> tuple[str, Spans]:
    """The conversation as text, and the spans of the assistant's replies in it.

    A turn is a mapping with `role` and `content` (or other names for them: `ROLE_KEYS`,
    `CONTENT_KEYS`); `content` is a text, or a list of parts with a `text`. Calls of tools
    (`tool_calls`) are a block of JSON in the reply.

    The span of a reply starts after the colon and contains what a chat stops at, so that the model
    learns to stop: the end of its turn, and in templates whose replies may have empty lines the
    name of the next role. In the flower template it begins as in a chat, with an empty thought.
    Without `stops` neither is so, as in versions before December 2026. Raises ConversationError for
    anything else.

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
        if stops and template.paragraphs and not template.mark and spans and spans[-1][1] == size:
            spans[-1] = spans[-1][0], size + len(name + template.colon)
        content = template.clean(content, role)
        if stops and role == "bot" and not content:
            raise EmptyTurnError(f"turn {number} is an empty reply")
        if stops and role == "bot" and not content.startswith("<think>"):
            content = template.thoughtless + content
        text = template.turn(name, content)
        if number == len(turns) and not template.mark:
            text = text.removesuffix(template.end)
        if role == "bot" and turn.get("weight", 1) != 0:  # OpenAI's mark for: do not train
            spans.append((size + len(name + template.colon), size + len(text)))
        parts.append(text)
        size += len(text)
    return "".join(parts), tuple(spans)


def _turn(turn: Any, number: int) -> tuple[str, str]:
    """Role in a template and text of a turn."""
    if not isinstance(turn, Mapping):
        raise ConversationError(f"turn {number} is not an object with role and content")
    role = next((turn[key] for key in ROLE_KEYS if key in turn), None)
    known = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        raise ConversationError(
            f"turn {number} has the role {role!r}, not one of {', '.join(ROLES)}"
        )
    content = next((turn[key] for key in CONTENT_KEYS if turn.get(key) is not None), None)
    parts = [] if content is None else content if isinstance(content, list) else [content]
    texts = [_part(part, number) for part in parts]
    calls = turn.get("tool_calls") or [{"function": turn.get("function_call")}]
    texts += [f"```json\n{call}\n```" for call in map(_call, calls) if call]
    if isinstance(reasoning := turn.get("reasoning_content"), str) and reasoning.strip():
        texts.insert(0, f"<think>\n{reasoning.strip()}\n</think>\n")
    if not texts:
        raise EmptyTurnError(f"turn {number} has no text as content")
    text = "\n".join(texts)
    return ("user", RESULT + text) if known == "tool" else (known, text)


def _part(part: Any, number: int) -> str:
    """The text of a part of a turn's content."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise ConversationError(f"turn {number} has a part of type {kind!r}; only text can be read")


def _call(call: Any) -> str:
    """The JSON of a call of a tool; empty if it is none."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        return ""
    arguments = function.get("arguments", {})
    with contextlib.suppress(ValueError, TypeError):  # in OpenAI's format they are a JSON string
        arguments = json.loads(arguments)
    return json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)


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
