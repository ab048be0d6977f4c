"""`sample`: write text with a model."""

import argparse
import contextlib
import dataclasses
import io
import os
import secrets
import sys
from functools import partial
from pathlib import Path

from rwkv_jax.cli.command import command, run, spoken
from rwkv_jax.errors import UserError

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
  {prog} rwkv7-g1-1.5b.pth --chat --think on --save-state talk.safetensors
  {prog} rwkv7-g1-1.5b.pth --chat --state talk.safetensors
      a conversation, kept in a file when you leave, and gone on with: nothing is read twice
"""


def main(arguments: list[str], prog: str = "python -m rwkv_jax sample") -> int:
    """Runs the command line; returns the exit code: 2 for bad input, 130 when interrupted."""
    args = _parse(arguments, prog)
    return run(spoken(prog), partial(_sample, args))


def _sample(args: argparse.Namespace) -> None:
    # Here, so that --help and a mistyped option answer at once.
    from rwkv_jax.cli.terminal import Dialogue, Meter, print_texts
    from rwkv_jax.sampling import Sampling, Session, generate_with
    from rwkv_jax.sampling.session import check_seed, check_tokens

    names = ("temperature", "top_p", "top_k", "presence", "frequency", "decay")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.chat:
        _chat(args, given)
        return
    if args.system is not None or args.think or args.template:
        raise UserError("--system, --think and --template are of a chat: add --chat")
    sampling = Sampling(**given)
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    tokens = 200 if args.tokens is None else args.tokens
    check_seed(seed)
    check_tokens(tokens)
    if "" in args.stop:
        raise UserError("--stop is empty; give the text to stop before, or leave it out")
    prompts, stop = [_text(x) for x in args.prompt], [_text(x) for x in args.stop]
    if args.interactive and args.prompt_file == "-":
        raise UserError("--interactive reads what you type: --prompt-file cannot be stdin as well")
    if args.prompt_file:
        prompts.append(_read(args.prompt_file))
    if args.interactive and len(prompts) > 1:
        raise UserError(f"--interactive is one text: give it one prompt, not {len(prompts)}")
    if args.save_state and len(prompts) > 1:
        raise UserError(f"--save-state keeps one text: give it one prompt, not {len(prompts)}")
    if args.save_state:
        from rwkv_jax.states import check_save_path

        check_save_path(Path(args.save_state))
    _any_text()
    writer = _load(args)
    start = _start(args.state, _saved(args.state, writer), writer) if args.state else None
    if args.interactive or args.save_state:
        session = Session(writer, seed, start)
        try:
            if args.interactive:
                _edit_lines()
                Dialogue(session, sampling, tokens, stop).run(prompts[0] if prompts else None)
            else:
                _one_text(session, prompts[0] if prompts else "", sampling, tokens, args.echo, stop)
        finally:  # what was read and written before Ctrl-C is kept too
            if args.save_state:
                _save(session, args.save_state)
        return
    prompts, meter = prompts or [""], Meter()
    pieces = generate_with(
        writer, prompts, max_tokens=tokens, sampling=sampling, seed=seed, stop=stop, start=start
    )
    print_texts(meter.count(pieces), prompts, echo=args.echo)
    print(f"[{meter.summary()}, seed {seed}]", file=sys.stderr)


def _chat(args: argparse.Namespace, given: dict[str, float]) -> None:
    from rwkv_jax.cli.chat import chat
    from rwkv_jax.data.conversations import TEMPLATES
    from rwkv_jax.sampling.chat import CHAT_SAMPLING

    if args.prompt or args.prompt_file or args.stop or args.interactive or not args.echo:
        raise UserError(
            "--chat is what you type and the template's stops: leave PROMPT, --prompt-file, --stop,"
            " --interactive and --no-echo out"
        )
    if args.template and args.template not in TEMPLATES:
        raise UserError(f"--template {args.template}: one of {', '.join(TEMPLATES)}")
    _any_text()
    writer = _load(args)
    _edit_lines()
    saved = _saved(args.state, writer) if args.state else None
    begun = saved is not None and "chat" in saved.notes
    chat(
        writer,
        seed=args.seed,
        sampling=dataclasses.replace(CHAT_SAMPLING, **given) if given else None,
        max_tokens=args.tokens,
        template=TEMPLATES[args.template] if args.template else None,
        system=None if args.system is None else _text(args.system),
        think=args.think,
        start=_start(args.state, saved, writer) if saved and not begun else None,
        resume=Path(args.state) if begun else None,
        save=Path(args.save_state) if args.save_state else None,
    )


def _any_text() -> None:
    """Lets any terminal show any text."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _one_text(session, prompt: str, sampling, tokens: int, echo: bool, stop: list[str]) -> None:
    from rwkv_jax.cli.terminal import Meter, print_texts

    meter = Meter()
    session.feed(prompt)
    pieces = session.stream(max_tokens=tokens, sampling=sampling, stop=stop)
    print_texts(meter.count(pieces), [prompt], echo=echo)
    print(f"[{meter.summary()}, seed {session.seed}]", file=sys.stderr)


