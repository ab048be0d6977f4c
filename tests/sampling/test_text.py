"""Stop strings: never printed, not even in part, wherever the text was cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_jax.sampling.text import StopStrings

letters = st.text("ab\n", max_size=30)


@given(letters, st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.data())
def test_result_does_not_depend_on_the_cuts(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    parts = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    gate = StopStrings(stops)
    passed = ""
    for part in parts:
        passed += gate.push(part)
        # What was passed can no longer become part of a stop string.
        assert not any(stop in passed for stop in stops)
    passed += gate.flush()
    assert (passed, gate.reached) == whole(text, stops)


def whole(text, stops):
    """The first stop string to be complete ends the text; the longer of two at once."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@pytest.mark.parametrize(
    "parts, passed",
    [
        (["one\n", "\ntwo"], ["one", ""]),
        (["one\n", "two\n\n", "three"], ["one", "\ntwo", ""]),
        (["\n", "a", "\n", "\n"], ["", "\na", "", ""]),
    ],
)
def test_only_what_may_become_a_stop_string_is_held_back(parts, passed):
    gate = StopStrings(["\n\n"])
    assert [gate.push(part) for part in parts] == passed


def test_without_stop_strings_nothing_is_held_back():
    gate = StopStrings(["", ""])
    assert gate.push("any\n\ntext") == "any\n\ntext"
    assert not gate.reached and gate.flush() == ""
