"""The prompts and stop strings of a command line."""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rwkv_jax import disk
from rwkv_jax.errors import UserError

ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def unescaped(text: str) -> str:
    r"""The text with `\n`, `\t`, `\r` and `\\` as the characters that they mean; a text that has
    line ends of its own, such as pasted code, is returned as it is.

    >>> unescaped(r"User: hi\n\nAssistant:")
    'User: hi\n\nAssistant:'
    """
    if "\n" in text:
        return text
    return re.sub(r"\\([ntr\\])", lambda found: ESCAPES[found[1]], text)


def typed(argument: str, escape: bool) -> str:
    """An argument as text: the shell may pass bytes that are not UTF-8."""
    text = os.fsencode(argument).decode(errors="replace")
    return unescaped(text) if escape else text


def read(option: str, name: str) -> tuple[str, str]:
    """The text of a file (`-` is stdin), with plain line ends and without a byte-order mark, and a
    remark: of characters that were cut off at the start or the end, the rest is left out."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"{option} {name}: {error.strerror}; give a text file") from None
    try:
        text, cut = data.decode(), ""
    except UnicodeDecodeError as error:
        try:
            text = _whole_characters(data).decode()
        except UnicodeDecodeError:
            raise UserError(
                f"{option} {name}: byte {error.start} is not UTF-8; convert it first"
            ) from None
        cut = f"{option} {name} is cut inside a character, which is left out"
    return text.removeprefix("\ufeff").replace("\r\n", "\n"), cut


def _whole_characters(data: bytes) -> bytes:
    """The data without a part of a character at its start or end. A single byte is such a part only
    if there are other characters beyond ASCII: else it may as well be Latin-1."""
    start = next((n for n in range(min(4, len(data))) if data[n] & 0xC0 != 0x80), 0)
    end = len(data)
    for length in range(1, min(4, len(data)) + 1):
        lead = data[-length]
        if lead & 0xC0 != 0x80:
            needed = 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1
            end -= length if length < needed else 0
            break
    whole = data[start:end]
    sure = start > 1 or len(data) - end > 1 or not whole.isascii()
    return whole if sure else data


@dataclass(frozen=True)
class Prompts:
    """What the arguments ask the model to continue, before there is a tokenizer."""

    texts: list[str | list[int]]
    stop: list[str]
    after: str | None = None
    """The text that follows the one to be written."""
    remarks: list[str] = field(default_factory=list)

    def encoded(self, tokenizer: Any) -> tuple[list[Any], list[str]]:
        """The prompts for the model, and the text of each to be shown."""
        texts = self.texts or [""]
        if self.after is not None:
            from rwkv_jax.sampling.prompts import between

            known = [text for text in texts if isinstance(text, str)]  # all: see `prompts_of`
            return [between(tokenizer, text, self.after) for text in known], known
        shown = [
            text if isinstance(text, str) else tokenizer.decode_bytes(text).decode(errors="replace")
            for text in texts
        ]
        return texts, shown

    def followed(self, chunks: Iterable[Any], echo: bool) -> Iterator[Any]:
        """The chunks; with `echo`, each text is followed by what stands after it."""
        for chunk in chunks:
            after = self.after if echo and chunk.finish and self.after else ""
            yield replace(chunk, text=chunk.text + after)


def prompts_of(args: argparse.Namespace) -> Prompts:
    """The prompts, stop strings and suffix of `sample`. Raises `UserError`."""
    remarks, escape = [], args.escape
    if [*args.prompt_file, args.suffix_file].count("-") > 1:
        raise UserError("--prompt-file and --suffix-file: stdin can be read once")
    texts: list[Any] = [typed(argument, escape) for argument in args.prompt]
    stop = [typed(argument, escape) for argument in args.stop]
    if "" in args.stop:
        raise UserError("--stop is empty; give the text to stop before, or leave it out")
    if texts != [typed(argument, False) for argument in args.prompt]:
        remarks.append(
            r"\n, \t and \\ in PROMPT are line end, tab and backslash; --no-escape keeps them"
        )
    for file in args.prompt_file:
        text, cut = read("--prompt-file", file)
        texts.append(text)
        remarks.append(cut)
    texts += [_ids(argument) for argument in args.prompt_ids]
    after = None if args.suffix is None else typed(args.suffix, escape)
    if args.suffix_file:
        if after is not None:
            raise UserError("--suffix and --suffix-file: give one of them")
        after, cut = read("--suffix-file", args.suffix_file)
        remarks.append(cut)
    if after is not None:
        from rwkv_jax.data.conversations import FLOWER

        if args.prompt_ids:
            raise UserError("--prompt-ids and --suffix: the prompt has to be text; leave out one")
        stop.append(FLOWER)
    return Prompts(texts, stop, after, [remark for remark in remarks if remark])


def _ids(argument: str) -> list[int]:
    numbers = argument.replace(",", " ").split()
    if not all(number.isdecimal() for number in numbers):
        raise UserError(f"--prompt-ids {argument[:40]}: give ids, separated by spaces or commas")
    return [int(number) for number in numbers]


ANOTHER = "name another file for --logprobs"


class ScoreFile:
    """Writes a line of JSON for each token drawn to the file of `--logprobs`, if that is given."""

    def __init__(self, args: argparse.Namespace):
        self.path: Path | None = args.logprobs
        self.alternatives: int | None = None
        if self.path:
            self.alternatives = args.top_logprobs or 0
            if self.path.is_dir() or not self.path.parent.is_dir():
                raise UserError(
                    f"--logprobs {self.path}: cannot be a file; name one in an existing folder"
                )
            if args.interactive or args.save_state:
                raise UserError("--logprobs: not with --interactive or --save-state")
            if not self.path.exists():  # found out now, not after the model is loaded
                with disk.writing(self.path, ANOTHER):
                    made = Path(os.path.realpath(self.path))  # where a link points to
                    made.touch(exist_ok=False)
                    made.unlink()
            elif not os.access(self.path, os.W_OK):
                raise UserError(f"{self.path}: cannot be written; {ANOTHER}")
        elif args.top_logprobs is not None:
            raise UserError("--top-logprobs belongs to --logprobs: name its file")

    def recording(self, chunks: Iterable[Any], tokenizer: Any) -> Iterator[Any]:
        """The chunks, whose scores are written as they pass."""

        def text(token: int) -> str:
            return tokenizer.decode_bytes([token]).decode(errors="replace")

        with ExitStack() as stack:
            file = None
            if self.path:
                stack.enter_context(disk.writing(self.path, ANOTHER))
                file = stack.enter_context(self.path.open("w", encoding="utf-8"))
            for chunk in chunks:
                for one in chunk.logprobs if file else ():
                    top = [[token, text(token), p] for token, p in one.top]
                    line = {"prompt": chunk.index, "token": one.token, "text": text(one.token)}
                    line |= {"logprob": one.logprob} | ({"top": top} if top else {})
                    print(json.dumps(line, ensure_ascii=False), file=file)
                yield chunk
