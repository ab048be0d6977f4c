"""Chat in a terminal, and conversations in files."""

import os
import re
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rwkv_jax import states
from rwkv_jax.cli.terminal import Meter, changed, listed, note, show, take_turns, to_number
from rwkv_jax.data.conversations import Template
from rwkv_jax.errors import UserError, held_interrupts, interruptible
from rwkv_jax.sampling import Sampling, Start, Writer
from rwkv_jax.sampling.chat import THINK, ChatPiece, Conversation
from rwkv_jax.sampling.session import Finish, check_seed, check_tokens

HELP = f"""\
What you type is said to the model, which replies. A line that ends with a backslash goes on in the
next one. A line that begins with a colon and a small letter is one of these commands:

  :retry               another reply to what you said last
  :undo                drops the last exchange
  :reset               begins a new conversation
  :system TEXT         begins one with this system prompt; :system alone, with none
  :think WAY           {", ".join(THINK)}
  :thoughts show       or hide: whether thoughts are shown, which never go to stdout
  :set                 shows the settings
  :set NAME VALUE      changes one: temperature, top_p, top_k, presence, frequency, decay, tokens
  :seed N              the next reply is drawn with it, each one after with one more
  :save FILE           keeps the conversation in FILE.safetensors
  :load FILE           goes on with another
  :help   :quit

Ctrl-C stops the reply, Ctrl-D leaves.
"""

REASONS: dict[Finish, str] = {"length": "cut off", "end": "end of document"}
"""Of the ends of a reply, those worth a word."""


def chat(
    writer: Writer,
    *,
    seed: int | None = None,
    sampling: Sampling | None = None,
    max_tokens: int | None = None,
    template: Template | None = None,
    system: str | None = None,
    think: str | None = None,
    thoughts: bool = True,
    start: Start | None = None,
    resume: Path | None = None,
    save: Path | None = None,
) -> None:
    """A dialogue on stdin and stdout, until the input ends or `:quit`.

    `resume` is a file to go on from, and `save` one to keep the conversation in at the end. What is
    None is as in the file, or else: a random seed, `CHAT_SAMPLING`, `CHAT_TOKENS`, the template
    that is likeliest for the model, no system prompt and no thinking. `start` is where a new
    conversation begins.

    Raises `UserError` for what cannot be, before anything is read.
    """
    if save is not None:
        states.check_save_path(save)
    if seed is not None:
        check_seed(seed)
    if max_tokens is not None:
        check_tokens(max_tokens)
    if resume is None:
        drawn = secrets.randbelow(2**31)
        talk = Conversation(writer, template, system=system or "", seed=drawn, start=start)
    elif template is not None or system is not None:
        raise UserError(f"{resume} has a template and a system prompt: give no others")
    else:
        talk = load(resume, writer, start)
    given = {"seed": seed, "sampling": sampling, "max_tokens": max_tokens, "think": think}
    for name, value in given.items():
        if value is not None:
            setattr(talk, name, value)
    dialogue = Dialogue(talk, thoughts, start)
    try:
        dialogue.run()
    finally:
        if save is not None:
            dialogue.keep(save)


def save(path: Path, conversation: Conversation) -> None:
    """Writes a conversation as a state with notes (`rwkv_jax.states`), the name ending in
    `.safetensors`. Raises `UserError`."""
    states.check_save_path(path)
    state, logits = conversation.state, conversation.logits
    states.save(path, state, logits=logits, notes=conversation.notes())


def load(path: Path, writer: Writer, start: Start | None = None) -> Conversation:
    """The conversation that `save` wrote; `start` is where it begins when reset.

    Raises `UserError`, one line, if there is none in the file, or another model's.
    """
    saved = states.load(path, writer.cfg)
    try:
        return Conversation.resumed(writer, saved.state, saved.logits, saved.notes, start)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


@dataclass
class Dialogue:
    """A conversation typed in a terminal.

    Answers go to stdout; thoughts, and everything about the conversation, to stderr.
    """

    conversation: Conversation
    thoughts: bool = True
    """Whether they are shown."""
    start: Start | None = None
    """Where a loaded conversation begins when it is reset."""

    def run(self) -> None:
        """Until the input ends or `:quit`."""
        take_turns(self._obey, lambda: f"{self.conversation.template.user}: ")

    def keep(self, path: Path) -> None:
        """Saves the conversation, if there is any."""
        if self.conversation.exchanges:
            save(path, self.conversation)
            note(f"saved in {path}")
        else:
            note(f"nothing was said, and {path} is not written")

    def _obey(self, line: str) -> bool:
        """Whether to go on after a line."""
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
                talk.think = way or talk.think
                note(f"think {talk.think}")
            case "thoughts", "show" | "hide" as way:
                self.thoughts = way == "show"
            case "set", "":
                settings = listed(talk.sampling, talk.max_tokens)
                note(f"{settings}, think {talk.think}, seed {talk.seed}")
            case "set", pair if len(words := pair.split()) == 2:
                talk.sampling, talk.max_tokens = changed(talk.sampling, talk.max_tokens, *words)
            case "seed", number if number:
                seed = to_number(number, int)
                check_seed(seed)
                talk.seed = seed
            case "save", name if name:
                save(path := _file(name), talk)
                note(f"saved in {path}")
            case "load", name if name:
                self.conversation = load(_file(name), talk.writer, self.start)
                note(self._length())
            case _:
                raise UserError(
                    f"{line}: no such command; :help lists them, and a space before the colon"
                    " makes it something to say"
                )
        return True

    def _length(self) -> str:
        count = self.conversation.exchanges
        return f"{count} exchange{'s' * (count != 1)} so far"

    def _write(self, pieces: Iterator[ChatPiece]) -> None:
        meter, aside, reason = Meter(), _Aside(self.thoughts), None
        if sys.stdin.isatty() and sys.stdout.isatty():
            print(end=f"{self.conversation.template.bot}: ", file=sys.stderr, flush=True)
        try:
            with interruptible(), held_interrupts() as check:
                for piece in meter.count(pieces):
                    aside.show(piece.thought)
                    if piece.text:
                        aside.end()
                        show(piece.text)
                    reason = REASONS.get(piece.finish)
                    check()
        except KeyboardInterrupt:
            reason = "stopped"
        finally:
            aside.end()
        show("\n")
        note(", ".join(filter(None, [meter.summary(), reason])))


def _file(name: str) -> Path:
    """What `:save` and `:load` mean: the suffix may be left out."""
    return Path(name if name.endswith(states.SUFFIX) else name + states.SUFFIX)


class _Aside:
    """Shows a thought on stderr, dimmed on a terminal; or only that there is one."""

    def __init__(self, shown: bool):
        self._shown = shown
        self._dimmed = sys.stderr.isatty() and "NO_COLOR" not in os.environ
        self._begun = False

    def show(self, text: str) -> None:
        if text and not self._begun:
            self._begun = True
            self._print("\x1b[2m" if self._dimmed else "", "[thinking]\n")
        self._print(text)

    def end(self) -> None:
        if self._begun:
            self._begun = False
            self._print("\x1b[22m\n" if self._dimmed else "\n")

    def _print(self, text: str, instead: str = "") -> None:
        print(end=text if self._shown else instead, file=sys.stderr, flush=True)
