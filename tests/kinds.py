"""Versions that stand for each other: all run with `-m slow`, these always."""

import pytest

from rwkv_jax import models


def versions(*quick: str) -> pytest.MarkDecorator:
    """Every version, those that are not named as slow."""
    return pytest.mark.parametrize(
        "version",
        [
            pytest.param(version, marks=() if version in quick else pytest.mark.slow)
            for version in models.VERSIONS
        ],
    )


one_of_a_kind = versions("4", "6", "7")
"""A version of each recurrence."""
