"""Train an RWKV model: `python train.py [CONFIG] [section.key=value ...]`; see `--help`."""

import sys

from rwkv_jax.__main__ import start_script

if __name__ == "__main__":
    sys.exit(start_script("train"))
