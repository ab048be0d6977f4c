"""The suite checks the package's annotations, those of closures too."""

import jax.numpy as jnp
import jaxtyping
import pytest
from beartype import beartype
from jax import Array
from jaxtyping import Float, TypeCheckError

from rwkv_jax.config import ModelConfig
from rwkv_jax.data.vocabulary import parse_vocabulary
from rwkv_jax.wkv import wkv7_step


def scaled(factor):
    @jaxtyping.jaxtyped(typechecker=beartype)
    def closure(x: Float[Array, "a b"], y: Float[Array, " a"], wrong=False) -> Float[Array, " b"]:
        return factor * (y if wrong else x[0])

    return closure


def test_closures_of_one_source_share_checks_only():
    x, y = jnp.ones((2, 3)), jnp.ones(2)
    for factor in (1.0, 2.0):
        closure = scaled(factor)
        assert closure(x, y).tolist() == [factor] * 3
        assert closure.__name__ == "closure"
        with pytest.raises(TypeCheckError, match=r"checking the parameters of .*closure"):
            closure(x, jnp.ones(3))
        with pytest.raises(TypeCheckError, match=r"checking the parameters of .*closure"):
            closure(x, y="one")
        with pytest.raises(TypeCheckError, match=r"checking the return value of .*closure"):
            closure(x, y, wrong=True)
        with pytest.raises(TypeError, match="missing a required argument"):
            closure(x)


def test_the_package_is_checked():
    x = jnp.ones((1, 1, 4))
    with pytest.raises(TypeCheckError, match=r"parameters of rwkv_jax\.wkv\.v7.*\n.*parameter 'b'"):
        wkv7_step(x, x, x, x, x, jnp.ones((1, 1, 5)), jnp.ones((1, 1, 4, 4)))
    with pytest.raises(TypeCheckError, match="parse_vocabulary"):
        parse_vocabulary(b"1 'a' 1")
    with pytest.raises(TypeCheckError, match="width"):
        ModelConfig(width="64")
