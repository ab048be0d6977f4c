"""Sampling in a terminal: texts in order, their speed, and a dialogue about one text."""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rwkv_jax.errors import UserError
from rwkv_jax.interrupts import for_each, interruptible
from rwkv_jax.sampling import Sampling, Session, TextChunk
from rwkv_jax.sampling.settings import FLAGS, check_max_tokens
from rwkv_jax.sampling.stream import Finish

HELP = """\
What you type is appended to the text, and the model continues it. An empty line adds nothing.
A line that ends with a backslash continues on the next one, so \\ and Enter type a line break.
Commands (with a slash as well):

  :set                 shows the settings
  :set NAME VALUE      changes one: temperature, top_p, top_k, presence, frequency, decay,
                       min_p, tokens
  :seed N              restarts the random numbers; the text stays
  :reset               clears the text
  :help   :quit

Ctrl-C stops the model, Ctrl-D exits.
"""

KNOWN = ("set", "seed", "reset", "help", "quit")
"""Commands that may begin with a slash; other lines with one are text."""

ALIASES = {
    **dict.fromkeys(("q", "exit", "bye"), "quit"),
    **dict.fromkeys(("?", "h"), "help"),
    **dict.fromkeys(("clear", "new"), "reset"),
    "regen": "retry",
}
"""Names that other programs have for the commands."""

REASONS = {"stop": "stop string", "end": "end of document"}
"""Ends of a text that are worth a note."""

Number = TypeVar("Number", int, float)
Chunk = TypeVar("Chunk", bound=TextChunk)


class Meter:
    """Counts tokens, and their rate after the first call to the device, which waited for the
    compiler. `finish` is that of the last chunk."""

    def __init__(self):
        self._tokens: dict[float, int] = {}  # by the time of their call
        self.finish: Finish = ""

    def play(self, chunks: Iterable[Chunk], show: Callable[[Chunk], None]) -> None:
        """Shows chunks as they come. Ctrl-C raises KeyboardInterrupt between two of them."""

        def act(chunk: Chunk) -> None:
            if chunk.tokens:
                self._tokens[chunk.drawn] = self._tokens.get(chunk.drawn, 0) + chunk.tokens
            self.finish = chunk.finish
            show(chunk)

        for_each(chunks, act)

    def summary(self) -> str:
        """`200 tokens, 35.1 tokens/s`; without a rate if one call drew them all."""
        total, times = sum(self._tokens.values()), [*self._tokens]
        tokens = f"{total} token{'s' * (total != 1)}"
        if len(times) < 2:
            return tokens
        rate = (total - self._tokens[times[0]]) / (times[-1] - times[0])
        return f"{tokens}, {rate:.1f} tokens/s"


def print_texts(chunks: Iterable[TextChunk], prompts: Sequence[str], *, echo: bool = True) -> str:
    """Prints each prompt (unless `echo` is false) and its text to stdout as they come; returns
    `Meter.summary`.

    Of several prompts, the first is shown while it is written and the others wait their turn; each
    has a heading.
    """
    waiting = [[] for _ in prompts]
    done = [False] * len(prompts)
    current = -1

    def show_next() -> None:
        nonlocal current
        current += 1
        heading = f"==> {current + 1}/{len(prompts)} <==\n" if len(prompts) > 1 else ""
        show(("\n" if current else "") + heading + (prompts[current] if echo else ""))
        show("".join(waiting[current]))
        if done[current]:
            show("\n")

    def show_chunk(chunk: TextChunk) -> None:
        done[chunk.index] = bool(chunk.finish)
        if chunk.index != current:
            waiting[chunk.index].append(chunk.text)
            return
        show(chunk.text)
        if chunk.finish:
            show("\n")
            while done[current] and current + 1 < len(prompts):
                show_next()

    show_next()
    meter = Meter()
    meter.play(chunks, show_chunk)
    return meter.summary()


@dataclass
class TextDialogue:
    """A text that a user and the model write in turns.

    The model's text goes to stdout, everything else to stderr. A mistake is reported in one line,
    and the dialogue continues.
    """

    session: Session
    sampling: Sampling
    max_tokens: int
    stop: Sequence[str] = ()

    def run(self, opening: str | None = None) -> None:
        """Until the input ends or `:quit`; `opening`, if given, is the first line."""
        take_turns(self._obey, lambda: "> ", opening)

    def _obey(self, line: str) -> bool:
        """Whether to continue after a line."""
        command, rest = commanded(line, KNOWN)
        match command, rest.split():
            case "", _:
                self._write(line)
            case "quit", []:
                return False
            case "help", []:
                print(HELP, file=sys.stderr)
            case "reset", []:
                self.session.reset()
            case "seed", [number]:
                self.session.reseed(to_number(number, int))
            case "set", []:
                note(listed(self.sampling, self.max_tokens))
            case "set", [name, value]:
                self.sampling, self.max_tokens = changed(
                    self.sampling, self.max_tokens, name, value
                )
            case _:
                raise UserError(f"{line}: no such command; :help lists them")
        return True

    def _write(self, text: str) -> None:
        last = "\n"

        def chunks() -> Iterator[TextChunk]:
            self.session.feed(text)
            yield from self.session.stream(
                max_tokens=self.max_tokens, sampling=self.sampling, stop=self.stop
            )

        def show_chunk(chunk: TextChunk) -> None:
            nonlocal last
            show(chunk.text)
            last = (chunk.text or last)[-1]

        summary, stopped = play_turn(chunks(), show_chunk, REASONS)
        show("\n" if stopped or last != "\n" else "")
        note(summary)


