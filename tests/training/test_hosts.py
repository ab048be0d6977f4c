"""Runs of several processes: one order of data, one set of files, one way to stop."""

import inspect
import random
import re
import signal
import time

import pytest
from rich.console import Console
from training.processes import LIMITED, free_port, launch, outcomes
from training.runs import config, settings

from rwkv_jax.data.prepare import prepare
from rwkv_jax.toml import load_config
from rwkv_jax.training import hosts
from rwkv_jax.training.hosts import (
    LOST,
    HostsError,
    _exit_status,
    _is_one_of_several,
    _stated,
    join,
)
from rwkv_jax.training.loop import train
from rwkv_jax.training.metrics import read_metrics
from rwkv_jax.training.report import Report


def tiny(folder, **overrides):
    """A run over four devices, however many processes have them."""
    values = {
        "model.version": 4,
        "train.batch": 4,
        "train.steps": 60,
        "train.log_every": 1,
        "train.eval_every": 0,
        "train.checkpoint_every": 4,
        "optimizer.peak_lr": 3e-3,
        "data.exit_tokens": 60 * 4 * 32,  # where the schedule ends, however long the run
        "mesh.fsdp": -1,
    }
    return settings(folder, **{**values, **overrides})


def curve(folder):
    lines = read_metrics(folder / "metrics.jsonl")
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def assert_same_curve(found, expected):
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=1e-4), step


def wait_for_step(folder, step, processes, seconds=200):
    """Until the log has a step, or a process has ended."""
    end = time.monotonic() + seconds
    while max(curve(folder), default=0) < step and all(p.poll() is None for p in processes):
        assert time.monotonic() < end, "too slow"
        time.sleep(0.02)


def test_processes_stop_together_and_one_resumes(tmp_path, monkeypatch):
    """One of two is asked to stop; a single process resumes, on another mesh. The loss is that of
    one device from the start."""
    monkeypatch.setattr(Report, "curve", lambda _: None)
    many = {"train.steps": 100_000, "train.checkpoint_every": 100_000}
    # They evaluate, on questions too, and save what is best at the same step.
    (tmp_path / "q.jsonl").write_text('{"text": "one two"}\n')
    many |= {"eval.lambada": f'{{q = "{tmp_path}/q.jsonl"}}', "train.eval_every": 2}
    many |= {"eval.texts": f'{{t = "{tmp_path}/corpus/1.py"}}', "train.keep_best": "true"}
    processes = launch(tiny(tmp_path, **many), 2, devices=2)
    wait_for_step(tmp_path / "run", 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    (code, out, err), (other_code, other_out, other_err) = outcomes(processes)
    assert code == other_code == 130, err + other_err
    stopped = int(re.search(r"Stopped after step ([\d,]+) of", err)[1].replace(",", ""))
    assert (tmp_path / "run" / "checkpoints" / str(stopped)).is_dir()
    assert "4 x cpu (fsdp 4), 2 processes" in out
    assert not other_err and "rwkv_jax" not in other_out  # only the first one prints
    assert re.search(r"step 2  held-out .* tokens\), t \d\.\d+, q \d+\.0% right", out)

    end = stopped + 10
    other = {"train.steps": end, "train.checkpoint_every": end, "mesh.fsdp": 2, "mesh.data": 2}
    alone = other | {"mesh.fsdp": 1, "mesh.data": 1, "train.output": tmp_path / "alone"}
    with (tmp_path / "stdout").open("w") as file:
        train(load_config(None, tiny(tmp_path, **other)), console=Console(file=file))
        train(load_config(None, tiny(tmp_path, **alone)), console=Console(quiet=True))
    assert f"resuming from step {stopped}" in (tmp_path / "stdout").read_text()
    assert_same_curve(curve(tmp_path / "run"), curve(tmp_path / "alone"))


@pytest.mark.slow
def test_the_others_end_when_one_is_killed(tmp_path):
    processes = launch(tiny(tmp_path, **{"train.steps": 100_000}), 2, devices=2)
    wait_for_step(tmp_path / "run", 6, processes)
    processes[1].kill()
    began = time.monotonic()
    (code, _, err), (other_code, _, _) = outcomes(processes, timeout=100)
    assert (code, other_code) == (LOST, -signal.SIGKILL), err
    assert time.monotonic() - began < 60
    assert "another process of this run is gone" in err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_the_others_end_when_one_cannot_write(tmp_path, failing):
    """The first one its curve, the other its part of a checkpoint: left to the library, both would
    wait for each other."""
    prepare(config(tmp_path).data)
    many, port = {"train.steps": 100_000}, free_port()
    processes = [
        *launch(tiny(tmp_path, **many), 2, 2, port, only=1 - failing),
        *launch(tiny(tmp_path, **many), 2, 2, port, only=failing, program=LIMITED),
    ]
    (code, _, err), (failed, _, why) = outcomes(processes, timeout=150)
    assert failed == 2
    assert "File too large" in why and "choose another train.output" in why
    assert code == LOST or (code == -signal.SIGABRT and "another task died" in err), err


@pytest.mark.slow
def test_a_checkpoint_of_which_one_process_has_a_damaged_part_is_set_aside(tmp_path):
    processes = launch(tiny(tmp_path, **{"train.steps": 100_000}), 2, devices=2)
    wait_for_step(tmp_path / "run", 9, processes)
    processes[0].send_signal(signal.SIGTERM)
    assert [code for code, *_ in outcomes(processes)] == [130, 130]
    folder = tmp_path / "run" / "checkpoints"
    before, newest = sorted(int(path.name) for path in folder.iterdir())[-2:]
    parts = (folder / str(newest)).glob("params/ocdbt.process_1/d/*")
    largest = max(parts, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:200])
    processes = launch(tiny(tmp_path, **{"train.steps": newest + 3}), 2, devices=2)
    (code, out, err), (other, _, other_err) = outcomes(processes)
    assert code == other == 0, err + other_err
    assert f"{newest}: damaged or of another shape" in out
    assert f"damaged-{newest}; resuming from step {before}" in out


