"""Versions that stand for each other."""

import pytest

from rwkv_jax import models

one_of_a_kind = pytest.mark.parametrize(
    "version",
    [
        pytest.param(version, marks=() if version in ("4", "6", "7") else pytest.mark.slow)
        for version in models.VERSIONS
    ],
)
"""A version of each recurrence; the others are slow."""
