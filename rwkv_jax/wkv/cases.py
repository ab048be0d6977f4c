"""Shapes and named hard regimes of the WKV operators, shared by tests and benchmarks.

Random keys alone prove little. The forms that go wrong do so where decays are extreme (ratios of
cumulative decays overflow), where the same key repeats with alpha near 1 and no decay (a Neumann
series for the triangular inverse has powers that grow like binomials, and ordinary text such as
"aaaa" is enough), and where exponents are large (version 4's naive softmax overflows). Every regime
below is one of these, by name.

Arrays are numpy float32, so that a float64 oracle sees the very same numbers.
"""

from dataclasses import dataclass

import numpy as np


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
    """Inputs `r log_w k v a b`, each `[b, t, h, n]`.

    Made as the model makes them: a = -kk and b = kk alpha with |kk| = 1.
    """
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
            k = kk / np.linalg.norm(kk, axis=-1, keepdims=True)
        case "near-same key":
            log_w, alpha, kk = nearly_one, np.full(size, 0.99), same + 0.05 * kk
            k = kk / np.linalg.norm(kk, axis=-1, keepdims=True)
        case "alternating sign":
            log_w, alpha = nearly_one, np.full(size, 0.99)
            kk = (same + 0.05 * kk) * (1 - 2 * (time % 2))
            k = kk / np.linalg.norm(kk, axis=-1, keepdims=True)
        case "toggling decay":
            four = rng.normal(size=(shape.batch, 4, *size[2:]))
            log_w = np.where(time % 2 == 0, nearly_one, LOG_W_MIN)
            alpha, kk = np.ones(size), four[:, np.arange(shape.time) % 4]
        case "half and half":
            log_w = np.where(np.arange(shape.size) % 2 == 0, nearly_one, LOG_W_MIN)
        case "pure sum":
            log_w, alpha = nearly_one, np.zeros(size)

    kk = kk / np.linalg.norm(kk, axis=-1, keepdims=True)
    arrays = {
        "r": r,
        "log_w": np.broadcast_to(log_w, size),
        "k": k,
        "v": v,
        "a": -kk,
        "b": kk * alpha,
    }
    arrays = {name: np.array(x, np.float32) for name, x in arrays.items()}
    if regime == "silent head":
        for x in arrays.values():
            x[:, :, 0] = 0.0
    return arrays


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
    arrays = {"r": r, "log_w": log_w, "k": k, "v": v}
    arrays = {name: np.array(x, np.float32) for name, x in arrays.items()}
    if regime == "silent head":
        for x in arrays.values():
            x[:, :, 0] = 0.0
    return arrays | {"u": rng.normal(size=size[2:]).astype(np.float32)}


def wkv5_inputs(regime: str, shape: Shape, seed: int = 0) -> dict[str, np.ndarray]:
    """Version 5's: as `wkv6_inputs`, with the decays `[h, n]` of the first token."""
    inputs = wkv6_inputs(regime, shape, seed)
    return inputs | {"log_w": np.ascontiguousarray(inputs["log_w"][0, 0])}


def matrix_state(shape: Shape, seed: int = 0) -> np.ndarray:
    """Versions 5 to 7: a state `[b, h, v, k]` of the size that a few tokens leave."""
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
    """Where new documents start, bool `[b, t]`; the pattern `none` has no reset at all."""
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
