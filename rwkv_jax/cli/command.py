"""What every command does around its work: one-line errors, exit codes, an end that is clean."""

import argparse
import sys
from collections.abc import Callable

from rwkv_jax.errors import Parser, UserError, abandon_stdout, interruptible, lost_output


def run(prog: str, action: Callable[[], object]) -> int:
    """Runs a command's work; returns the exit code: 0, 2 for bad input, 130 when interrupted."""
    if sys.stdout is None:
        print(f"{prog}: stdout is closed; the output needs somewhere to go", file=sys.stderr)
        return 2
    try:
        with interruptible():
            action()
        sys.stdout.flush()
    except UserError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"\n{interrupt}".rstrip("\n"), file=sys.stderr)
        return 130
    except BrokenPipeError:
        abandon_stdout()  # the reader has what it wanted (`| head`)
    except OSError as error:
        lost_output(error, prog)
        return 2
    return 0


def command(prog: str, arguments: str, about: str) -> Parser:
    """A command's parser: `arguments` as its usage names them, `about` its help with `{prog}` for
    the command."""
    return Parser(
        prog=spoken(prog),
        usage=f"{prog} {arguments}",
        description=about.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the argument MODEL."""
    files = ".pth, .safetensors, Hugging Face folder, or folder of a run"
    parser.add_argument("model", metavar="MODEL", help=files)


def add_tokenizer(add: Callable[..., object]) -> None:
    """Adds the option --tokenizer of a model; `add` is a parser's or a group's `add_argument`."""
    what = "world, bytes or a tokenizer.json (default: the model's own)"
    add("--tokenizer", default="", metavar="NAME", help=what)


def width() -> int | None:
    """Of rich's consoles: None is the terminal's own; where there is none, no width cuts a line."""
    return None if sys.stdout.isatty() else 1000


def spoken(prog: str) -> str:
    """A command's name in its errors: `train.py` of `python train.py`."""
    return prog.removeprefix("python ").removeprefix("-m ")
