"""The loss curve: a line joins only what was measured alike."""

from matplotlib.figure import Figure

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
