"""`implementation=None` is the fastest form measured, for the device of the program."""

import json
from pathlib import Path

import jax
import pytest
from wkv.operators import SMALL, VERSIONS

TABLES = [*(Path(__file__).parents[2] / "benchmarks" / "results").glob("forms_*.json")]


def test_a_table_was_measured():
    assert TABLES


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_the_default_is_the_fastest_of_the_measured_table(path):
    """Within noise: a fifth, or the overhead of a call."""
    slower = []
    for row in json.loads(path.read_text())["rows"]:
        medians = {name: spread["median"] for name, spread in row["seconds"].items()}
        mine, least = medians["default"], min(medians.values())
        if mine > 1.2 * least and mine - least > 2e-4:
            slower.append((row["version"], row["kind"], row["tokens"], row["size"], medians))
    assert not slower


@pytest.mark.parametrize(
    ("name", "form"), [("4", "associative"), ("6", "chunked"), ("7", "chunked")]
)
def test_the_choice_follows_the_device_of_the_program(name, form):
    """Compiled for an accelerator on this CPU, the form is another than for this CPU."""
    version = VERSIONS[name]
    inputs, state = version.inputs("typical", SMALL), version.state(SMALL)

    def operations(implementation, platform):
        run = jax.jit(lambda inputs, state: version.call(inputs, state, None, implementation))
        text = run.trace(inputs, state).lower(lowering_platforms=(platform,)).as_text()
        return [text.count(f"stablehlo.{name}") for name in ("dot_general", "while", "exponential")]

    assert operations(None, "tpu") == operations(form, "tpu")
    assert operations(None, "cpu") != operations(form, "cpu")
