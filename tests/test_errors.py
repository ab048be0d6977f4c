"""Remarks name the caller's own line."""

import inspect
import warnings
from pathlib import Path

import rwkv_jax
from rwkv_jax.errors import Remark, remark


def called_in(path):
    """A function in a file of this name that makes a remark, without the tests' type checks."""
    names = {"remark": inspect.unwrap(remark)}
    exec(compile("def outer():\n    inner()\ndef inner():\n    remark('hm')", path, "exec"), names)
    return names["outer"]


def test_a_remark_is_at_the_line_that_called_the_library():
    package = Path(rwkv_jax.__file__).parent
    for path, line in (str(package / "states.py"), 0), (f"{package}_tools/x.py", 4):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            called_in(path)()
            here = inspect.currentframe().f_lineno - 1
        (found,) = seen
        assert found.category is Remark and str(found.message) == "hm"
        assert (found.filename, found.lineno) == ((path, line) if line else (__file__, here))
