"""`sample`: write text with a model."""

import argparse
import contextlib
import os
import secrets
from functools import partial
from pathlib import Path
from typing import Any

from rwkv_jax.cli.adapters import add_adapters
from rwkv_jax.cli.command import (
    add_model,
    add_tokenizer,
    command,
    import_jax,
    load_model,
    run,
    spoken,
)
from rwkv_jax.cli.status import Status
from rwkv_jax.errors import UserError

ABOUT = """
Continue a prompt with a model: official weights, a Hugging Face folder, or a run of train.py.

  {prog} RWKV-x070-World-0.1B-v2.8.pth "The Eiffel tower is in"
      version, sizes and tokenizer are read from the file
  {prog} runs/demo "def main("
      what a run of train.py has learned to write after `def main(`
  {prog} runs/demo "def main(" "class " --tokens 400 --temperature 0.8
      several independent prompts, decoded as one batch
  {prog} runs/demo "import " --stop '\\n\\n' --seed 7
      up to an empty line; the same seed gives the same text
  {prog} runs/demo --prompt-file story.txt > continued.txt
      a long prompt (`-` is stdin); only text goes to stdout, all else to stderr
  {prog} rwkv7-g1h-1.5b.pth --prompt-file before.py --suffix-file after.py --no-echo
      what belongs between the two
  {prog} MODEL --prompt-file book.txt --save-state book.safetensors
  {prog} MODEL --state book.safetensors "In short,"
      everything read is saved in a file of constant size; each prompt resumes from it
  {prog} runs/demo --interactive
      one text, written in turns with the model
  {prog} rwkv7-g1-1.5b.pth --chat --think on --save-state talk.safetensors
  {prog} rwkv7-g1-1.5b.pth --chat --state talk.safetensors
      a conversation, saved on exit and resumed later; nothing is read twice
  {prog} rwkv7-g1-1.5b.pth --chat --adapter style/:0.8 --adapter runs/lora
      a model with adapters, each with a weight
"""


def main(arguments: list[str], prog: str = "python -m rwkv_jax sample") -> int:
    """Runs the command line; returns the exit code: 2 for bad input, 130 when interrupted."""
    args = _parse(arguments, prog)
    return run(spoken(prog), partial(_sample, args))


def _sample(args: argparse.Namespace) -> None:
    status = Status()
    status.show(f"loading {args.model}")
    # Imported here, so that --help and a mistyped option answer at once.
    import_jax()
    from rwkv_jax.sampling.settings import FLAGS

    given = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    try:
        (_chat if args.chat else _write)(args, given, status)
    finally:
        status.clear()


def _write(args: argparse.Namespace, given: dict[str, float | int], status: Status) -> None:
    from rwkv_jax import states
    from rwkv_jax.cli.prompts import ScoreFile, prompts_of
    from rwkv_jax.cli.terminal import TextDialogue, note, print_texts
    from rwkv_jax.sampling import Session, generate_with
    from rwkv_jax.sampling.presets import preset
    from rwkv_jax.sampling.settings import check_max_tokens, check_seed

    if args.system is not None or args.think or args.template:
        raise UserError("--system, --think and --template are options of a chat: add --chat")
    sampling = preset(args.preset or "text").with_flags(given)
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    tokens = 200 if args.tokens is None else args.tokens
    check_seed(seed)
    check_max_tokens(tokens)
    if args.interactive and "-" in (*args.prompt_file, args.suffix_file):
        raise UserError("--interactive reads what you type: --prompt-file cannot be stdin as well")
    prompts, scores = prompts_of(args), ScoreFile(args)
    count = len(prompts.texts)
    for option, one_text in ("--interactive", args.interactive), ("--save-state", args.save_state):
        if one_text and count > 1:
            raise UserError(f"{option} is for one text: give one prompt, not {count}")
        if one_text and prompts.after is not None:
            raise UserError(f"{option} and --suffix: leave one out")
    if args.interactive and args.prompt_ids:
        raise UserError("--interactive and --prompt-ids: give the prompt as text")
    if args.save_state:
        states.check_save_path(Path(args.save_state))
    for remark in prompts.remarks:
        note(remark)
    generator, saved = _generator(args, status)
    if prompts.after is not None and (why := _cannot_fill(args.model, generator.cfg.version)):
        note(f"--suffix: {why}, and only G1 models since G1c have learned it")
    texts, shown = prompts.encoded(generator.tokenizer)
    prefix = _prefix(args.state, saved, generator) if saved else None
    limits = {"max_tokens": tokens, "sampling": sampling, "stop": prompts.stop}
    if not args.interactive and not args.save_state:
        limits |= {"seed": seed, "prefix": prefix, "logprobs": scores.alternatives}
        chunks = status.until_first(generate_with(generator, texts, **limits))
        chunks = prompts.followed(chunks, args.echo)
        chunks = scores.recording(chunks, generator.tokenizer)
        note(f"{print_texts(chunks, shown, echo=args.echo)}, seed {seed}")
        return
    session = Session(generator, seed, prefix)
    try:
        if args.interactive:
            _edit_lines()
            TextDialogue(session, sampling, tokens, prompts.stop).run(shown[0] if count else None)
        else:
            session.feed(texts[0])
            chunks = status.until_first(session.stream(**limits))
            summary = print_texts(chunks, shown, echo=args.echo)
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