def commanded(line: str, known: Collection[str] = ()) -> tuple[str, str]:
    """The command of a line, under its own name, and what follows it; "" and the line for text.

    A command begins with a colon, or with a slash if no more than a word follows that before a
    blank. With `known`, a slash needs one of these.

    >>> commanded("/exit"), commanded(":set top_p 0.5"), commanded("/usr/bin is a folder")
    (('quit', ''), ('set', 'top_p 0.5'), ('', '/usr/bin is a folder'))
    """
    colon = re.fullmatch(r":([a-z]+|\?)\s*(.*)", line, re.DOTALL)
    slash = re.fullmatch(r"/([a-zA-Z]+|\?)(?:\s+(.*))?", line, re.DOTALL)
    found = colon or slash
    if not found:
        return "", line
    name = found[1].lower()
    name = ALIASES.get(name, name)
    if slash and known and name not in known:
        return "", line
    return name, (found[2] or "").strip()


def play_turn(
    chunks: Iterable[Chunk], show: Callable[[Chunk], None], reasons: Mapping[str, str]
) -> tuple[str, bool]:
    """Shows the model's turn until it ends or Ctrl-C; returns a note about it, and whether it was
    Ctrl-C. `reasons` names the ends that are worth a note."""
    meter, stopped = Meter(), False
    try:
        meter.play(chunks, show)
    except KeyboardInterrupt:
        stopped = True
    reason = "stopped" if stopped else reasons.get(meter.finish)
    return ", ".join(filter(None, [meter.summary(), reason])), stopped


def take_turns(
    obey: Callable[[str], bool],
    prompt: Callable[[], str],
    opening: str | None = None,
    about: str = "",
) -> None:
    """Passes each line typed to `obey`, until it returns False or the input ends; `opening`, if
    given, is the first. The remark at the start ends with `about`. A `UserError` is reported, and
    neither it nor Ctrl-C ends the dialogue."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        with contextlib.suppress(io.UnsupportedOperation):  # already read from
            sys.stdin.reconfigure(errors="surrogateescape")  # any bytes may be typed
    note(f"Type :help for the commands. {about}".rstrip())
    line = opening
    while True:
        try:
            with interruptible():
                line = _read_lines(prompt()) if line is None else line
                if line is None or not obey(line):
                    return
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except UserError as error:
            note(str(error))
        line = None


def listed(sampling: Sampling, max_tokens: int) -> str:
    """The settings under the names that `changed` takes."""
    settings = {**sampling.flags(), "tokens": max_tokens}
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def changed(sampling: Sampling, max_tokens: int, name: str, value: str) -> tuple[Sampling, int]:
    """The settings with one of them replaced. Raises `UserError` for an unknown name or a bad
    value."""
    if name != "tokens" and name not in FLAGS:
        raise UserError(f"{name}: no such setting; one of {', '.join(FLAGS)}, tokens")
    number = to_number(value, int if name in ("top_k", "tokens") else float)
    if name != "tokens":
        return sampling.with_flags({name: number}), max_tokens
    check_max_tokens(int(number))
    return sampling, int(number)


def to_number(text: str, kind: type[Number]) -> Number:
    """`text` as an `int` or `float`. Raises `UserError`."""
    try:
        return kind(text)
    except ValueError:
        needed = "an integer" if kind is int else "a number"
        raise UserError(f"{text}: must be {needed}") from None


def show(text: str) -> None:
    """Prints text to stdout at once."""
    if text:
        print(text, end="", flush=True)


def note(text: str) -> None:
    """Prints a remark to stderr."""
    print(f"[{text}]", file=sys.stderr, flush=True)


def _read_lines(prompt: str) -> str | None:
    """The next input, continued after each backslash at the end of a line; None at the end."""
    lines: list[str] = []
    while True:
        asked = ("... " if lines else prompt) if sys.stdin.isatty() else ""
        if not sys.stdout.isatty():  # stdout is for the text alone
            print(end=asked, file=sys.stderr, flush=True)
            asked = ""
        try:
            typed = input(asked).removeprefix("\ufeff")  # of a file on stdin
        except EOFError:
            print(file=sys.stderr)
            return "\n".join(lines) if lines else None
        line = typed.encode(errors="surrogateescape").decode(errors="replace")
        if line != typed:
            note("what is not UTF-8 in this line is read as \ufffd: convert the text first")
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])
