"""`train`: train a model as a config says."""

from functools import partial
from pathlib import Path

from rwkv_jax.cli.command import command, import_jax, run, spoken

HELP = """
Train an RWKV model on your text, and print a sample of what it has learnt.

  {prog}
      RWKV-7 on the source of Python's standard library, into runs/demo (configs/demo.toml)
  {prog} configs/demo-rwkv4.toml
      another run
  {prog} data.source=~/notes train.output=runs/notes
      your own text: a file, a folder, a quoted glob; text or JSON (data.field: its field)
  {prog} model.width=512 model.layers=6 optimizer.peak_lr=4e-4 train.output=runs/large
      any setting of rwkv_jax/config.py
  {prog} configs/finetune.toml train.init=RWKV-x070-World-0.1B-v2.8.pth data.source=~/notes
      fine-tune given weights, whose version, sizes and tokenizer are taken (docs/training.md)
  {prog} configs/finetune.toml train.init=MODEL data.source=chat.jsonl data.train_on=answers
      on conversations: the replies alone, and how they end; then sample.py runs/finetune --chat
  {prog} mesh.fsdp=4 mesh.tensor=2
      eight devices, each with a shard of the parameters; default: fsdp across all devices
  {prog} --profile
      trace three steps into profile/ of the run's folder

Several machines: start the same command on each (docs/scaling.md).
Ctrl-C saves and stops; the same command resumes from there, and also after a crash.
Then: python sample.py runs/demo "def main("
"""
DEFAULT = Path(__file__).parents[1] / "demo.toml"
"""configs/demo.toml, which is a link in the repository, and a file in the installed package."""


def main(arguments: list[str], prog: str = "python -m rwkv_jax train") -> int:
    """Runs the command line; returns the exit code: 2 for bad input, 130 when interrupted."""
    config, overrides, profile = _parse(arguments, prog)
    return run(spoken(prog), partial(_train, spoken(prog), config, overrides, profile))


def _train(prog: str, config: Path, overrides: list[str], profile: bool) -> None:
    # Imported here, so that --help and a mistyped setting answer at once.
    from rwkv_jax.toml import load_stated

    cfg, stated = load_stated(config, overrides)
    import_jax()
    from rwkv_jax.compiled import keep_compiled_programs
    from rwkv_jax.training import hosts
    from rwkv_jax.training.loop import train

    keep_compiled_programs(cfg.data.cache_root)
    hosts.join()
    with hosts.exit_on_failure(prog):
        try:
            train(cfg, stated=stated, profile=profile)
        except KeyboardInterrupt as interrupt:
            if str(interrupt):
                raise
            raise KeyboardInterrupt("Interrupted; checkpoints are as they were.") from None


def _parse(arguments: list[str], prog: str) -> tuple[Path, list[str], bool]:
    parser = command(prog, "[CONFIG] [section.key=value ...] [--profile]", HELP)
    parser.add_argument("config", nargs="?", help="a TOML file (default: configs/demo.toml)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="TOML values")
    parser.add_argument("--profile", action="store_true", help="trace three steps")
    parsed = parser.parse_intermixed_args(arguments)
    overrides = parsed.overrides
    config = parsed.config
    if config and "=" in config and not Path(config).exists():
        config, overrides = None, [config, *overrides]
    return Path(config) if config else DEFAULT, overrides, parsed.profile
