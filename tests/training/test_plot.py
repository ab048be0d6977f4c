"""The loss curve: a line joins only what was measured alike."""

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from rwkv_jax.training.plot import BITS, NATS, _draw_heldout, measure_of, plot, plot_runs


def evaluation(step: int, bpb: float, read: int) -> dict:
    return {"tokens": step, "heldout_bpb": bpb, "heldout_tokens": read}


def curves(lines: list[dict]) -> dict[str, list[float]]:
    axes = Figure().add_subplot()
    _draw_heldout(axes, lines, BITS, "held out", "tab:orange")
    return {str(line.get_label()): list(line.get_ydata()) for line in axes.get_lines()}


def test_a_part_of_the_heldout_text_is_a_curve_of_its_own():
    lines = [evaluation(1, 3.0, 50), evaluation(2, 2.0, 50), evaluation(3, 2.5, 900)]
    assert curves(lines) == {"held out, a part 2.000": [3.0, 2.0], "held out 2.500": [2.5]}


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


def drawn(monkeypatch, draw):
    """The labels, numbers and the name of the axis that a drawing has."""
    made, original = [], Figure.add_subplot

    def add(self, *arguments, **options):
        made.append(original(self, *arguments, **options))
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "add_subplot", add)
        draw()
    (axes,) = made
    named = {str(x.get_label()): [*map(float, x.get_ydata())] for x in axes.get_lines()}
    return axes.get_ylabel(), {k: y for k, y in named.items() if not k.startswith("_")}


def test_of_masked_text_what_is_trained_is_drawn(tmp_path, monkeypatch):
    """Bits per byte would count the questions: they rise while the replies are learnt."""
    lines = [{"step": i, "tokens": 8 * i, "loss": 3.0 - i} for i in (1, 2)]
    lines += [
        {"step": i, **evaluation(8 * i, 5.0 + i, 50), "heldout_trained_loss": 2.5 - i}
        for i in (1, 2)
    ]
    lines[-1]["compressors"] = {"gzip": 1.0}
    name, curves = drawn(monkeypatch, lambda: plot(lines, tmp_path / "loss.png", "masked"))
    assert name == "nats per trained token"
    assert curves == {"training 1.000": [2.0, 1.0], "held out 0.500": [1.5, 0.5]}


def test_several_runs_in_one_picture(tmp_path, monkeypatch):
    plain = [{"tokens": 8, "loss": 1.0, "bpb": 3.0}, evaluation(8, 2.0, 50)]
    masked = [{"tokens": 8, "loss": 1.5}]
    runs = {"a": plain, "b": [{"tokens": 8, "loss": 1.0, "bpb": 4.0}]}
    name, curves = drawn(monkeypatch, lambda: plot_runs(runs, tmp_path / "x.png"))
    assert name == "bits per byte" and curves == {"a 2.000": [2.0], "b 4.000": [4.0]}
    assert measure_of(plain, masked) is NATS and measure_of(plain) is BITS
    name, curves = drawn(monkeypatch, lambda: plot_runs({"a": plain, "b": masked}, tmp_path / "x"))
    assert curves == {"a 1.000": [1.0], "b 1.500": [1.5]}
