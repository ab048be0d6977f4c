"""`rwkv_jax.testing`: the leak test finds leaks."""

import jax.numpy as jnp
import pytest

import rwkv_jax.wkv
from rwkv_jax.testing import leak_test


def test_leak_test_finds_leaks():
    """Of one document into the next one's output, and into an earlier gradient; it also rejects
    functions and inputs that it cannot judge."""
    x = jnp.arange(12.0).reshape(1, 12, 1)
    reset = jnp.zeros((1, 12), bool).at[0, 5].set(True)
    leak_test(lambda x, reset: {"same": x}, x, reset)
    with pytest.raises(AssertionError, match=r"output\['sum'\] of row 0, token 5 .* document 0 of"):
        leak_test(lambda x, reset: {"sum": jnp.cumsum(x, axis=1)}, x, reset)
    with pytest.raises(AssertionError, match=r"token 0 changes with document 1 of row 0"):
        leak_test(lambda x, reset: jnp.cumsum(x[:, ::-1], axis=1)[:, ::-1], x, reset)
    with pytest.raises(AssertionError, match="sees nothing"):
        leak_test(lambda x, reset: jnp.zeros_like(x), x, reset)
    with pytest.raises(AssertionError, match="give inputs that differ"):
        leak_test(lambda x, reset: x, jnp.ones_like(x), reset)
    with pytest.raises(ValueError, match=r"output\[1\] \[2\] and reset \[1, 12\]: .*\[b, t"):
        leak_test(lambda x, reset: (x, jnp.zeros(2)), x, reset)


def test_leak_test_tells_rows_apart():
    """Documents at the same place of two rows are two documents; every row may start one at its
    first token."""
    x = jnp.arange(12.0).reshape(2, 6, 1)
    reset = jnp.zeros((2, 6), bool).at[:, jnp.array([0, 3])].set(True)
    leak_test(lambda x, reset: 2 * x, x, reset)
    with pytest.raises(AssertionError, match=r"of row 1, token 0 changes with document 1 of row 0"):
        leak_test(lambda x, reset: x - x.mean(0, keepdims=True), x, reset)
    with pytest.raises(AssertionError, match=r"no output changes with document 1 of row 1"):
        leak_test(lambda x, reset: x.at[1].set(0.0), x, reset)


def test_the_former_names_say_where_they_went():
    with pytest.raises(AttributeError, match=r"leak_test.*it is now rwkv_jax\.testing\.leak_test"):
        _ = rwkv_jax.wkv.leak_test
    with pytest.raises(AttributeError, match=r"cases.*it is now rwkv_jax\.testing"):
        _ = rwkv_jax.wkv.cases
    with pytest.raises(AttributeError, match="nonsense"):
        _ = rwkv_jax.wkv.nonsense
