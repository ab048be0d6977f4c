"""Equipment for tests and benchmarks of recurrences: a test for leaks between documents, and inputs
of the WKV operators in regimes that are known to be hard.

Random keys alone prove little. Forms go wrong where decays are extreme (ratios of cumulative decays
overflow), where the same key repeats with alpha near 1 and no decay (a Neumann series for the
triangular inverse has powers that grow like binomials, and ordinary text such as "aaaa" is enough),
and where exponents are large (version 4's naive softmax overflows). The regimes are these, by name.

Their arrays are numpy float32, so that a float64 oracle sees the very same numbers.
"""

from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax.typing import Array, Bool, Callable, PyTree

Inputs = TypeVar("Inputs")

DRAWS = 20
"""How often replacements are drawn before giving up on tokens that equal their replacements."""


def leak_test(
    f: Callable[[Inputs, Array], PyTree],
    inputs: Inputs,
    reset: Bool[Array, "b t"],
    *,
    seed: int = 0,
) -> None:
    """Asserts that documents do not see each other in `f(inputs, reset)`.

    `inputs` and the result of `f` are trees of arrays [b, t, ...]; `reset[b, t]` starts a document
    before token t. For each document in turn, its tokens are replaced by other tokens of the batch:
    the outputs of all other documents, in any row, must stay the same bit for bit, and its own must
    change. `f` may be the forward pass of an operator or a model, or the gradient of its inputs for
    fixed cotangents of its outputs.

    Raises `AssertionError` with the row, the token and the array; `ValueError` for arrays that are
    not [b, t, ...].

    >>> import jax, jax.numpy as jnp
    >>> from rwkv_jax.testing import leak_test
    >>> from rwkv_jax.wkv import wkv7
    >>> draw = lambda seed: jax.random.normal(jax.random.key(seed), (1, 40, 2, 8))
    >>> x = {name: draw(i) for i, name in enumerate("rkvab")}
    >>> x |= {"log_w": -0.5 * jnp.abs(draw(9)), "a": 0.1 * x["a"]}
    >>> reset = jnp.zeros((1, 40), bool).at[0, 13].set(True)
    >>> leak_test(lambda x, reset: wkv7(**x, reset=reset)[0], x, reset)
    """
    shape = np.shape(reset)
    _check_leading_axes("inputs", inputs, shape)
    before = f(inputs, reset)
    _check_leading_axes("output", before, shape)
    before = [np.asarray(x) for x in jax.tree.leaves(before)]
    documents = np.cumsum(np.asarray(reset), axis=1)
    rng = np.random.default_rng(seed)
    for row in range(shape[0]):
        for number in np.unique(documents[row]):
            changed = (documents == number) & (np.arange(shape[0]) == row)[:, None]
            where = f"document {number} of row {row}"
            after = f(_replace(inputs, changed, where, rng), reset)
            _check_changes(before, after, changed, where)


def _replace(inputs, changed, where, rng):
    """`inputs` with the `changed` tokens replaced."""

    def replace(source, x):
        x = jnp.asarray(x)
        other = x.reshape(-1, *x.shape[2:])[source].reshape(x.shape)
        return jnp.where(changed.reshape(*changed.shape, *(1,) * (x.ndim - 2)), other, x)

    for _ in range(DRAWS):
        # By other tokens of the batch, which are valid whatever the arrays mean.
        source = np.roll(np.arange(changed.size), rng.integers(1, max(changed.size, 2)))
        replaced = jax.tree.map(partial(replace, source), inputs)
        pairs = zip(jax.tree.leaves(inputs), jax.tree.leaves(replaced), strict=True)
        if not all(np.array_equal(x, y) for x, y in pairs):
            return replaced
    raise AssertionError(
        f"{where} has the same tokens as the rest of the batch, so the test can see nothing; give"
        " inputs that differ"
    )


def _check_changes(before, after, changed, where) -> None:
    """Only outputs of the `changed` tokens may differ, and some must."""
    after = jax.tree_util.tree_leaves_with_path(after)
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


