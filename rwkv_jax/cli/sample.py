"""`sample`: write text with a model."""

import argparse
import contextlib
import io
import os
import secrets
import sys
from functools import partial
from pathlib import Path

from rwkv_jax.cli.running import run, spoken
from rwkv_jax.errors import Parser, UserError

ABOUT = """
Write on from a prompt with a model: official weights, a Hugging Face folder, or a run of train.py.

  {prog} RWKV-x070-World-0.1B-v2.8.pth "The Eiffel tower is in"
      version, sizes and tokenizer are read from the file
  {prog} runs/demo "def main("
      what a run of train.py has learnt to write after `def main(`
  {prog} runs/demo "def main(" "class " --tokens 400 --temperature 0.8
      several prompts, each by itself, written at once
  {prog} runs/demo "import " --stop $'\\n\\n' --seed 7
      up to an empty line; the same seed gives the same text
  {prog} runs/demo --prompt-file story.txt > continued.txt
      a long prompt (`-` is stdin); only text goes to stdout, all else to stderr
  {prog} MODEL --prompt-file book.txt --save-state book.safetensors
  {prog} MODEL --state book.safetensors "In short,"
      all that was read is kept in a file of constant size; every prompt goes on from it
  {prog} runs/demo --interactive
      one text, written in turns with the model
"""


def main(arguments: list[str], prog: str = "python -m rwkv_jax sample") -> int:
    """Runs the command line; returns the exit code: 2 for bad input, 130 when interrupted."""
    args = _parse(arguments, prog)
    return run(spoken(prog), partial(_sample, args))


def _sample(args: argparse.Namespace) -> None:
    # Here, so that --help and a mistyped option answer at once.
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
    if args.save_state and len(prompts) > 1:
        raise UserError(f"--save-state keeps one text: give it one prompt, not {len(prompts)}")
    writer = _load(args)
    start = _start(args.state, writer) if args.state else None
    if args.interactive or args.save_state:
        session = Session(writer, seed, start)
        if args.interactive:
            _edit_lines()
            dialogue = Dialogue(session, sampling, args.tokens, stop)
            dialogue.run(prompts[0] if prompts else None)
        else:
            _one_text(session, prompts[0] if prompts else "", sampling, args, stop)
        if args.save_state:
            _save(session, args.save_state)
        return
    prompts, meter = prompts or [""], Meter()
    pieces = generate_with(
        writer,
        prompts,
        max_tokens=args.tokens,
        sampling=sampling,
        seed=seed,
        stop=stop,
        start=start,
    )
    print_texts(meter.count(pieces), prompts, echo=args.echo)
    print(f"[{meter.summary()}, seed {seed}]", file=sys.stderr)


def _one_text(session, prompt: str, sampling, args: argparse.Namespace, stop: list[str]) -> None:
    from rwkv_jax.generate.terminal import Meter, print_texts

    meter = Meter()
    session.feed(prompt)
    pieces = session.stream(max_tokens=args.tokens, sampling=sampling, stop=stop)
    print_texts(meter.count(pieces), [prompt], echo=args.echo)
    print(f"[{meter.summary()}, seed {session.seed}]", file=sys.stderr)


def _start(path: str, writer):
    from rwkv_jax import states
    from rwkv_jax.generate import Start

    saved = states.load(path, writer.cfg)
    if states.rows(saved.state) != 1:
        raise UserError(f"{path}: {states.rows(saved.state)} rows; take one with rwkv_jax.states")
    _check_tokenizer(path, saved.notes.get("tokenizer"), writer)
    return Start(saved.state, writer.cfg, saved.logits)


def _check_tokenizer(path: str, of_state: str | None, writer) -> None:
    mine = writer.tokenizer.identity()
    if of_state not in (None, mine):
        raise UserError(
            f"{path}: written with the tokenizer {of_state}, and this is {mine}; take the model"
            " that it was written with"
        )


def _save(session, path: str) -> None:
    from rwkv_jax import states

    notes = {"tokenizer": session.writer.tokenizer.identity()}
    states.save(path, session.state, logits=session.logits, notes=notes)
    print(f"[state saved in {path}]", file=sys.stderr)


def _parse(arguments: list[str], prog: str) -> argparse.Namespace:
    parser = Parser(
        prog=spoken(prog),
        usage=f"{prog} MODEL [PROMPT]... [options]",
        description=ABOUT.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", help=".pth, .safetensors, Hugging Face folder, or folder of a run"
    )
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

    model = parser.add_argument_group("the model and its state")
    add = model.add_argument
    add(
        "--tokenizer",
        default="",
        metavar="NAME",
        help="world, bytes or a tokenizer.json (default: what belongs to the model)",
    )
    add("--state", metavar="FILE", help="start from this state: a saved one, or a tuned one (.pth)")
    add("--save-state", metavar="FILE", help="keep the state after the text, as .safetensors")

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


def _load(args: argparse.Namespace):
    from rwkv_jax.checkpoint.weights import load_with_tokenizer
    from rwkv_jax.compiled import keep_compiled_programs
    from rwkv_jax.config import DataConfig
    from rwkv_jax.generate import Writer

    keep_compiled_programs(DataConfig().cache_root)
    return Writer(*load_with_tokenizer(args.model, args.tokenizer))


def _read(name: str) -> str:
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
