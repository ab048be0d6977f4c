"""The position curve: its points and its ticks."""

import math

from matplotlib.figure import Figure

from rwkv_jax.evaluation.plot import plot
from rwkv_jax.evaluation.text import Bucket, Measured


def measured(*buckets):
    parts = tuple(
        Bucket(nats=bits * math.log(2), tokens=1, bytes=size, start=start, stop=stop, documents=1)
        for start, stop, bits, size in buckets
    )
    return Measured(nats=math.log(2), tokens=1, bytes=1, words=1, documents=1, buckets=parts)


def test_each_text_is_a_curve_and_a_bucket_without_bytes_no_point(tmp_path, monkeypatch):
    seen = {}

    def look(figure, path, **kwargs):
        [axes] = figure.axes
        seen["curves"] = {x.get_label(): x.get_xydata().tolist() for x in axes.get_lines()}
        seen["ticks"] = [x.get_text() for x in axes.get_xticklabels()]
        save(figure, path, **kwargs)

    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", look)
    long = measured((0, 16, 6, 2), (16, 32, 2, 1), (32, 40, 1, 1))
    short = measured((0, 16, 8, 2), (16, 17, 3, 0))
    plot([("long", long), ("short", short)], tmp_path / "curve.png", "Two texts")
    assert seen["curves"] == {
        "long 1.000": [[0, 3], [1, 2], [2, 1]],
        "short 1.000": [[0, 4]],
    }
    assert seen["ticks"] == ["0", "16", "32"]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]
