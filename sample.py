"""Write text with a trained model: `python sample.py RUN [PROMPT]...`; `--help` tells more."""

import argparse
import contextlib
import io
import os
import secrets
import sys
from pathlib import Path

from rwkv_jax.errors import Parser, abandon_stdout, interruptible, lost_output

ABOUT = """
Write on from a prompt with a trained model.

  python sample.py runs/demo "def main("
      what RUN, the folder of a run of train.py, has learnt to write after `def main(`
  python sample.py runs/demo "def main(" "class " --tokens 400 --temperature 0.8
      several prompts, each by itself, written at once
  python sample.py runs/demo "import " --stop $'\\n\\n' --seed 7
      up to an empty line; the same seed gives the same text
  python sample.py runs/demo --prompt-file story.txt > continued.txt
      a long prompt (`-` is stdin); only text goes to stdout, all else to stderr
  python sample.py runs/demo --interactive
      one text, written in turns with the model
"""


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code: 2 for bad input, 130 when interrupted."""
    args = _parse(arguments)
    # Below, so that --help and a mistyped option answer at once.
    from rwkv_jax.errors import UserError

    if sys.stdout is None:
        print("sample.py: stdout is closed; text needs somewhere to go", file=sys.stderr)
        return 2
    try:
        with interruptible():
            _sample(args)
        sys.stdout.flush()
    except UserError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        abandon_stdout()  # the reader has what it wanted (`| head`)
    except OSError as error:
        lost_output(error, "sample.py")
        return 2
    return 0


def _sample(args: argparse.Namespace) -> None:
    from rwkv_jax.errors import UserError
    from rwkv_jax.generate import Sampling, Session, generate_with
    from rwkv_jax.generate.session import check_seed, check_tokens
    from rwkv_jax.generate.terminal import Dialogue, Meter, print_texts

    names = ("temperature", "top_p", "top_k", "presence", "frequency", "decay")
    sampling = Sampling(**{name: getattr(args, name) for name in names})
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    check_seed(seed)
    check_tokens(args.tokens)
    if "" in args.stop:
        raise UserError("--stop is empty; give the text to stop before, or leave it out")
    prompts, stop = [_text(x) for x in args.prompt], [_text(x) for x in args.stop]
    if args.interactive and args.prompt_file == "-":
        raise UserError("--interactive reads what you type: --prompt-file cannot be stdin as well")
    if args.prompt_file:
        prompts.append(_read(args.prompt_file))
    if args.interactive and len(prompts) > 1:
        raise UserError(f"--interactive is one text: give it one prompt, not {len(prompts)}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # any terminal shows any text
    writer = _load(args.run)
    if args.interactive:
        _edit_lines()
        dialogue = Dialogue(Session(writer, seed), sampling, args.tokens, stop)
        dialogue.run(prompts[0] if prompts else None)
        return
    prompts, meter = prompts or [""], Meter()
    pieces = generate_with(
        writer, prompts, max_tokens=args.tokens, sampling=sampling, seed=seed, stop=stop
    )
    print_texts(meter.count(pieces), prompts, echo=args.echo)
    print(f"[{meter.summary()}, seed {seed}]", file=sys.stderr)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="sample.py",
        usage="python sample.py RUN [PROMPT]... [options]",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run of train.py")
    parser.add_argument(
        "prompt", metavar="PROMPT", nargs="*", help="without one, a new document is written"
    )

    text = parser.add_argument_group("what is written")
    add = text.add_argument
    add("--prompt-file", metavar="FILE", help="a further prompt, UTF-8; - is stdin")
    add("-i", "--interactive", action="store_true", help="take turns in one text (:help there)")
    add("--tokens", type=int, default=200, metavar="N", help="the most for each prompt (200)")
    add(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="stop before this text; may be given several times",
    )
    add("--no-echo", dest="echo", action="store_false", help="leave the prompt out")

    draw = parser.add_argument_group("how tokens are drawn")
    add = draw.add_argument
    add("--seed", type=int, metavar="N", help="of the first prompt, N+1 of the next (random)")
    add(
        "--temperature",
        type=float,
        default=1.0,
        metavar="X",
        help="lower is more predictable; 0 always takes the likeliest token (1.0)",
    )
    add(
        "--top-p",
        type=float,
        default=0.85,
        metavar="X",
        help="only the likeliest tokens that together have this probability (0.85)",
    )
    add(
        "--top-k",
        type=int,
        default=0,
        metavar="N",
        help="only so many of the likeliest; 0 is no limit (0)",
    )
    add(
        "--presence",
        type=float,
        default=0.2,
        metavar="X",
        help="taken from the logit of each token written before (0.2)",
    )
    add(
        "--frequency",
        type=float,
        default=0.2,
        metavar="X",
        help="the same, for each time it was written (0.2)",
    )
    add(
        "--decay",
        type=float,
        default=0.996,
        metavar="X",
        help="how much of those times is left a token later (0.996)",
    )
    return parser.parse_intermixed_args(arguments)


def _load(run: str):
    from rwkv_jax.checkpoint.store import load_run
    from rwkv_jax.compiled import keep_compiled_programs
    from rwkv_jax.config import DataConfig
    from rwkv_jax.generate import Writer

    keep_compiled_programs(DataConfig().cache_root)
    return Writer(*load_run(run))


def _read(name: str) -> str:
    from rwkv_jax.errors import UserError

    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode()
    except OSError as error:
        raise UserError(f"--prompt-file {name}: {error.strerror}; give a text file") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt-file {name}: byte {error.start} is not UTF-8; convert it first"
        ) from None


def _text(argument: str) -> str:
    """An argument as text: the shell may pass bytes that are not UTF-8."""
    return os.fsencode(argument).decode(errors="replace")


def _edit_lines() -> None:
    with contextlib.suppress(ImportError):  # Windows has its own
        import readline  # noqa: F401  (importing it gives `input` a history and editing)


if __name__ == "__main__":
    from rwkv_jax import malloc

    malloc.set_up()
    sys.exit(main(sys.argv[1:]))
