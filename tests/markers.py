"""Marks for tests of every version: the quick suite runs some of them, `-m slow` the others."""

import pytest

from rwkv_jax import models


def versions(*quick: str) -> pytest.MarkDecorator:
    """Every version; the ones that are not named are slow tests."""
    return pytest.mark.parametrize(
        "version",
        [
            pytest.param(version, marks=() if version in quick else pytest.mark.slow)
            for version in models.VERSIONS
        ],
    )


each_recurrence = versions("4", "6", "7")
"""A version of each recurrence."""