@pytest.mark.slow
def test_a_run_killed_twenty_times_is_the_run_that_was_not(tmp_path):
    """By SIGKILL, at random moments, of one process or all; resumed by 4, 2 and 1 of them."""
    rng = random.Random(0)
    # An epsilon that makes updates smooth in gradients, whose sums are rounded as the processes
    # are: 400 steps without it are two runs, whoever is killed.
    last = 300  # enough for twenty kills: those that are killed at the end may not have connected
    steps = {"train.steps": last, "data.exit_tokens": last * 4 * 32, "optimizer.eps": 1e-3}
    (process,) = launch(
        tiny(tmp_path, **steps, **{"train.output": tmp_path / "whole"}), 1, devices=4
    )
    assert outcomes([process])[0][0] == 0
    kills = 0
    while True:
        count = rng.choice((4, 2, 1))
        processes = launch(tiny(tmp_path, **steps), count, devices=4 // count)
        if kills < 20:
            done = max(curve(tmp_path / "run"), default=0)
            wait_for_step(tmp_path / "run", min(done + rng.randrange(1, 9), last - 1), processes)
            time.sleep(rng.random())
            for process in rng.sample(processes, rng.randint(1, count)):
                process.kill()
        ended = outcomes(processes, timeout=120)
        if all(code == 0 for code, _, _ in ended):
            break
        killed = [code == -signal.SIGKILL for code, _, _ in ended]
        for (code, _, err), was in zip(ended, killed, strict=True):
            # Where no connection broke, JAX itself says so and aborts.
            aborted = code == -signal.SIGABRT and "another task died" in err
            assert was or aborted or code in (0, LOST), err
        kills += any(killed)
    assert kills >= 20
    assert_same_curve(curve(tmp_path / "run"), curve(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"},
            {"coordinator_address": "a:1", "num_processes": 4, "process_id": 3},
        ),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, None),  # a script that is no `srun`
        ({"SLURM_STEP_NUM_TASKS": "8"}, {}),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, {}),
    ],
)
def test_who_was_started_with_others(environment, expected):
    assert _is_one_of_several(environment | {"JAX_PLATFORMS": "cpu"}) == (expected is not None)
    if expected is not None:
        assert _stated(environment) == expected


@pytest.mark.parametrize(
    "stated, text",
    [
        ({}, "the other processes of this run: 1 s of at most"),
        (
            {"coordinator_address": "a:1", "num_processes": 4, "process_id": 0},
            "the other 3 of 4 processes of this run at a:1: 1 s of at most 300",
        ),
        (
            {"coordinator_address": "a:1", "num_processes": 4, "process_id": 2},
            "the first of 4 processes, or for any other, at a:1: 1 s of at most 300",
        ),
    ],
)
def test_waiting_says_for_whom_and_how_long(stated, text, monkeypatch, capsys):
    class Event:
        left = 2

        def wait(self, seconds):
            assert seconds == 1
            self.left -= 1
            return self.left < 0

    monkeypatch.setattr(hosts, "PATIENCE_S", 1)
    inspect.unwrap(hosts._say_waiting)(stated, Event())
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"waiting for {text}") and second == first.replace(": 1 s", ": 2 s")


def test_a_lost_process_is_known_by_what_an_error_came_of():
    lost = RuntimeError("Barrier failed because: UNAVAILABLE: Task 1 heartbeat timeout")
    written = TimeoutError("Timed out while waiting for async_write_complete barrier.")
    written.__cause__ = lost
    code, message = _exit_status(written)
    assert code == LOST and "gone or out of reach (Barrier failed" in message
    handled = TimeoutError("of something else")
    handled.__context__, handled.__suppress_context__ = lost, True
    code, message = _exit_status(handled)
    assert code == 1 and "TimeoutError" in message


STATED = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"JAX_NUM_PROCESSES": "x"}, "JAX_NUM_PROCESSES = x: must be a whole number"),
        ({"JAX_NUM_PROCESSES": None}, "JAX_NUM_PROCESSES is not set; set all of JAX_COORD"),
        ({"JAX_COORDINATOR_ADDRESS": None}, "JAX_COORDINATOR_ADDRESS is not set"),
        ({"JAX_COORDINATOR_ADDRESS": "a"}, "= a: must be host:port of the first process"),
        ({"JAX_COORDINATOR_ADDRESS": "a:99999"}, "= a:99999: a port is a number from 1 to 65535"),
        ({"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES = 0: at least 1"),
        (
            {"JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID = 2: JAX_NUM_PROCESSES = 2, so the last is 1",
        ),
    ],
)
def test_a_wrong_environment(changes, expected):
    environment = {name: x for name, x in (STATED | changes).items() if x is not None}
    with pytest.raises(HostsError, match=expected):
        join(environment)


def test_settings_that_differ_are_named(tmp_path):
    """By all of them, before anything is compiled; the first one prints the line."""
    port = free_port()
    one, other = (
        launch(tiny(tmp_path, **{"train.steps": steps}), 2, port=port, only=number)
        for number, steps in enumerate((10, 6))
    )
    (code, _, err), (other_code, _, other_err) = outcomes([*one, *other], timeout=100)
    assert (code, other_code) == (2, 2)
    assert not other_err
    assert err.splitlines()[-1] == (
        "train.py: process 1 has train.steps = 6, the first one train.steps = 10; start all with"
        " the same settings"
    )
