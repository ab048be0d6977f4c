"""`metrics.jsonl`: one JSON object a line, appended during the run, and never a step twice.

Training lines hold `step, tokens, loss, objective, bpb, lr, grad_norm, state_rms, tokens_per_s,
seconds`, the seconds since the line before that were spent on `data`, `steps`, `saving` and
`evaluating`, and `mfu` where the device's peak is known; `loss` (cross entropy), `objective` (what
is minimised) and `grad_norm` are means over the steps since that line. Evaluations hold
`heldout_bpb, heldout_loss, heldout_tokens`, the last one also `final` and the compressors' bits per
byte.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

from rwkv_jax.disk import write_text
from rwkv_jax.errors import UserError


class MetricsLog:
    """The file, opened at the step that a run resumes from: lines after that step are dropped.

    So are a final evaluation (it will be repeated) and the half line that a killed process left.
    Without a path nothing is written: of several processes one keeps the log. With `events` every
    number is also written to TensorBoard's files in that folder. Raises `UserError` if their writer
    is not installed.
    """

    def __init__(self, path: Path | None, step: int, events: Path | None = None):
        self._file = self._events = None
        if path is None:
            return
        if events:
            self._events = _event_writer(events, step)
        kept = [line for line in read_metrics(path) if line["step"] <= step and "final" not in line]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, **record: Any) -> None:
        """Appends a line, and hands it to the system, so that a kill does not lose it."""
        if self._file:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        if self._events:
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    self._events.add_scalar(name, value, record["step"])
            self._events.flush()

    def close(self) -> None:
        """Closes the files."""
        if self._file:
            self._file.close()
        if self._events:
            self._events.close()


def _event_writer(folder: Path, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError(
            "train.tensorboard = true needs a package: pip install 'rwkv_jax[tensorboard]', or set"
            " it to false (metrics.jsonl has the same numbers)"
        ) from None
    # By default a file is named by the second: a run resumed within one would overwrite it.
    return SummaryWriter(str(folder), purge_step=step + 1, filename_suffix=f".from-{step}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file, in order; an empty list if there is no file."""
    lines = []
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
                lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]
