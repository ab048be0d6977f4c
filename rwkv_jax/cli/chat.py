"""Chat in a terminal, and conversations in files."""

import os
import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rwkv_jax import states
from rwkv_jax.cli.terminal import changed, listed, note, play_turn, show, take_turns, to_number
from rwkv_jax.data.conversations import Template
from rwkv_jax.errors import UserError
from rwkv_jax.sampling import Generator, Prefix
from rwkv_jax.sampling.chat import DEFAULTS, THINK, ChatChunk, Conversation

HELP = f"""\
The model replies to what you type. A line that ends with a backslash continues on the next one. A
line that begins with a colon and a small letter is one of these commands:

  :retry               another reply to your last message
  :undo                drops the last exchange
  :reset               starts a new conversation
  :system TEXT         starts one with this system prompt; :system alone, with none
  :think WAY           {", ".join(THINK)}
  :thoughts show       or hide: whether thoughts are shown, which never go to stdout
  :set                 shows the settings
  :set NAME VALUE      changes one: temperature, top_p, top_k, presence, frequency, decay, tokens
  :seed N              the seed of the next reply; each later reply adds 1
  :save FILE           saves the conversation in FILE.safetensors
  :load FILE           resumes another one
  :help   :quit

Ctrl-C stops the reply, Ctrl-D exits.
"""

REASONS = {"length": "cut off", "end": "end of document"}
"""Ends of a reply that are worth a note."""


def chat(
    generator: Generator,
    *,
    template: Template | None = None,
    system: str | None = None,
    settings: Mapping[str, Any] | None = None,
    prefix: Prefix | None = None,
    resume: Path | None = None,
    save: Path | None = None,
) -> None:
    """A dialogue on stdin and stdout, until the input ends or `:quit`.

    `resume` is the file of a conversation to resume, `save` the one to save it in at the end;
    a new conversation starts at `prefix`. `settings` are those of `ReplySettings` to set. The
    others are as in `resume`; without it, they are the defaults, the model's likeliest template, no
    system prompt and a random seed.

    Raises `UserError` for invalid arguments before any input is read.
    """
    if save is not None:
        states.check_save_path(save)
    if resume is None:
        drawn = replace(DEFAULTS, seed=secrets.randbelow(2**31))
        talk = Conversation(generator, template, system=system or "", settings=drawn, prefix=prefix)
    elif template is not None or system is not None:
        raise UserError(f"{resume} has a template and a system prompt: give no others")
    else:
        talk = load(resume, generator, prefix)
    talk.configure(**settings or {})
    dialogue = ChatDialogue(talk, prefix)
    try:
        dialogue.run()
    finally:
        if save is not None:
            dialogue.save(save)


def save(path: Path, conversation: Conversation) -> None:
    """Writes a conversation as a state with notes (`rwkv_jax.states`); the name ends in
    `.safetensors`. Raises `UserError`."""
    states.check_save_path(path)
    state, logits, weights = conversation.state, conversation.logits, conversation.generator.weights
    states.save(path, state, logits=logits, notes=conversation.notes(), weights=weights)


def load(path: Path, generator: Generator, prefix: Prefix | None = None) -> Conversation:
    """The conversation that `save` wrote; `prefix` is where it starts when reset.

    Raises `UserError`, one line, if the file has none, or one of another model.
    """
    saved = states.load(path, generator.cfg, weights=generator.weights)
    try:
        return Conversation.resumed(generator, saved.state, saved.logits, saved.notes, prefix)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


@dataclass
class ChatDialogue:
    """A conversation typed in a terminal. Answers go to stdout, thoughts and all else to stderr."""

    conversation: Conversation
    prefix: Prefix | None = None
    """Where a loaded conversation starts when reset."""
    thoughts: bool = True
    """Whether thoughts are shown."""

    def run(self) -> None:
        """Plays the dialogue until the input ends or `:quit` is typed."""
        take_turns(self._obey, lambda: f"{self.conversation.template.user}: ")

    def save(self, path: Path) -> None:
        """Saves the conversation, if there is one."""
        if self.conversation.exchanges:
            save(path, self.conversation)
            note(f"saved in {path}")
        else:
            note(f"nothing was said: {path} is not written")

    def _obey(self, line: str) -> bool:
        """Whether to continue after a line."""
        talk = self.conversation
        typed = re.fullmatch(r":([a-z]+)\s*(.*?)\s*", line, re.DOTALL)
        match typed.groups() if typed else ("", line):
            case "", text:
                if text.strip():
                    self._write(talk.say(text))
            case "quit" | "q", "":
                return False
            case "help", "":
                print(HELP, file=sys.stderr)
            case "retry", "":
                self._write(talk.retry())
            case "undo", "":
                talk.undo()
                note(self._length())
            case "reset", "":
                talk.reset()
                note("a new conversation")
            case "system", text:
                talk.reset(text)
                note(f"a new conversation, with{'' if text else 'out'} a system prompt")
            case "think", way:
                talk.configure(think=way or talk.settings.think)
                note(f"think {talk.settings.think}")
            case "thoughts", "show" | "hide" as way:
                self.thoughts = way == "show"
            case "set", "":
                now = talk.settings
                settings = listed(now.sampling, now.max_tokens)
                note(f"{settings}, think {now.think}, seed {now.seed}")
            case "set", pair if len(words := pair.split()) == 2:
                now = talk.settings
                sampling, max_tokens = changed(now.sampling, now.max_tokens, *words)
                talk.configure(sampling=sampling, max_tokens=max_tokens)
            case "seed", number if number:
                talk.configure(seed=to_number(number, int))
            case "save", name if name:
                save(path := _file(name), talk)
                note(f"saved in {path}")
            case "load", name if name:
                self.conversation = load(_file(name), talk.generator, self.prefix)
                note(self._length())
            case _:
                raise UserError(
                    f"{line}: no such command; :help lists them, and a space before the colon"
                    " makes it a message"
                )
        return True

    def _length(self) -> str:
        count = self.conversation.exchanges
        return f"{count} exchange{'s' * (count != 1)} so far"

    def _write(self, chunks: Iterator[ChatChunk]) -> None:
        aside = _Aside(self.thoughts)

        def show_chunk(chunk: ChatChunk) -> None:
            aside.show(chunk.thought)
            if chunk.text:
                aside.end()
                show(chunk.text)

        if sys.stdin.isatty() and sys.stdout.isatty():
            print(end=f"{self.conversation.template.bot}: ", file=sys.stderr, flush=True)
        try:
            summary, _ = play_turn(chunks, show_chunk, REASONS)
        finally:
            aside.end()
        show("\n")
        note(summary)


def _file(name: str) -> Path:
    """The file that `:save` and `:load` mean; the suffix may be omitted."""
    return Path(name if name.endswith(states.SUFFIX) else name + states.SUFFIX)


class _Aside:
    """Shows a thought on stderr, dimmed on a terminal; or just that there is one."""

    def __init__(self, shown: bool):
        self._shown = shown
        self._dimmed = sys.stderr.isatty() and "NO_COLOR" not in os.environ
        self._started = False

    def show(self, text: str) -> None:
        if text and not self._started:
            self._started = True
            self._print("\x1b[2m" if self._dimmed else "", "[thinking]\n")
        self._print(text)

    def end(self) -> None:
        if self._started:
            self._started = False
            self._print("\x1b[22m\n" if self._dimmed else "\n")

    def _print(self, text: str, hidden: str = "") -> None:
        print(end=text if self._shown else hidden, file=sys.stderr, flush=True)
