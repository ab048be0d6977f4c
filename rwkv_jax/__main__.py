"""`python -m rwkv_jax COMMAND ...`: all that is done from a terminal."""

import argparse
import sys
from importlib import import_module

from rwkv_jax.errors import Parser

COMMANDS = {
    "tokenize": ("tokenize", "text into the files that training reads"),
    "train": ("train", "train a model as a config says"),
    "plan": ("plan", "what a run needs on hardware that is not here yet"),
    "sample": ("sample", "write text with a model, or chat with it"),
    "eval": ("evaluate", "measure it: bits per byte, LAMBADA, multiple choice"),
    "inspect": ("inspect", "what a file of weights holds"),
    "convert": ("convert", "weights from any format into another"),
    "diff": ("diff", "two files of weights, tensor by tensor"),
}
"""Command -> module of `rwkv_jax.cli`, and what it does."""

ABOUT = """
RWKV language models in JAX.

  python -m rwkv_jax inspect RWKV-x070-World-0.1B-v2.8.pth
  python -m rwkv_jax sample RWKV-x070-World-0.1B-v2.8.pth "The Eiffel tower is in"
  python -m rwkv_jax convert RWKV-x070-World-0.1B-v2.8.pth world-0.1b.safetensors
  python -m rwkv_jax train configs/demo.toml
  python -m rwkv_jax plan configs/rwkv7-0.4b.toml --topology v5e:4x4
  python -m rwkv_jax eval runs/demo notes.txt

`python -m rwkv_jax COMMAND --help` teaches each.
"""


def main(arguments: list[str]) -> int:
    """Runs one command; returns its exit code."""
    if not arguments or arguments[0] not in COMMANDS:
        parser = Parser(
            prog="rwkv_jax",
            usage="python -m rwkv_jax COMMAND ...",
            description=ABOUT,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        commands = parser.add_subparsers(metavar="COMMAND", title="commands", required=True)
        for name, (_, help_text) in COMMANDS.items():
            commands.add_parser(name, help=help_text)
        parser.parse_args(arguments)
        return 0
    name, *rest = arguments
    command = import_module(f"rwkv_jax.cli.{COMMANDS[name][0]}")
    return command.main(rest, f"python -m rwkv_jax {name}")


if __name__ == "__main__":
    from rwkv_jax import malloc

    malloc.set_up()
    sys.exit(main(sys.argv[1:]))
