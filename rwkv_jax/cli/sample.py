"""`sample`: write text with a model."""

import argparse
import contextlib
import io
import os
import secrets
import sys
from functools import partial
from pathlib import Path

from rwkv_jax.cli.command import add_model, add_tokenizer, command, load_model, run, spoken
from rwkv_jax.errors import UserError

ABOUT = """
Continue a prompt with a model: official weights, a Hugging Face folder, or a run of train.py.

  {prog} RWKV-x070-World-0.1B-v2.8.pth "The Eiffel tower is in"
      version, sizes and tokenizer are read from the file
  {prog} runs/demo "def main("
      what a run of train.py has learned to write after `def main(`
  {prog} runs/demo "def main(" "class " --tokens 400 --temperature 0.8
      several independent prompts, decoded as one batch
  {prog} runs/demo "import " --stop $'\\n\\n' --seed 7
      up to an empty line; the same seed gives the same text
  {prog} runs/demo --prompt-file story.txt > continued.txt
      a long prompt (`-` is stdin); only text goes to stdout, all else to stderr
  {prog} MODEL --prompt-file book.txt --save-state book.safetensors
  {prog} MODEL --state book.safetensors "In short,"
      everything read is saved in a file of constant size; each prompt resumes from it
  {prog} runs/demo --interactive
      one text, written in turns with the model
  {prog} rwkv7-g1-1.5b.pth --chat --think on --save-state talk.safetensors
  {prog} rwkv7-g1-1.5b.pth --chat --state talk.safetensors
      a conversation, saved on exit and resumed later; nothing is read twice
"""


def main(arguments: list[str], prog: str = "python -m rwkv_jax sample") -> int:
    """Runs the command line; returns the exit code: 2 for bad input, 130 when interrupted."""
    args = _parse(arguments, prog)
    return run(spoken(prog), partial(_sample, args))


def _sample(args: argparse.Namespace) -> None:
    # Imported here, so that --help and a mistyped option answer at once.
    from rwkv_jax.sampling.settings import FLAGS

    given = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    if args.chat:
        _chat(args, given)
    else:
        _write(args, given)


def _write(args: argparse.Namespace, given: dict[str, float | int]) -> None:
    from rwkv_jax import states
    from rwkv_jax.cli.terminal import TextDialogue, note, print_texts
    from rwkv_jax.sampling import Generator, Sampling, Session, generate_with
    from rwkv_jax.sampling.settings import check_max_tokens, check_seed

    if args.system is not None or args.think or args.template:
        raise UserError("--system, --think and --template are options of a chat: add --chat")
    sampling = Sampling().with_flags(given)
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    tokens = 200 if args.tokens is None else args.tokens
    check_seed(seed)
    check_max_tokens(tokens)
    if "" in args.stop:
        raise UserError("--stop is empty; give the text to stop before, or leave it out")
    prompts, stop = [_text(x) for x in args.prompt], [_text(x) for x in args.stop]
    if args.interactive and args.prompt_file == "-":
        raise UserError("--interactive reads what you type: --prompt-file cannot be stdin as well")
    if args.prompt_file:
        prompts.append(_read(args.prompt_file))
    for option, one_text in ("--interactive", args.interactive), ("--save-state", args.save_state):
        if one_text and len(prompts) > 1:
            raise UserError(f"{option} is for one text: give one prompt, not {len(prompts)}")
    if args.save_state:
        states.check_save_path(Path(args.save_state))
    _allow_any_text()
    generator = Generator(*load_model(args))
    saved = states.load(args.state, generator.cfg) if args.state else None
    prefix = _prefix(args.state, saved, generator) if saved else None
    limits = {"max_tokens": tokens, "sampling": sampling, "stop": stop}
    if not args.interactive and not args.save_state:
        prompts = prompts or [""]
        chunks = generate_with(generator, prompts, seed=seed, prefix=prefix, **limits)
        note(f"{print_texts(chunks, prompts, echo=args.echo)}, seed {seed}")
        return
    session = Session(generator, seed, prefix)
    try:
        if args.interactive:
            _edit_lines()
            TextDialogue(session, sampling, tokens, stop).run(prompts[0] if prompts else None)
        else:
            session.feed(prompts[0] if prompts else "")
            summary = print_texts(session.stream(**limits), prompts or [""], echo=args.echo)
            note(f"{summary}, seed {seed}")
    finally:  # also after Ctrl-C
        if args.save_state:
            notes = {"tokenizer": generator.tokenizer.identity()}
            logits = session.logits if session.started else None
            states.save(
                args.save_state,
                session.state,
                logits=logits,
                notes=notes,
                weights=generator.weights,
            )
            note(f"state saved in {args.save_state}")


