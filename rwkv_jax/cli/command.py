"""What all commands share: their parser, one-line errors, exit codes, and a clean exit."""

import argparse
import contextlib
import errno
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from rwkv_jax.cli.adapters import changing
from rwkv_jax.config import DataConfig
from rwkv_jax.errors import UserError, printed_remarks
from rwkv_jax.interrupts import interruptible, leaving, raising, undropped_interrupts

PATIENCE = 20.0
"""Seconds that an interrupted command waits for what is being computed."""


class Parser(argparse.ArgumentParser):
    """A command line whose errors are one line, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Exits with code 2."""
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def command(prog: str, arguments: str, about: str) -> Parser:
    """A command's parser: `arguments` are those of its usage line, `about` is its help text, with
    `{prog}` in place of the command."""
    return Parser(
        prog=spoken(prog),
        usage=f"{prog} {arguments}",
        description=about.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run(prog: str, action: Callable[[], object]) -> int:
    """Runs a command's work; returns the exit code: 0, 2 for bad input, 130 when interrupted."""
    if sys.stdout is None:
        print(f"{prog}: stdout is closed; redirect it somewhere", file=sys.stderr)
        return 2
    if sys.stdin is None:  # it is closed: nothing will be typed
        sys.stdin = open(os.devnull)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # it may not have all characters
    try:
        with (
            raising(),
            interruptible(),
            undropped_interrupts(),
            printed_remarks(prog),
            _with_a_device(),
        ):
            action()
        sys.stdout.flush()
    except UserError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"\n{interrupt}".rstrip("\n"), file=sys.stderr)
        _finish_computing()
        return 130
    except BrokenPipeError:
        _abandon_stdout()  # the reader has what it wanted (`| head`)
    except OSError as error:
        _print_refusal(prog, error)
        _abandon_stdout()
        return 2
    return 0


def import_jax() -> None:
    """Imports JAX; a Ctrl-C meanwhile ends the process, as the import would turn it into any error,
    or abort."""
    with leaving():
        import jax  # noqa: F401


def _finish_computing() -> None:
    """Waits for what JAX computes: its threads crash when the interpreter ends under them. The
    traceback of the exception that is handled keeps the results alive."""
    if "jax" not in sys.modules:
        return
    waiting = threading.Thread(target=_wait_for_arrays, daemon=True)
    waiting.start()
    waiting.join(PATIENCE)
    if waiting.is_alive():  # the interpreter cannot end in order
        for stream in sys.stdout, sys.stderr:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(130)


def _wait_for_arrays() -> None:
    with contextlib.suppress(Exception):  # a failed computation has ended too
        for array in sys.modules["jax"].live_arrays():
            array.block_until_ready()


@contextlib.contextmanager
def _with_a_device() -> Iterator[None]:
    """Turns what JAX raises where JAX_PLATFORMS names no device of this machine into one line."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        if not asked or _has_device():
            raise
        raise UserError(
            f"JAX_PLATFORMS={asked}: no such device, or JAX was installed without it; unset it, set"
            " it to cpu, or install JAX for that device"
        ) from error


def _has_device() -> bool:
    import jax

    try:
        return bool(jax.devices())
    except (RuntimeError, AssertionError):
        return False


def _print_refusal(prog: str, error: OSError) -> None:
    """For output or files that are gone or not permitted: a full disk, a removed folder."""
    denied = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    needed = "you may read it, or write there" if denied else "it exists and has space left"
    name = error.filename or "the output"
    print(f"{prog}: {name}: {error.strerror}; see that {needed}, and start again", file=sys.stderr)


def _abandon_stdout() -> None:
    """Discards what is still in stdout's buffer: Python would try to write it once more at exit,
    and complain."""
    with contextlib.suppress(AttributeError, OSError):  # stdout may be closed, or not a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def add_model(parser: argparse.ArgumentParser, name: str = "model") -> None:
    """Adds the argument MODEL, or one of another name that takes the same."""
    files = ".pth, .safetensors, Hugging Face folder, folder of a run, or RUN/checkpoints/STEP"
    parser.add_argument(name, metavar=name.upper(), help=files)


def add_tokenizer(add: Callable[..., object]) -> None:
    """Adds the option --tokenizer of a model; `add` is a parser's or a group's `add_argument`."""
    what = "world, bytes, a tokenizer.json or an RWKV vocabulary (.txt) (default: the model's own)"
    add("--tokenizer", default="", metavar="NAME", help=what)


def load_model(args: argparse.Namespace, **to_decode: Any) -> tuple[Any, Any, Any]:
    """Parameters, config and tokenizer as MODEL, --adapter and --tokenizer say; with options of
    `load_to_decode`, or an adapter, in the layout of decoding. What JAX compiles from now on is
    cached."""
    from rwkv_jax.checkpoint.weights import load_with_tokenizer
    from rwkv_jax.compiled import keep_compiled_programs
    from rwkv_jax.sampling.load import load_to_decode

    change = changing(args)
    keep_compiled_programs(DataConfig().cache_root)
    if to_decode or change:
        return load_to_decode(args.model, args.tokenizer, change=change, **to_decode)
    return load_with_tokenizer(args.model, args.tokenizer)


def width() -> int | None:
    """Width of rich's consoles: None is the terminal's own; elsewhere no line is wrapped."""
    return None if sys.stdout.isatty() else 1000


def spoken(prog: str) -> str:
    """A command's name in its errors: `train.py` of `python train.py`."""
    return prog.removeprefix("python ").removeprefix("-m ")
