"""Chat in a terminal, and conversations in files."""

import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rwkv_jax import states
from rwkv_jax.checkpoint import store
from rwkv_jax.cli.terminal import (
    changed,
    commanded,
    listed,
    note,
    play_turn,
    show,
    take_turns,
    to_number,
)
from rwkv_jax.config import ModelConfig
from rwkv_jax.data.conversations import TEMPLATES, Template
from rwkv_jax.data.records import CONVERSATIONS
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.errors import UserError
from rwkv_jax.sampling import Generator, Prefix
from rwkv_jax.sampling.chat import (
    DEFAULTS,
    THINK,
    ChatChunk,
    Conversation,
    preset_for,
    template_for,
)
from rwkv_jax.sampling.presets import PRESETS, preset, release_of

HELP = f"""\
The model replies to what you type. A line that ends with a backslash continues on the next one. A
line that begins with a colon and a small letter, or with a slash and a word, is one of these
commands:

  :retry               another reply to your last message
  :undo                drops the last exchange
  :reset               starts a new conversation
  :system TEXT         starts one with this system prompt; :system alone, with none
  :think WAY           {", ".join(THINK)}
  :thoughts show       or hide: whether thoughts are shown, which never go to stdout
  :preset NAME         sampling of official models: {", ".join(PRESETS)}
  :set                 shows the settings
  :set NAME VALUE      changes one: temperature, top_p, top_k, presence, frequency, decay,
                       min_p, tokens
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
    save: Path | None = None,
    why: str = "",
    prefix: Prefix | None = None,
    **given: Any,
) -> None:
    """A dialogue on stdin and stdout, until the input ends or `:quit`.

    `save` is the file to save it in at the end, `why` the reason for its template; the others are
    as for `opened`. Raises `UserError` for invalid arguments before any input is read.
    """
    dialogue = ChatDialogue(opened(generator, prefix=prefix, **given), prefix)
    try:
        dialogue.run(why)
    finally:
        if save is not None:
            dialogue.save(save)


def opened(
    generator: Generator,
    *,
    template: Template | None = None,
    system: str | None = None,
    settings: Mapping[str, Any] | None = None,
    prefix: Prefix | None = None,
    resume: Path | None = None,
) -> Conversation:
    """A conversation: that of the file `resume`, or a new one, which starts at `prefix`.

    `settings` are those of `ReplySettings` to set, and as `flags` single values of its sampling.
    The others are as in `resume`; without it, they are the defaults, the model's likeliest template
    and its preset, no system prompt and a random seed.

    Raises `UserError` for invalid arguments.
    """
    changes = dict(settings or {})
    flags = changes.pop("flags", {})
    if resume is None:
        drawn = replace(DEFAULTS, seed=secrets.randbelow(2**31))
        talk = Conversation(generator, template, system=system or "", settings=drawn, prefix=prefix)
        talk.configure(think=changes.get("think", drawn.think))
        talk.configure(sampling=PRESETS[preset_for(talk.template, talk.settings.think)])
    else:
        talk = load(resume, generator, prefix)
        same = system is None or talk.template.clean(system) == talk.system
        if template not in (None, talk.template) or not same:
            prompt = f"the system prompt {talk.system!r}" if talk.system else "no system prompt"
            raise UserError(
                f"{resume} has the template {_named(TEMPLATES, talk.template)} and {prompt}: leave"
                " out --template and --system, or give the same"
            )
    talk.configure(**changes)
    talk.configure(sampling=talk.settings.sampling.with_flags(flags))
    return talk


def likely_template(model: Path, cfg: ModelConfig, tokenizer: Tokenizer) -> tuple[str, str]:
    """The name of the chat template of a model, and the reason: what its run was trained with, or
    its release by the name of the file, or else its version."""
    name = model.expanduser().absolute()
    if found := store.find_run(name):
        run = store.read_config(found.folder)
        talks = run.data.field in CONVERSATIONS or "," in run.data.field
        if run.data.train_on == "answers" or talks or run.data.mixture or not run.train.init:
            return run.data.template, "that of its run"
        name = Path(run.train.init) if run.train.init else name
    release, usual = release_of(name), template_for(cfg, tokenizer)
    if release and release.template and usual != TEMPLATES["raven"]:
        return release.template, f"{release}, by its name"
    return next(x for x, y in TEMPLATES.items() if y == usual), f"usual for version {cfg.version}"


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

    def run(self, why: str = "") -> None:
        """Plays the dialogue until the input ends or `:quit` is typed; `why` is the reason for its
        template."""
        talk = self.conversation
        name = _named(TEMPLATES, talk.template)
        about = f"Template {name}{f' ({why})' if why else ''}"
        about += f", sampling {_named(PRESETS, talk.settings.sampling)}."
        take_turns(self._obey, lambda: f"{self.conversation.template.user}: ", about=about)

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
        match commanded(line):
            case "", text:
                if text.strip():
                    self._write(talk.say(text))
            case "quit", "":
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
                self._think(way or talk.settings.think)
            case "preset", name if name:
                talk.configure(sampling=preset(name))
                note(listed(talk.settings.sampling, talk.settings.max_tokens))
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
                    f"{line}: no such command; :help lists them, and a space before it makes it"
                    " a message"
                )
        return True

    def _think(self, way: str) -> None:
        """Sets the way to think, and its sampling unless that was changed."""
        talk = self.conversation
        before, now = talk.settings, preset_for(talk.template, way)
        talk.configure(think=way)
        usual = before.sampling == PRESETS[preset_for(talk.template, before.think)]
        if usual and before.sampling != PRESETS[now]:
            talk.configure(sampling=PRESETS[now])
            note(f"think {way}, sampling as in the preset {now}")
        else:
            note(f"think {way}")

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


def _named(table: Mapping[str, Any], value: Any) -> str:
    return next((name for name, known in table.items() if known == value), "custom")


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
