"""Write text with a model: `python sample.py MODEL [PROMPT]...`; see `--help`."""

import sys

from rwkv_jax.__main__ import start_script

if __name__ == "__main__":
    sys.exit(start_script("sample"))
