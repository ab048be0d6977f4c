"""glibc's malloc for the command lines: huge pages, and freed memory stays with the process.

On CPU, XLA allocates the temporaries of every training step again. By default malloc maps and
clears them each time in pages of 4 KiB, which puts a fifth of the step into the kernel; and
decoding, which reads every weight for every token, spends an eighth of its time on page look-ups.
"""

import os
import signal
import sys

SETTINGS = "glibc.malloc." + ":glibc.malloc.".join(
    ("hugetlb=1", "mmap_max=0", f"trim_threshold={1 << 36}", f"top_pad={1 << 28}")
)
"""What `GLIBC_TUNABLES` is set to."""


def set_up() -> None:
    """Restarts this program with `SETTINGS`, which glibc reads only at the start of a process.

    Does nothing without glibc, or if the user has configured malloc. Call it in a program's entry
    point only, before anything else. A Ctrl-C while Python restarts takes effect when it calls this
    again.
    """
    if not _has_glibc():
        return
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    # Python may not know its own path: with another user's rights, or embedded in a program.
    if sys.executable and "glibc.malloc." not in tunables:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, SETTINGS)))
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        # Not orig_argv[0]: Python finds its virtual environment by the path it is started from.
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _has_glibc() -> bool:
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (AttributeError, OSError, ValueError):
        return False
