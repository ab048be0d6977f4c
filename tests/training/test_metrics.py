"""What a run writes down: `metrics.jsonl`, and TensorBoard's files beside it."""

import struct
import sys

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from rwkv_jax.errors import UserError
from rwkv_jax.training.metrics import MetricsLog, read_metrics


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
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, folder)
    log.write(step=3, loss=2.5)
    log.write(step=6, loss=2.25)
    log.write(step=9, loss=8.0)
    log.close()
    assert scalars(events(folder)) == {("loss", 3): 2.5, ("loss", 6): 2.25, ("loss", 9): 8.0}

    log = MetricsLog(tmp_path / "metrics.jsonl", 6, folder)
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
        MetricsLog(tmp_path / "metrics.jsonl", 0, tmp_path / "events")
    assert not (tmp_path / "metrics.jsonl").exists()
