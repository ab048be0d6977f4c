"""What a run writes down: `metrics.jsonl`, and TensorBoard's files beside it."""

import dataclasses
import struct
import sys

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from rwkv_jax.errors import UserError
from rwkv_jax.toml import parse_config
from rwkv_jax.training.metrics import MetricsLog, read_metrics

TENSORBOARD = parse_config({"train": {"logger": "tensorboard"}})
WANDB = parse_config({"train": {"logger": "wandb"}})


def events(folder):
    """Every event in `folder`, oldest file first."""
    found = []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[12 + length + 4 :]  # a checksum follows the length, and another the event
    return found


def scalars(found):
    """What TensorBoard shows: a start at a step hides earlier records of it and of later steps."""
    shown = {}
    for event in found:
        if event.session_log.status == SessionLog.START:
            shown = {key: value for key, value in shown.items() if key[1] < event.step}
        for value in event.summary.value:
            shown[value.tag, event.step] = value.simple_value
    return shown


def test_tensorboard_sees_every_number_once_and_no_step_that_was_lost(tmp_path):
    folder = tmp_path / "events"
    log = MetricsLog(tmp_path, TENSORBOARD, 0)
    log.write(step=3, loss=2.5)
    log.write(step=6, loss=2.25)
    log.write(step=9, loss=8.0)
    log.close()
    assert scalars(events(folder)) == {("loss", 3): 2.5, ("loss", 6): 2.25, ("loss", 9): 8.0}

    log = MetricsLog(tmp_path, parse_config({"train": {"tensorboard": True}}), 6)  # its older name
    log.write(step=8, loss=2.0, heldout_bpb=1.5)
    log.close()
    assert scalars(events(folder)) == {
        ("loss", 3): 2.5,
        ("loss", 6): 2.25,
        ("loss", 8): 2.0,
        ("heldout_bpb", 8): 1.5,
    }
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [3, 6, 8]


def test_without_tensorboards_writer_a_run_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"pip install 'rwkv_jax\[tensorboard\]'"):
        MetricsLog(tmp_path, TENSORBOARD, 0)
    assert not (tmp_path / "metrics.jsonl").exists()


class FakeWandb:
    """What a run uses of the package wandb, kept in a list."""

    class Error(Exception):
        pass

    def __init__(self, error=None):
        self.calls, self.error = [], error
        self.Settings = dict

    def init(self, **options):
        if self.error:
            raise self.Error(self.error)
        self.calls.append(("init", options["id"], options["resume"], options["config"]["model"]))
        return self

    def log(self, numbers, step):
        self.calls.append(("log", step, numbers))

    def finish(self):
        self.calls.append("finish")


def test_weights_and_biases_sees_one_run_over_all_its_starts(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for start, step in (0, 3), (3, 5):
        log = MetricsLog(tmp_path, WANDB, start)
        log.write(step=step, loss=2.5, compressors={"gzip": 1.0})
        log.close()
    name = (tmp_path / "wandb_id").read_text().strip()
    begin = ("init", name, "allow", dataclasses.asdict(WANDB)["model"])
    assert fake.calls == [
        begin,
        ("log", 3, {"loss": 2.5}),
        "finish",
        begin,
        ("log", 5, {"loss": 2.5}),
        "finish",
    ]


@pytest.mark.parametrize(
    "wandb, message",
    [
        (None, r"pip install 'rwkv_jax\[wandb\]'"),
        (FakeWandb("api_key not configured\nmore"), "wandb: api_key not configured; log in"),
    ],
)
def test_weights_and_biases_that_cannot_start_is_one_line(tmp_path, monkeypatch, wandb, message):
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(UserError, match=message):
        MetricsLog(tmp_path, WANDB, 0)
