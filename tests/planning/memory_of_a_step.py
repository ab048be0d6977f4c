"""Prints the memory of a step on eight virtual devices, in KiB: planned, and added to the process.

Run as a process of its own, so that nothing else is in its memory.
"""

import gc
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np

from rwkv_jax import sharding
from rwkv_jax.config import Config, MeshConfig, ModelConfig, TrainConfig
from rwkv_jax.hardware import open_topology
from rwkv_jax.planning.plan import abstract_batch, make_plan
from rwkv_jax.training.mesh import make_mesh
from rwkv_jax.training.state import init_train_state
from rwkv_jax.training.step import make_train_step


def kib(name: str) -> int:
    """An entry of /proc/self/status: VmRSS is the present, VmHWM the peak since its last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


cfg = Config(
    model=ModelConfig(layers=4, width=256, vocab_size=512),
    train=TrainConfig(batch=32, context=512, steps=1),
    mesh=MeshConfig(tensor=int(sys.argv[1])),
)
plan = make_plan(cfg, open_topology("here"))
mesh = make_mesh(cfg)
state = init_train_state(cfg, mesh=mesh)
batch = jax.tree.map(
    lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), abstract_batch(cfg, mesh)
)
with sharding.use_mesh(mesh):
    step = make_train_step(cfg).lower(state, batch).compile()
    jax.block_until_ready(state)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = kib("VmRSS")
    jax.block_until_ready(step(state, batch))
print(8 * (plan.gradients + plan.rest) / 1024, kib("VmHWM") - before)
