"""The folder of a run: resumed by the same run only, and used by one process at a time."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from rwkv_jax import disk
from rwkv_jax.checkpoint.store import CHECKPOINTS, CONFIG, TOKENIZER, read_config
from rwkv_jax.config import Config
from rwkv_jax.data.sources import Data
from rwkv_jax.errors import UserError
from rwkv_jax.toml import to_toml

FREE = {
    "train.output",
    "train.steps",
    "train.epochs",
    "train.log_every",
    "train.eval_every",
    "train.evaluations",
    "train.eval_tokens",
    "train.checkpoint_every",
    "train.keep",
    "train.keep_best",
    "train.patience",
    "train.logger",
    "train.tensorboard",
    "train.accumulate",
    "train.remat",
    "train.wkv",
    "data.cache",
    "data.strict",
    "data.tokenizer",  # by another name; another one is found out by the fingerprint of the data
    "data.train_stops",  # other tokens are trained then, which the fingerprint of the data shows
}
"""What a run may change when it resumes, besides `eval.*`, `sample.*` and `mesh.*`: its length (the
schedule is then that of the new length), what it reports and keeps, and how, not what, a step
computes."""

LOCK = ".lock"


class RunError(UserError):
    """A run that cannot start or resume in this folder."""


@contextlib.contextmanager
def claim(cfg: Config) -> Iterator[Path]:
    """The folder `train.output`, locked while the context lasts.

    `cfg` is resolved. Raises `RunError` if the folder holds anything but this run, or another
    process trains in it; nothing in it is touched then.
    """
    folder = Path(cfg.train.output).expanduser()
    with contextlib.ExitStack() as stack:
        with writing(folder):
            _check_free(folder, cfg)
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / LOCK).open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"{folder}: another process is training in it; wait for it,"
                " or choose another train.output"
            ) from None
        with writing(folder):
            _check_free(folder, cfg)  # once more: another process may just have finished here
        yield folder


def describe(folder: Path, cfg: Config, data: Data) -> None:
    """Writes the resolved config and the tokenizer into the run's folder.

    At every start: a kill may have left only one of them, and settings may have changed.
    """
    with writing(folder):
        disk.write_text(folder / CONFIG, to_toml(cfg))
        data.tokenizer.save(folder / TOKENIZER)


def writing(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Turns a failure of the file system into a `RunError`."""
    full = "free some space and start again"
    return disk.writing(folder, "choose another train.output", full=full, error=RunError)


def is_trained(folder: Path) -> bool:
    """Whether a run has a checkpoint, damaged or not."""
    return any(path.name.isdigit() for path in (folder / CHECKPOINTS).glob("*"))


def settings(cfg: Config) -> dict[str, object]:
    """The values of a config by name, such as `train.batch`."""
    return {
        f"{section}.{key}": value
        for section, table in vars(cfg).items()
        for key, value in vars(table).items()
    }


def _check_free(folder: Path, cfg: Config) -> None:
    """Raises `RunError` unless the folder is empty, does not exist, or holds this run, or a run
    without a checkpoint."""
    if not folder.exists():
        return
    if not (folder / CONFIG).is_file():
        ours = (LOCK, CONFIG + disk.PARTIAL)
        others = [path.name for path in folder.iterdir() if path.name not in ours]
        if others:
            raise RunError(
                f"{folder}: not empty and not a run ({others[0]}); choose another train.output"
            )
        return
    before, now = settings(read_config(folder)), settings(cfg)
    if (folder / TOKENIZER).is_dir() and not is_trained(folder):
        return  # that run was stopped before it had anything to lose
    for name, value in before.items():
        fixed = name not in FREE and not name.startswith(("eval.", "sample.", "mesh."))
        if fixed and value != now[name]:
            raise RunError(
                f"{folder}: holds another run ({name} is {value!r} there, {now[name]!r} here);"
                f" choose another train.output, or delete {folder} to start over"
            )
