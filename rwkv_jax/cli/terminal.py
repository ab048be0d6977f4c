"""Sampling in a terminal: several texts in order, their speed, and a dialogue with one text."""

import contextlib
import dataclasses
import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rwkv_jax.errors import UserError, held_interrupts, interruptible
from rwkv_jax.sampling.session import Finish, Piece, Sampling, Session, check_tokens

HELP = """\
What you type is appended to the text, and the model writes on. An empty line just goes on.
A line that ends with a backslash goes on in the next one, so \\ and Enter type a new line.

  :set                 shows the settings
  :set NAME VALUE      changes one: temperature, top_p, top_k, presence, frequency, decay, tokens
  :seed N              starts the random numbers again; the text stays
  :reset               forgets the text
  :help   :quit

Ctrl-C stops the writing, Ctrl-D leaves.
"""

Number = TypeVar("Number", int, float)
AnyPiece = TypeVar("AnyPiece", bound=Piece)

REASONS: dict[Finish, str] = {"stop": "stop string", "end": "end of document"}


class Meter:
    """Counts tokens, and their rate after the first piece, which waited for the compiler."""

    def __init__(self):
        self._tokens, self._later = 0, 0
        self._first: float | None = None
        self._last = 0.0

    def count(self, pieces: Iterable[AnyPiece]) -> Iterator[AnyPiece]:
        """The pieces, counted as they pass."""
        for piece in pieces:
            self._last = time.perf_counter()
            self._tokens += piece.tokens
            if self._first is None:
                self._first = self._last
            else:
                self._later += piece.tokens
            yield piece

    def summary(self) -> str:
        """`200 tokens, 35.1 tokens/s`; without a rate if there is nothing to tell it from."""
        tokens = f"{self._tokens} token{'s' * (self._tokens != 1)}"
        seconds = self._last - (self._first or 0.0)
        return f"{tokens}, {self._later / seconds:.1f} tokens/s" if self._later else tokens


def print_texts(pieces: Iterable[Piece], prompts: Sequence[str], *, echo: bool = True) -> None:
    """Prints each prompt (unless `echo` is false) and its text to stdout, as they come.

    Of several prompts, the first is shown while it is written, the others wait their turn; each has
    a heading. Ctrl-C stops it between two pieces.
    """
    with held_interrupts() as check:
        _print_texts(pieces, prompts, echo, check)


def _print_texts(
    pieces: Iterable[Piece], prompts: Sequence[str], echo: bool, check: Callable[[], None]
) -> None:
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

    show_next()
    for piece in pieces:
        check()
        done[piece.index] = bool(piece.finish)
        if piece.index != current:
            waiting[piece.index].append(piece.text)
            continue
        show(piece.text)
        if piece.finish:
            show("\n")
            while done[current] and current + 1 < len(prompts):
                show_next()


@dataclass
class Dialogue:
    """A text that a person and the model write in turns.

    Generated text goes to stdout, everything about it to stderr. What cannot be done is said in one
    line, and the dialogue goes on.
    """

    session: Session
    sampling: Sampling
    max_tokens: int
    stop: Sequence[str] = ()

    def run(self, opening: str | None = None) -> None:
        """Until the input ends or `:quit`; `opening`, if given, is taken as typed first."""
        take_turns(self._obey, lambda: "> ", opening)

    def _obey(self, line: str) -> bool:
        """Whether to go on after a line."""
        command, *words = line.split() if line.startswith(":") else ("",)
        match command, words:
            case "", _:
                self._write(line)
            case ((":quit" | ":q"), []):
                return False
            case ":help", []:
                print(HELP, file=sys.stderr)
            case ":reset", []:
                self.session.reset()
            case ":seed", [number]:
                self.session.reseed(to_number(number, int))
            case ":set", []:
                note(listed(self.sampling, self.max_tokens))
            case ":set", [name, value]:
                self.sampling, self.max_tokens = changed(
                    self.sampling, self.max_tokens, name, value
                )
            case _:
                raise UserError(f"{line}: no such command; :help lists them")
        return True

    def _write(self, text: str) -> None:
        meter, finish, last = Meter(), "", "\n"
        try:
            with interruptible(), held_interrupts() as check:
                self.session.feed(text)
                pieces = self.session.stream(
                    max_tokens=self.max_tokens, sampling=self.sampling, stop=self.stop
                )
                for piece in meter.count(pieces):
                    show(piece.text)
                    finish, last = piece.finish, (piece.text or last)[-1]
                    check()
        except KeyboardInterrupt:
            show("\n")
            note(f"stopped after {meter.summary()}")
            return
        show("" if last == "\n" else "\n")
        note(", ".join(filter(None, [meter.summary(), REASONS.get(finish)])))


def take_turns(
    obey: Callable[[str], bool], prompt: Callable[[], str], opening: str | None = None
) -> None:
    """Passes what is typed to `obey`, until it says not to go on or the input ends; `opening`, if
    given, is passed first. Neither an error of the user's nor Ctrl-C ends it."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        with contextlib.suppress(io.UnsupportedOperation):  # too late, it was read from
            sys.stdin.reconfigure(errors="replace")  # any bytes may be typed
    note("Type :help for the commands.")
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
    """The settings, in the names that `changed` knows."""
    settings = {**dataclasses.asdict(sampling), "tokens": max_tokens}
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def changed(sampling: Sampling, max_tokens: int, name: str, value: str) -> tuple[Sampling, int]:
    """The settings, one of them changed. Raises `UserError` for a name or value that cannot be."""
    names = [field.name for field in dataclasses.fields(Sampling)]
    if name == "tokens":
        max_tokens = to_number(value, int)
        check_tokens(max_tokens)
    elif name in names:
        number = to_number(value, int) if name == "top_k" else to_number(value, float)
        sampling = dataclasses.replace(sampling, **{name: number})
    else:
        raise UserError(f"{name}: no such setting; one of {', '.join(names)}, tokens")
    return sampling, max_tokens


def to_number(text: str, kind: type[Number]) -> Number:
    """What was typed as a number. Raises `UserError`."""
    try:
        return kind(text)
    except ValueError:
        raise UserError(
            f"{text}: {'an integer' if kind is int else 'a number'} is needed"
        ) from None


def show(text: str) -> None:
    """Prints text to stdout, at once."""
    if text:
        print(text, end="", flush=True)


def note(text: str) -> None:
    """Prints something about the text to stderr."""
    print(f"[{text}]", file=sys.stderr, flush=True)


def _read_lines(prompt: str) -> str | None:
    """What is typed next, continued after each backslash at the end of a line; None at the end."""
    lines: list[str] = []
    while True:
        asked = ("... " if lines else prompt) if sys.stdin.isatty() else ""
        if not sys.stdout.isatty():  # it is for the text alone
            print(end=asked, file=sys.stderr, flush=True)
            asked = ""
        try:
            line = input(asked)
        except EOFError:
            print(file=sys.stderr)
            return "\n".join(lines) if lines else None
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])