def _check_leading_axes(what: str, tree: PyTree, shape: tuple[int, ...]) -> None:
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if len(shape) != 2 or np.shape(x)[:2] != shape:
            raise ValueError(
                f"{what}{jax.tree_util.keystr(path)} {list(np.shape(x))} and reset {list(shape)}:"
                " inputs and outputs of f are [b, t, ...], reset is [b, t]"
            )


@dataclass(frozen=True)
class Shape:
    """One operator call: `batch` rows of `time` tokens, `heads` heads of `size` channels."""

    batch: int
    time: int
    heads: int
    size: int

    @property
    def heads_shape(self) -> tuple[int, int, int, int]:
        """`[b, t, h, n]`."""
        return (self.batch, self.time, self.heads, self.size)

    @property
    def width(self) -> int:
        """Channels over all heads: version 4's c."""
        return self.heads * self.size

    def __str__(self) -> str:
        return f"b{self.batch}t{self.time}h{self.heads}n{self.size}"


LOG_W_MIN = -float(np.exp(-0.5))
"""Version 7: the strongest decay of the official parametrisation, log w = -exp(-1/2) sigmoid(.)."""

WKV7_REGIMES = (
    "typical",
    "minimal decay",
    "repeated key",
    "near-same key",
    "alternating sign",
    "toggling decay",
    "half and half",
    "pure sum",
    "silent head",
)

WKV4_REGIMES = (
    "typical",
    "large keys",
    "extreme decays",
    "large keys and extreme decays",
    "silent",
    "strong bonus",
)

WKV6_REGIMES = (
    "typical",
    "fast decay",
    "half and half",
    "toggling decay",
    "vanishing decay",
    "pure sum",
    "silent head",
    "repeated key",
    "alternating sign",
    "endless decay",
)

RESETS = ("none", "first", "last", "random", "every")


