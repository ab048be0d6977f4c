"""Train an RWKV model: `python train.py [CONFIG] [section.key=value ...]`; see `--help`."""

import sys

from rwkv_jax.cli.train import main

if __name__ == "__main__":
    from rwkv_jax import malloc

    malloc.set_up()
    sys.exit(main(sys.argv[1:], "python train.py"))
