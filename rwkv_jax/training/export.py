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
    shutil.rmtree(folder / ADAPTER, ignore_errors=True)
    path = folder / ADAPTER
    adapters.save(path, adapter, cfg.model, base=base, base_name=cfg.train.init)
    return path
