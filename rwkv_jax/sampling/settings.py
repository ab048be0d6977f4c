"""How text is drawn, in the user's terms: checked on the host, then sent to the device."""

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax.numpy as jnp

from rwkv_jax.errors import UserError
from rwkv_jax.sampling.transforms import Settings
from rwkv_jax.typing import Array

MAX_SEED = 2**32 - 1

LARGEST_PENALTY = 1e6
"""Far beyond any logit; of a larger one, times a count, float32 might make infinity."""

FLAGS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "presence": "presence_penalty",
    "frequency": "frequency_penalty",
    "decay": "penalty_decay",
    "min_p": "min_p",
}
"""Name on the command line and in saved conversations -> field of `Sampling`."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The defaults are those of PyPI `rwkv`; `sampling.transforms` defines
    each setting.

    Raises `UserError` for a value out of range.
    """

    temperature: float = 1.0
    top_p: float = 0.85
    top_k: int = 0
    presence_penalty: float = 0.2
    frequency_penalty: float = 0.2
    penalty_decay: float = 0.996
    min_p: float = 0.0

    def __post_init__(self):
        for name in FLAGS.values():
            check_number(name, getattr(self, name), whole=name == "top_k")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(
                f"temperature {self.temperature}: 0 (always the likeliest token) or more"
            )
        for name in ("top_p", "penalty_decay", "min_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} {getattr(self, name)}: between 0 and 1")
        if not 0 <= self.top_k <= 2**31 - 1:
            raise UserError(f"top_k {self.top_k}: 0 (no limit) or more")
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) <= LARGEST_PENALTY:
                raise UserError(
                    f"{name} {getattr(self, name)}: a finite number between -{LARGEST_PENALTY:,.0f}"
                    f" and {LARGEST_PENALTY:,.0f}"
                )

    def flags(self) -> dict[str, float | int]:
        """The values under their names in `FLAGS`."""
        return {flag: getattr(self, name) for flag, name in FLAGS.items()}

    def with_flags(self, values: Mapping[str, float | int]) -> "Sampling":
        """A copy with some values replaced, under their names in `FLAGS`."""
        return replace(self, **{FLAGS[flag]: value for flag, value in values.items()})

    def batched(self, batch: int) -> Settings[Array]:
        """The same settings for every row of a batch, as arrays [b]."""

        def column(name: str) -> Array:
            kind = jnp.int32 if name == "top_k" else jnp.float32
            return jnp.asarray([getattr(self, name)] * batch, kind)

        return Settings(**{name: column(name) for name in FLAGS.values()})


def check_number(name: str, value: object, *, whole: bool) -> None:
    """Raises `UserError` unless `value` is a number, with `whole` an integer."""
    kind = numbers.Integral if whole else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind):
        raise UserError(f"{name} {value!r}: must be {'an integer' if whole else 'a number'}")


def check_seed(seed: int) -> None:
    """Raises `UserError` unless `seed` is an unsigned 32-bit number."""
    check_number("seed", seed, whole=True)
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed {seed}: between 0 and {MAX_SEED}")


def check_max_tokens(max_tokens: int) -> None:
    """Raises `UserError` for a negative number of tokens."""
    check_number("tokens", max_tokens, whole=True)
    if max_tokens < 0:
        raise UserError(f"tokens {max_tokens}: 0 or more")
