"""The loss curve: a line joins only what was measured alike."""

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from rwkv_jax.training.plot import _draw_heldout, plot


def evaluation(step: int, bpb: float, read: int) -> dict:
    return {"tokens": step, "heldout_bpb": bpb, "heldout_tokens": read}


def curves(lines: list[dict]) -> dict[str, list[float]]:
    axes = Figure().add_subplot()
    _draw_heldout(axes, lines)
    return {str(line.get_label()): list(line.get_ydata()) for line in axes.get_lines()}


def test_a_part_of_the_heldout_text_is_a_curve_of_its_own():
    lines = [evaluation(1, 3.0, 50), evaluation(2, 2.0, 50), evaluation(3, 2.5, 900)]
    assert curves(lines) == {"a part of it 2.000": [3.0, 2.0], "held out 2.500": [2.5]}


def test_evaluations_alike_are_one_curve():
    lines = [evaluation(1, 3.0, 50), evaluation(2, 2.0, 50)]
    assert curves(lines) == {"held out 2.000": [3.0, 2.0]}


def test_a_run_without_lines_is_drawn(tmp_path):
    plot([], tmp_path / "loss.png", "nothing yet")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_single_step_is_seen(tmp_path):
    """A line through one point would not be: there is a mark in the middle of the picture."""
    plot([{"tokens": 8, "loss": 1.0, "bpb": 3.0}], tmp_path / "loss.png", "one step")
    picture = imread(tmp_path / "loss.png")[..., :3]
    blue = np.abs(picture - to_rgb("tab:blue")).max(-1) < 0.02
    rows, columns = np.nonzero(blue)
    height, width = blue.shape
    middle = (abs(rows - height / 2) < height / 5) & (abs(columns - width / 2) < width / 5)
    assert middle.sum() > 10
