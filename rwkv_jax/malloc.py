"""How the command lines have glibc's malloc set up: huge pages, and memory once had is kept.

On CPU, XLA asks anew for the temporaries of every training step. By default each time maps and
clears them again in pages of 4 KiB, which puts a fifth of the step into the kernel; and decoding,
which reads every weight for every token, spends an eighth of its time looking pages up.
"""

import os
import sys

SETTINGS = "glibc.malloc." + ":glibc.malloc.".join(
    ("hugetlb=1", "mmap_max=0", f"trim_threshold={1 << 36}", f"top_pad={1 << 28}")
)
"""For `GLIBC_TUNABLES`."""


def set_up() -> None:
    """Starts this program once more with `SETTINGS`, which glibc reads when a process starts.

    Does nothing where there is no glibc, or where the user has set malloc up. For scripts that run
    as programs only, before all else.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    # Python may not know its own name: with another user's rights, or inside another program.
    if _has_glibc() and sys.executable and "glibc.malloc." not in tunables:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, SETTINGS)))
        # Not orig_argv[0]: Python finds its virtual environment by the name it is started under.
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _has_glibc() -> bool:
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (AttributeError, OSError, ValueError):
        return False
