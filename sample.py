"""Write text with a model: `python sample.py MODEL [PROMPT]...`; see `--help`."""

import sys

from rwkv_jax.cli.sample import main

if __name__ == "__main__":
    from rwkv_jax import malloc

    malloc.set_up()
    sys.exit(main(sys.argv[1:], "python sample.py"))