def _chat(args: argparse.Namespace, given: dict[str, float | int], status: Status) -> None:
    from rwkv_jax import states
    from rwkv_jax.cli.chat import chat, likely_template
    from rwkv_jax.cli.prompts import typed
    from rwkv_jax.data.conversations import TEMPLATES
    from rwkv_jax.sampling.chat import ReplySettings
    from rwkv_jax.sampling.presets import preset

    texts = [args.prompt, args.prompt_file, args.prompt_ids, args.suffix_file, args.stop]
    others = [args.interactive, args.logprobs, not args.echo]
    numbers = [args.suffix, args.top_logprobs]  # given, though empty or 0
    if any(texts + others) or any(x is not None for x in numbers):
        raise UserError(
            "--chat takes its text from the terminal and its stops from the template: leave out"
            " PROMPT, --prompt-file, --prompt-ids, --suffix, --suffix-file, --stop, --logprobs,"
            " --interactive and --no-echo"
        )
    if args.template and args.template not in TEMPLATES:
        raise UserError(f"--template {args.template}: one of {', '.join(TEMPLATES)}")
    settings = {"seed": args.seed, "max_tokens": args.tokens, "think": args.think}
    settings |= {"sampling": preset(args.preset) if args.preset else None}
    settings = {name: value for name, value in settings.items() if value is not None}
    # Both raise for what is wrong, before the model is loaded.
    ReplySettings(**settings).sampling.with_flags(given)
    if args.save_state:
        states.check_save_path(Path(args.save_state))
    generator, saved = _generator(args, status)
    _edit_lines()
    resume = saved is not None and "chat" in saved.notes
    name, why = args.template, "as asked"
    if not name:
        name, why = likely_template(Path(args.model), generator.cfg, generator.tokenizer)
    chat(
        generator,
        template=None if resume and not args.template else TEMPLATES[name],
        system=None if args.system is None else typed(args.system, args.escape),
        settings=settings | {"flags": given},
        prefix=_prefix(args.state, saved, generator) if saved and not resume else None,
        resume=Path(args.state) if resume else None,
        save=Path(args.save_state) if args.save_state else None,
        why="" if resume else why,
    )


def _cannot_fill(model: str, version: str) -> str:
    """Why a model cannot write what belongs between two texts; empty if it may be able to."""
    from rwkv_jax.sampling.presets import release_of

    if version[0] != "7":
        return f"this model is version {version}"
    release = release_of(Path(model).expanduser().absolute())
    old = release and release.data and (release.data < "G1c" or release.data == "World")
    return f"this model is {release}, by its name" if old else ""


