"""Train an RWKV model: `python train.py [CONFIG] [section.key=value ...]`; `--help` tells more."""

import argparse
import sys
from pathlib import Path

from rwkv_jax.errors import Parser, interruptible, lost_output

HELP = """
Train an RWKV model on your text, and see what it has learnt.

  python train.py
      RWKV-7 on the source of Python's standard library, into runs/demo (configs/demo.toml)
  python train.py configs/demo-rwkv4.toml
      another run
  python train.py data.source=~/notes train.output=runs/notes
      your own text: a file, a folder, a quoted glob, or .jsonl[.gz|.zst] (data.field: its field)
  python train.py model.width=512 model.layers=6 optimizer.peak_lr=4e-4 train.output=runs/large
      any setting of rwkv_jax/config.py

Ctrl-C saves and stops; the same command goes on from there, and so it does after a crash.
Then: python sample.py runs/demo "def main("
"""
DEFAULT = Path(__file__).parent / "configs" / "demo.toml"


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code: 2 for bad input, 130 when interrupted."""
    config, overrides = _parse(arguments)
    # Below, so that --help and a mistyped setting answer at once.
    from rwkv_jax.config import load_config
    from rwkv_jax.errors import UserError

    try:
        cfg = load_config(config, overrides)
        from rwkv_jax.compiled import keep_compiled_programs
        from rwkv_jax.training.loop import train

        keep_compiled_programs(cfg.data.cache_root)
        with interruptible():
            train(cfg)
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"\n{str(interrupt) or 'Interrupted before the first step.'}", file=sys.stderr)
        return 130
    except OSError as error:
        lost_output(error, "train.py")
        return 2
    return 0


def _parse(arguments: list[str]) -> tuple[Path, list[str]]:
    parser = Parser(description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="a TOML file (default: configs/demo.toml)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="TOML values")
    parsed = parser.parse_args(arguments)
    overrides = parsed.overrides
    config = parsed.config
    if config and "=" in config and not Path(config).exists():
        config, overrides = None, [config, *overrides]
    return Path(config) if config else DEFAULT, overrides


if __name__ == "__main__":
    from rwkv_jax import malloc

    malloc.set_up()
    sys.exit(main(sys.argv[1:]))