def _chat(args: argparse.Namespace, given: dict[str, float | int]) -> None:
    from rwkv_jax import states
    from rwkv_jax.cli.chat import chat
    from rwkv_jax.data.conversations import TEMPLATES
    from rwkv_jax.sampling import Generator
    from rwkv_jax.sampling.chat import CHAT_SAMPLING

    if args.prompt or args.prompt_file or args.stop or args.interactive or not args.echo:
        raise UserError(
            "--chat takes its text from the terminal and its stops from the template: leave out"
            " PROMPT, --prompt-file, --stop, --interactive and --no-echo"
        )
    if args.template and args.template not in TEMPLATES:
        raise UserError(f"--template {args.template}: one of {', '.join(TEMPLATES)}")
    settings = {"seed": args.seed, "max_tokens": args.tokens, "think": args.think}
    settings = {name: value for name, value in settings.items() if value is not None}
    if given:
        settings["sampling"] = CHAT_SAMPLING.with_flags(given)
    _allow_any_text()
    generator = Generator(*load_model(args))
    _edit_lines()
    saved = states.load(args.state, generator.cfg) if args.state else None
    resume = saved is not None and "chat" in saved.notes
    chat(
        generator,
        template=TEMPLATES[args.template] if args.template else None,
        system=None if args.system is None else _text(args.system),
        settings=settings,
        prefix=_prefix(args.state, saved, generator) if saved and not resume else None,
        resume=Path(args.state) if resume else None,
        save=Path(args.save_state) if args.save_state else None,
    )


def _prefix(path: str, saved, generator):
    from rwkv_jax import states
    from rwkv_jax.sampling import Prefix

    if (rows := states.batch_size(saved.state)) != 1:
        raise UserError(f"{path}: {rows} rows; select one with rwkv_jax.states.take")
    try:
        generator.check_tokenizer(saved.notes.get("tokenizer"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    states.check_weights(path, saved, generator.weights)
    return Prefix(saved.state, generator.cfg, saved.logits)


def _parse(arguments: list[str], prog: str) -> argparse.Namespace:
    parser = command(prog, "MODEL [PROMPT]... [options]", ABOUT)
    add_model(parser)
    what = "without one, a new document is written"
    # Without a default, argparse would call PROMPT required.
    parser.add_argument("prompt", metavar="PROMPT", nargs="*", default=[], help=what)

    add = parser.add_argument_group("text").add_argument
    add("--prompt-file", metavar="FILE", help="one more prompt, UTF-8; - is stdin")
    add("-i", "--interactive", action="store_true", help="take turns in one text (:help there)")
    add("--tokens", type=int, metavar="N", help="at most, per prompt (200) or reply (2000)")
    what = "stop before this text; may be repeated"
    add("--stop", metavar="TEXT", action="append", default=[], help=what)
    add("--no-echo", dest="echo", action="store_false", help="do not print the prompt")

    add = parser.add_argument_group("model and state").add_argument
    add_tokenizer(add)
    add("--state", metavar="FILE", help="start from a saved state, or a tuned one (.pth)")
    add("--save-state", metavar="FILE", help="save the state after the text, as .safetensors")

    add = parser.add_argument_group("chat").add_argument
    add("--chat", action="store_true", help="chat with a model trained for it (:help there)")
    add("--system", metavar="TEXT", help="system prompt")
    add("--think", metavar="WAY", help="off, fast, on, a bit, some or a lot (off)")
    add("--template", metavar="NAME", help="g1, world or raven (the model's likeliest)")

    draw = parser.add_argument_group(
        "sampling", "In a chat: top-p 0.3, presence and frequency 0.5."
    )
    number = partial(draw.add_argument, type=float, metavar="X")
    count = partial(draw.add_argument, type=int, metavar="N")
    count("--seed", help="of the first prompt; each further one adds 1 (random)")
    number("--temperature", help="lower is more predictable; 0 takes the likeliest token (1.0)")
    number("--top-p", help="draw from the likeliest tokens with this total probability (0.85)")
    count("--top-k", help="draw from at most N tokens; 0 is no limit (0)")
    number("--presence", help="subtracted from the logit of each token already written (0.2)")
    number("--frequency", help="subtracted once more for each time it was written (0.2)")
    number("--decay", help="factor on those counts, per token (0.996)")
    return parser.parse_intermixed_args(arguments)


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


def _allow_any_text() -> None:
    """Replaces characters that stdout cannot encode."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _edit_lines() -> None:
    with contextlib.suppress(ImportError):  # Windows has its own
        import readline  # noqa: F401  (importing it gives `input` a history and editing)
