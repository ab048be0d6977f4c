"""How programs are compiled here: two to four times faster than users' are.

Most of a test's time is compiling, so LLVM is asked for little (`conftest.py`, and `QUICK_FLAGS`
for processes that it does not reach). What XLA itself does to a program, and so nearly all of the
numerics, is the same; the hard regimes and the golden files run as users do.
"""

from functools import partial

import jax

QUICK_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
"""As `XLA_FLAGS`."""

as_users_do = partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 3,
        "xla_llvm_disable_expensive_passes": False,
    },
)
"""`jax.jit` with XLA's defaults."""

unfused = partial(jax.jit, compiler_options={"xla_disable_hlo_passes": "fusion"})
"""`jax.jit` for long programs without loops, whose chains of elementwise work XLA for CPUs would
fuse, with all that comes before copied into each: five times quicker to compile."""
