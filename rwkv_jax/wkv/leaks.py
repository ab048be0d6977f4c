"""Does one document's output depend on another's tokens?"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax.typing import Array, Bool, Callable, PyTree

Inputs = TypeVar("Inputs")


def leak_test(
    f: Callable[[Inputs, Array], PyTree],
    inputs: Inputs,
    reset: Bool[Array, "b t"],
    *,
    seed: int = 0,
) -> None:
    """Asserts that documents in one row do not see each other in `f(inputs, reset)`.

    `inputs` is a tree of arrays [b, t, ...], what `f` returns another; `reset[b, t]` starts a
    document before token t. One document of each row after another has its tokens exchanged for
    others of the batch: what `f` returns for the row's other documents must stay as it is, bit for
    bit, and what it returns for this one must not. `f` may be the forward pass of an operator or a
    model, or the gradient of its inputs for fixed cotangents of its outputs.

    Raises `AssertionError`, which names the row, the token and the array.

    >>> import jax, jax.numpy as jnp
    >>> from rwkv_jax.wkv import leak_test, wkv7
    >>> draw = lambda seed: jax.random.normal(jax.random.key(seed), (1, 40, 2, 8))
    >>> x = {name: draw(i) for i, name in enumerate("rkvab")}
    >>> x |= {"log_w": -0.5 * jnp.abs(draw(9)), "a": 0.1 * x["a"]}
    >>> reset = jnp.zeros((1, 40), bool).at[0, 13].set(True)
    >>> leak_test(lambda x, reset: wkv7(**x, reset=reset)[0], x, reset)
    """
    documents = np.cumsum(np.asarray(reset), axis=1)
    before = [np.asarray(x) for x in jax.tree.leaves(f(inputs, reset))]
    rng = np.random.default_rng(seed)
    for number in range(documents.max() + 1):
        changed = documents == number
        # Other tokens of the batch are valid tokens, whatever the arrays mean.
        source = np.roll(np.arange(changed.size), rng.integers(1, max(changed.size, 2)))

        def exchange(x, changed=changed, source=source):
            x = jnp.asarray(x)
            other = x.reshape(-1, *x.shape[2:])[source].reshape(x.shape)
            return jnp.where(changed.reshape(*changed.shape, *(1,) * (x.ndim - 2)), other, x)

        after = jax.tree_util.tree_leaves_with_path(f(jax.tree.map(exchange, inputs), reset))
        moved = False
        for x, (path, y) in zip(before, after, strict=True):
            differs = (x != np.asarray(y)).reshape(*changed.shape, -1).any(-1)
            leaks = np.argwhere(differs & ~changed)
            if len(leaks):
                row, token = leaks[0]
                raise AssertionError(
                    f"output{jax.tree_util.keystr(path)} of row {row}, token {token} (document"
                    f" {documents[row, token]}) changes with document {number}"
                )
            moved |= bool(differs.any())
        if not moved:
            raise AssertionError(f"no output changes with document {number}: the test sees nothing")