def _generator(args: argparse.Namespace, status: Status) -> Any:
    """A generator, and what is saved in the file of --state, which is read before the model's
    numbers are: its mistakes need not wait for them."""
    from rwkv_jax import states
    from rwkv_jax.checkpoint.files import reading
    from rwkv_jax.sampling import Generator

    saved = None
    if args.state:
        with reading(Path(os.path.expanduser(args.state))):
            pass

    def check(cfg: Any) -> None:
        nonlocal saved
        saved = states.load(args.state, cfg) if args.state else None

    params, cfg, tokenizer = load_model(args, dtype=args.dtype, check=check)
    if args.special_tokens is not None:
        tokenizer = tokenizer.with_special_tokens(args.special_tokens)
    generator = Generator(params, cfg, tokenizer, status.reading)
    status.show("compiling")
    return generator, saved


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
    what = "one more prompt, UTF-8; - is stdin; may be repeated"
    add("--prompt-file", metavar="FILE", action="append", default=[], help=what)
    what = "one more prompt, as token ids; may be repeated"
    add("--prompt-ids", metavar="IDS", action="append", default=[], help=what)
    add("--suffix", metavar="TEXT", help="write what belongs between PROMPT and this (G1 models)")
    add("--suffix-file", metavar="FILE", help="the same, from a file")
    add("-i", "--interactive", action="store_true", help="take turns in one text (:help there)")
    add("--tokens", type=int, metavar="N", help="at most, per prompt (200) or reply (2000)")
    what = "stop before this text; may be repeated"
    add("--stop", metavar="TEXT", action="append", default=[], help=what)
    what = r"read \n, \t, \r and \\ in arguments as programs do (the default)"
    add("--escape", action=argparse.BooleanOptionalAction, default=True, help=what)
    what = "names of special tokens are those tokens (in prompts, not in a chat)"
    add("--special-tokens", action=argparse.BooleanOptionalAction, help=what)
    add("--no-echo", dest="echo", action="store_false", help="do not print the prompt")

    add = parser.add_argument_group("model and state").add_argument
    add_tokenizer(add)
    types = "compute type (float32 on CPU, bfloat16 elsewhere)"
    add("--dtype", choices=("float32", "bfloat16"), help=types)
    add_adapters(add)
    add("--state", metavar="FILE", help="start from a saved state, or a tuned one (.pth)")
    add("--save-state", metavar="FILE", help="save the state after the text, as .safetensors")

    add = parser.add_argument_group("chat").add_argument
    add("--chat", action="store_true", help="chat with a model trained for it (:help there)")
    add("--system", metavar="TEXT", help="system prompt")
    add("--think", metavar="WAY", help="off, fast, on, a bit, some, a lot, compact or tool (off)")
    add("--template", metavar="NAME", help="g1, world, raven or flower (the model's likeliest)")

    draw = parser.add_argument_group("sampling", "Options change values of the preset.")
    what = "text (the default), chat, think, answer or tool (in a chat, the model's own)"
    draw.add_argument("--preset", metavar="NAME", help=what)
    number = partial(draw.add_argument, type=float, metavar="X")
    count = partial(draw.add_argument, type=int, metavar="N")
    count("--seed", help="of the first prompt; each further one adds 1 (random)")
    number("--temperature", help="lower is more predictable; 0 takes the likeliest token (1.0)")
    number("--top-p", help="draw from the likeliest tokens with this total probability (0.85)")
    count("--top-k", help="draw from at most N tokens; 0 is no limit (0)")
    number("--min-p", help="drop tokens less likely than this share of the likeliest (0)")
    number("--presence", help="subtracted from the logit of each token already written (0.2)")
    number("--frequency", help="subtracted once more for each time it was written (0.2)")
    number("--decay", help="factor on those counts, per token (0.996)")

    add = parser.add_argument_group("output").add_argument
    what = "write a line of JSON for each token drawn: its log p by the model alone"
    add("--logprobs", metavar="FILE", type=Path, help=what)
    add("--top-logprobs", type=int, metavar="N", help="with the N most likely tokens at its place")
    return parser.parse_intermixed_args(arguments)


def _edit_lines() -> None:
    with contextlib.suppress(ImportError):  # Windows has its own
        import readline  # noqa: F401  (importing it gives `input` a history and editing)
