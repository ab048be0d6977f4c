"""What a run that tunes leaves beside its checkpoints, in the formats of others."""

import shutil
from pathlib import Path

from rwkv_jax import states
from rwkv_jax.checkpoint import adapters
from rwkv_jax.config import Config
from rwkv_jax.tuning import Adapter

ADAPTER, STATE = "adapter", "state.pth"


def export(folder: Path, cfg: Config, adapter: Adapter, base: str) -> Path:
    """Writes a `peft` folder, or a tuned state, into a run's folder in place of an earlier one;
    returns its path."""
    if adapter.state is not None:
        states.save_tuned(folder / STATE, adapter.state)
        return folder / STATE
    path, new = folder / ADAPTER, folder / f".{ADAPTER}.new"
    shutil.rmtree(new, ignore_errors=True)  # of a run that was killed here
    name = Path(cfg.train.init).name  # not where it is on this machine
    adapters.save(new, adapter, cfg.model, base=base, base_name=name)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    new.rename(path)
    return path