def _saved(path: str, writer):
    from rwkv_jax import states

    return states.load(path, writer.cfg)


def _start(path: str, saved, writer):
    from rwkv_jax import states
    from rwkv_jax.sampling import Start

    if states.batch_size(saved.state) != 1:
        raise UserError(
            f"{path}: {states.batch_size(saved.state)} rows; take one with rwkv_jax.states"
        )
    try:
        writer.check_wrote(saved.notes.get("tokenizer"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return Start(saved.state, writer.cfg, saved.logits)


def _save(session, path: str) -> None:
    from rwkv_jax import states

    notes = {"tokenizer": session.writer.tokenizer.identity()}
    logits = session.logits if session.begun else None
    states.save(path, session.state, logits=logits, notes=notes)
    print(f"[state saved in {path}]", file=sys.stderr)


def _parse(arguments: list[str], prog: str) -> argparse.Namespace:
    parser = command(prog, "MODEL [PROMPT]... [options]", ABOUT)
    parser.add_argument(
        "model", metavar="MODEL", help=".pth, .safetensors, Hugging Face folder, or folder of a run"
    )
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="*",
        default=[],  # without it argparse calls PROMPT required
        help="without one, a new document is written",
    )

    text = parser.add_argument_group("what is written")
    add = text.add_argument
    add("--prompt-file", metavar="FILE", help="a further prompt, UTF-8; - is stdin")
    add("-i", "--interactive", action="store_true", help="take turns in one text (:help there)")
    add("--tokens", type=int, metavar="N", help="the most for each prompt (200), or reply (2000)")
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

    chat = parser.add_argument_group("chat")
    add = chat.add_argument
    add("--chat", action="store_true", help="take turns with a model that was trained to (:help)")
    add("--system", metavar="TEXT", help="what the conversation begins with")
    add("--think", metavar="WAY", help="off, fast, on, a bit, some or a lot (off)")
    add("--template", metavar="NAME", help="g1, world or raven (the model's likeliest)")

    draw = parser.add_argument_group(
        "how tokens are drawn", "In a chat: top-p 0.3, presence and frequency 0.5."
    )
    add = draw.add_argument
    add("--seed", type=int, metavar="N", help="of the first prompt, N+1 of the next (random)")
    add(
        "--temperature",
        type=float,
        metavar="X",
        help="lower is more predictable; 0 always takes the likeliest token (1.0)",
    )
    add(
        "--top-p",
        type=float,
        metavar="X",
        help="only the likeliest tokens that together have this probability (0.85)",
    )
    add(
        "--top-k",
        type=int,
        metavar="N",
        help="only so many of the likeliest; 0 is no limit (0)",
    )
    add(
        "--presence",
        type=float,
        metavar="X",
        help="taken from the logit of each token written before (0.2)",
    )
    add(
        "--frequency",
        type=float,
        metavar="X",
        help="the same, for each time it was written (0.2)",
    )
    add(
        "--decay",
        type=float,
        metavar="X",
        help="how much of those times is left a token later (0.996)",
    )
    return parser.parse_intermixed_args(arguments)


def _load(args: argparse.Namespace):
    from rwkv_jax.checkpoint.weights import load_with_tokenizer
    from rwkv_jax.compiled import keep_compiled_programs
    from rwkv_jax.config import DataConfig
    from rwkv_jax.sampling import Writer

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
