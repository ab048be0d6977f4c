"""`metrics.jsonl`: one JSON object a line, appended during the run, and never a step twice.

Training lines hold `step, tokens, loss, objective, bpb, lr, grad_norm, state_rms, tokens_per_s,
seconds`, the seconds since the line before that were spent on `data`, `steps`, `saving` and
`evaluating`, and `mfu` where the device's peak is known; `loss` (cross entropy), `objective` (what
is minimised) and `grad_norm` are means over the steps since that line. Evaluations hold
`heldout_bpb, heldout_loss, heldout_tokens`, the last one also `final` and the compressors' bits per
byte; where not all tokens are trained also `heldout_trained_loss` and `heldout_trained_tokens`
(training lines then have no `bpb`); and `eval_NAME_bpb` or `eval_NAME_accuracy` of the sets of
`[eval]`.
"""

import contextlib
import dataclasses
import json
import secrets
from importlib import import_module
from pathlib import Path
from typing import Any

from rwkv_jax.config import Config
from rwkv_jax.disk import write_text
from rwkv_jax.errors import UserError


class MetricsLog:
    """The file, opened at the step that a run resumes from: lines after that step are dropped.

    So are a final evaluation (it will be repeated) and the half line that a killed process left.
    Every number also goes to the `train.logger` of the config, TensorBoard's files in `events` of
    the folder or a run of Weights & Biases that is found again by the folder. Raises `UserError` if
    that is not installed, or cannot start.
    """

    def __init__(self, folder: Path, cfg: Config, step: int):
        path, train = folder / "metrics.jsonl", cfg.train
        self._events = self._wandb = None
        if train.logger == "tensorboard" or train.tensorboard:
            self._events = _event_writer(folder / "events", step)
        if train.logger == "wandb":
            self._wandb = _wandb_run(folder, cfg)
        kept = [line for line in read_metrics(path) if line["step"] <= step and "final" not in line]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, **record: Any) -> None:
        """Appends a line, and hands it to the system, so that a kill does not lose it."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        step = record["step"]
        numbers = {x: y for x, y in record.items() if isinstance(y, int | float) and x != "step"}
        if self._events:
            for name, value in numbers.items():
                self._events.add_scalar(name, value, step)
            self._events.flush()
        if self._wandb:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._events:
            self._events.close()
        if self._wandb:
            self._wandb.finish()


def _imported(logger: str, package: str) -> Any:
    """The package of a `train.logger`. Raises `UserError` if it is not installed."""
    try:
        return import_module(package)
    except ImportError:
        raise UserError(
            f"train.logger = {logger} needs a package: pip install 'rwkv_jax[{logger}]', or leave"
            " it out (metrics.jsonl has the same numbers)"
        ) from None


def _event_writer(folder: Path, step: int) -> Any:
    writer = _imported("tensorboard", "tensorboardX").SummaryWriter
    # By default a file is named by the second: a run resumed within one would overwrite it.
    return writer(str(folder), purge_step=step + 1, filename_suffix=f".from-{step}")


def _wandb_run(folder: Path, cfg: Config) -> Any:
    """The run of Weights & Biases that belongs to a folder; its settings are the config's."""
    wandb = _imported("wandb", "wandb")
    place = folder / "wandb_id"
    name = place.read_text().strip() if place.is_file() else secrets.token_hex(4)
    write_text(place, f"{name}\n")
    settings = wandb.Settings(console="off", silent=True)
    try:
        return wandb.init(
            id=name,
            resume="allow",
            name=folder.name,
            dir=str(folder),
            config=dataclasses.asdict(cfg),
            settings=settings,
        )
    except wandb.Error as error:
        reason = str(error).splitlines()[0].rstrip(". ")
        raise UserError(
            f"train.logger = wandb: {reason}; log in (wandb login), set WANDB_MODE=offline, or"
            " leave it out"
        ) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file, in order; an empty list if there is no file."""
    lines = []
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
                lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]
