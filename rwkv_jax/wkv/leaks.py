"""Does one document's output depend on another's tokens?"""

from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax.typing import Array, Bool, Callable, PyTree

Inputs = TypeVar("Inputs")

DRAWS = 20
"""How often others are drawn for tokens that were exchanged for their like."""


def leak_test(
    f: Callable[[Inputs, Array], PyTree],
    inputs: Inputs,
    reset: Bool[Array, "b t"],
    *,
    seed: int = 0,
) -> None:
    """Asserts that documents do not see each other in `f(inputs, reset)`.

    `inputs` is a tree of arrays [b, t, ...], what `f` returns another; `reset[b, t]` starts a
    document before token t. One document of one row after another has its tokens exchanged for
    others of the batch: what `f` returns for all other documents, of this row and of others, must
    stay as it is, bit for bit, and what it returns for this one must not. `f` may be the forward
    pass of an operator or a model, or the gradient of its inputs for fixed cotangents of its
    outputs.

    Raises `AssertionError`, which names the row, the token and the array; `ValueError` for arrays
    that are not [b, t, ...].

    >>> import jax, jax.numpy as jnp
    >>> from rwkv_jax.wkv import leak_test, wkv7
    >>> draw = lambda seed: jax.random.normal(jax.random.key(seed), (1, 40, 2, 8))
    >>> x = {name: draw(i) for i, name in enumerate("rkvab")}
    >>> x |= {"log_w": -0.5 * jnp.abs(draw(9)), "a": 0.1 * x["a"]}
    >>> reset = jnp.zeros((1, 40), bool).at[0, 13].set(True)
    >>> leak_test(lambda x, reset: wkv7(**x, reset=reset)[0], x, reset)
    """
    shape = np.shape(reset)
    _check_shapes("inputs", inputs, shape)
    before = f(inputs, reset)
    _check_shapes("output", before, shape)
    before = [np.asarray(x) for x in jax.tree.leaves(before)]
    documents = np.cumsum(np.asarray(reset), axis=1)
    rng = np.random.default_rng(seed)
    for row in range(shape[0]):
        for number in np.unique(documents[row]):
            changed = (documents == number) & (np.arange(shape[0]) == row)[:, None]
            where = f"document {number} of row {row}"
            _check_one(f, inputs, reset, before, changed, where, rng)


def _check_one(f, inputs, reset, before, changed, where, rng) -> None:
    """With the `changed` tokens exchanged, only their outputs may move, and must."""

    def exchange(source, x):
        x = jnp.asarray(x)
        other = x.reshape(-1, *x.shape[2:])[source].reshape(x.shape)
        return jnp.where(changed.reshape(*changed.shape, *(1,) * (x.ndim - 2)), other, x)

    for _ in range(DRAWS):
        # Other tokens of the batch are valid tokens, whatever the arrays mean.
        source = np.roll(np.arange(changed.size), rng.integers(1, max(changed.size, 2)))
        exchanged = jax.tree.map(partial(exchange, source), inputs)
        pairs = zip(jax.tree.leaves(inputs), jax.tree.leaves(exchanged), strict=True)
        if not all(np.array_equal(x, y) for x, y in pairs):
            break
    else:
        raise AssertionError(
            f"{where} has the same tokens as the rest: nothing can be seen; give inputs that differ"
        )
    after = jax.tree_util.tree_leaves_with_path(f(exchanged, reset))
    moved = False
    for x, (path, y) in zip(before, after, strict=True):
        differs = (x != np.asarray(y)).reshape(*changed.shape, -1).any(-1)
        leaks = np.argwhere(differs & ~changed)
        if len(leaks):
            row, token = leaks[0]
            raise AssertionError(
                f"output{jax.tree_util.keystr(path)} of row {row}, token {token} changes with"
                f" {where}"
            )
        moved |= bool(differs.any())
    if not moved:
        raise AssertionError(f"no output changes with {where}: the test sees nothing")


def _check_shapes(what: str, tree: PyTree, shape: tuple[int, ...]) -> None:
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if len(shape) != 2 or np.shape(x)[:2] != shape:
            raise ValueError(
                f"{what}{jax.tree_util.keystr(path)} {list(np.shape(x))} and reset {list(shape)}:"
                " inputs and what f returns are [b, t, ...], reset is [b, t]"
            )
