"""`metrics.jsonl`: one JSON object a line, appended as the run goes, and never a step twice.

Training lines hold `step, tokens, loss, bpb, lr, grad_norm, tokens_per_s, seconds`; `loss` and
`grad_norm` are means over the steps since the line before. Evaluations hold `heldout_bpb` and its
like, the last one `final` and the compressors' bits per byte.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """The file, opened at the step that a run goes on from: lines after that step are dropped.

    So is a final evaluation (it will be made again) and whatever half a line a killed process left.
    """

    def __init__(self, path: Path, step: int):
        kept = [line for line in read_metrics(path) if line["step"] <= step and "final" not in line]
        new = path.with_suffix(".tmp")
        new.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(new, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, **record: Any) -> None:
        """Appends a line; it is the system's once this returns, so a kill does not lose it."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file, in order; none if there is no file."""
    lines = []
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
                lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]