def wkv7_inputs(regime: str, shape: Shape, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs `r log_w k v a b`, each `[b, t, h, n]`, as the model computes them: a = -kk and
    b = kk alpha with |kk| = 1."""
    rng = np.random.default_rng([seed, WKV7_REGIMES.index(regime)])
    size = shape.heads_shape
    time = np.arange(shape.time)[:, None, None]

    r, k, v = rng.normal(size=(3, *size))
    kk = rng.normal(size=size)
    log_w = LOG_W_MIN / (1 + np.exp(-2 * rng.normal(size=size)))
    alpha = 1 / (1 + np.exp(-rng.normal(size=size)))
    nearly_one = np.full(size, -3e-4)
    same = rng.normal(size=(shape.batch, 1, *size[2:]))

    match regime:
        case "minimal decay":
            log_w = np.full(size, LOG_W_MIN)
        case "repeated key":
            log_w, alpha, kk = nearly_one, np.ones(size), np.broadcast_to(same, size)
        case "near-same key":
            log_w, alpha, kk = nearly_one, np.full(size, 0.99), same + 0.05 * kk
        case "alternating sign":
            log_w, alpha = nearly_one, np.full(size, 0.99)
            kk = (same + 0.05 * kk) * (1 - 2 * (time % 2))
        case "toggling decay":
            four = rng.normal(size=(shape.batch, 4, *size[2:]))
            log_w = np.where(time % 2 == 0, nearly_one, LOG_W_MIN)
            alpha, kk = np.ones(size), four[:, np.arange(shape.time) % 4]
        case "half and half":
            log_w = np.where(np.arange(shape.size) % 2 == 0, nearly_one, LOG_W_MIN)
        case "pure sum":
            log_w, alpha = nearly_one, np.zeros(size)

    kk = kk / np.linalg.norm(kk, axis=-1, keepdims=True)
    if regime in ("repeated key", "near-same key", "alternating sign"):
        k = kk
    log_w = np.broadcast_to(log_w, size)
    return _finish(regime, r=r, log_w=log_w, k=k, v=v, a=-kk, b=kk * alpha)


def _finish(regime: str, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    """Float32 copies of arrays [b, t, h, n]; all zeros for the first head of "silent head"."""
    copies = {name: np.array(x, np.float32) for name, x in arrays.items()}
    if regime == "silent head":
        for x in copies.values():
            x[:, :, 0] = 0.0
    return copies


def wkv6_inputs(regime: str, shape: Shape, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs `r log_w k v`, each `[b, t, h, n]`, and `u` `[h, n]`; `log_w = -exp(w_raw)`.

    Trained version-6 models have channels that decay by e^-5 and more a token.
    """
    rng = np.random.default_rng([seed, WKV6_REGIMES.index(regime), 6])
    size = shape.heads_shape
    r, k, v = rng.normal(size=(3, *size))
    log_w = -np.exp(rng.uniform(-6.0, 1.5, size=size))
    match regime:
        case "fast decay":
            log_w = np.full(size, -10.0)
        case "half and half":
            log_w = np.broadcast_to(np.where(np.arange(shape.size) % 2 == 0, -3e-4, -20.0), size)
        case "toggling decay":
            time = np.arange(shape.time)[:, None, None]
            log_w = np.broadcast_to(np.where(time % 2 == 0, -3e-4, -20.0), size)
        case "vanishing decay":
            log_w = rng.choice([-3e-4, -1e4], size=size)
        case "endless decay":
            log_w = rng.choice([-3e-4, -np.inf], size=size)
        case "pure sum":
            log_w = np.full(size, -3e-4)
        case "repeated key" | "alternating sign":
            log_w, k = np.full(size, -3e-4), np.repeat(k[:, :1], shape.time, axis=1)
            if regime == "alternating sign":
                k = k * (1 - 2 * (np.arange(shape.time)[:, None, None] % 2))
    tokens = _finish(regime, r=r, log_w=log_w, k=k, v=v)
    return tokens | {"u": rng.normal(size=size[2:]).astype(np.float32)}


def wkv5_inputs(regime: str, shape: Shape, seed: int = 0) -> dict[str, np.ndarray]:
    """As `wkv6_inputs`, for version 5: `log_w` is `[h, n]`, the decays of the first token."""
    inputs = wkv6_inputs(regime, shape, seed)
    return inputs | {"log_w": np.ascontiguousarray(inputs["log_w"][0, 0])}


def matrix_state(shape: Shape, seed: int = 0) -> np.ndarray:
    """A state `[b, h, v, k]` of versions 5 to 7, as large as a few tokens make it."""
    rng = np.random.default_rng([seed, 1007])
    return rng.normal(size=(shape.batch, shape.heads, shape.size, shape.size)).astype(np.float32)


def wkv4_inputs(regime: str, shape: Shape, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs `log_w [c], k [b, t, c], v [b, t, c], u [c]`; `log_w = -exp(time_decay)`."""
    rng = np.random.default_rng([seed, WKV4_REGIMES.index(regime), 4])
    width = shape.width
    k, v = rng.normal(size=(2, shape.batch, shape.time, width))
    u = rng.normal(size=width)
    decay = rng.uniform(-5.0, 0.5, size=width)
    if regime.startswith("large keys"):
        k = 10 * k
    if regime.endswith("extreme decays"):
        decay = rng.permutation(np.linspace(-6.0, 3.0, width))
    if regime == "silent":
        k, v, u = np.zeros_like(k), np.zeros_like(v), np.zeros_like(u)
    if regime == "strong bonus":
        u = rng.choice([-20.0, 20.0], size=width)
    arrays = {"log_w": -np.exp(decay), "k": k, "v": v, "u": u}
    return {name: x.astype(np.float32) for name, x in arrays.items()}


def wkv4_state(shape: Shape, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A state `(num, den, max_exp)`, each `[b, c]`; the sums are num and den times e^max_exp."""
    rng = np.random.default_rng([seed, 1004])
    size = (shape.batch, shape.width)
    den = rng.uniform(0.5, 3.0, size=size)
    num, max_exp = rng.normal(size=size) * den, rng.normal(size=size)
    return num.astype(np.float32), den.astype(np.float32), max_exp.astype(np.float32)


def reset_pattern(name: str, shape: Shape, seed: int = 0) -> np.ndarray:
    """Where documents start, bool `[b, t]`, for a pattern of `RESETS`."""
    reset = np.zeros((shape.batch, shape.time), bool)
    match name:
        case "first":
            reset[:, 0] = True
        case "last":
            reset[:, -1] = True
        case "random":
            reset = np.random.default_rng([seed, 17]).random(reset.shape) < 0.15
        case "every":
            reset[:] = True
    return reset
