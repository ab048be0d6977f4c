"""The command line: `python -m rwkv_jax COMMAND ...`, or `rwkv-jax COMMAND ...`."""

import os
import sys
from importlib import import_module
from pathlib import Path

from rwkv_jax import __version__, interrupts, malloc, platforms

COMMANDS = {
    "tokenize": ("tokenize", "turn text into token files for training"),
    "train": ("train", "train a model from a config"),
    "compare": ("compare", "show several runs in one table and one picture"),
    "plan": ("plan", "estimate memory and step time on hardware that is not here"),
    "sample": ("sample", "generate text with a model, or chat with it"),
    "eval": ("evaluate", "measure a model: bits per byte, LAMBADA, multiple choice"),
    "inspect": ("inspect", "show what a weight file holds"),
    "convert": ("convert", "convert weights between formats"),
    "merge": ("merge", "add adapters to a model's weights"),
    "diff": ("diff", "compare two weight files, tensor by tensor"),
}
"""Command -> module of `rwkv_jax.cli`, one line of help."""

ABOUT = """
RWKV language models in JAX.

  {prog} inspect RWKV-x070-World-0.1B-v2.8.pth
  {prog} sample RWKV-x070-World-0.1B-v2.8.pth "The Eiffel tower is in"
  {prog} convert RWKV-x070-World-0.1B-v2.8.pth world-0.1b.safetensors
  {prog} train configs/demo.toml
  {prog} plan configs/rwkv7-0.4b.toml --topology v5e:4x4
  {prog} eval runs/demo notes.txt

`{prog} COMMAND --help` explains each command.
"""


def main(arguments: list[str], prog: str = "python -m rwkv_jax") -> int:
    """Runs one command; returns its exit code. `prog` is the program's name in messages."""
    if arguments and arguments[0] in COMMANDS:
        name, *rest = arguments
        return _run(name, rest, f"{prog} {name}")
    from rwkv_jax.cli.command import command

    parser = command(prog, "COMMAND ...", ABOUT)
    parser.add_argument("--version", action="version", version=_versions())
    commands = parser.add_subparsers(metavar="COMMAND", title="commands", required=True)
    for name, (_, help_text) in COMMANDS.items():
        commands.add_parser(name, help=help_text)
    parser.parse_args(arguments)
    return 0


def start() -> int:
    """The entry point of both `rwkv-jax` and `python -m rwkv_jax`."""
    _prepare()
    name = Path(sys.argv[0]).stem
    return main(sys.argv[1:], "python -m rwkv_jax" if name == "__main__" else name)


def start_script(name: str) -> int:
    """The entry point of the script of a command in the root folder."""
    _prepare()
    return _run(name, sys.argv[1:], f"python {name}.py")


def _prepare() -> None:
    """Handles Ctrl-C, and sets up malloc and platforms, before anything slow is imported."""
    interrupts.leave_at_once()
    malloc.set_up()
    platforms.leave_out_absent(os.environ)


def _run(name: str, arguments: list[str], prog: str) -> int:
    return import_module(f"rwkv_jax.cli.{COMMANDS[name][0]}").main(arguments, prog)


def _versions() -> str:
    import platform
    from importlib import metadata

    found = [f"{name} {metadata.version(name)}" for name in ("jax", "jaxlib")]
    return f"rwkv_jax {__version__} ({', '.join(found)}, Python {platform.python_version()})"


if __name__ == "__main__":
    sys.exit(start())
