"""Hashes of everything a version computes, to compare two checkouts bit for bit.

    python -m benchmarks.fingerprint [--version 4 7] [--mesh one fsdp8] > before.txt

Run it in each checkout on one machine and compare what it prints: logits, gradients and final
states of a forward pass in float32 and bfloat16, 64 greedy tokens, and the metrics, parameters and
optimizer state after two training steps on one device and on every mesh of eight virtual devices.
"""

import argparse
import hashlib
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax import models, sharding
from rwkv_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from rwkv_jax.data.loader import Batching, Stream, open_loader
from rwkv_jax.training.mesh import LocalRows, make_mesh
from rwkv_jax.training.state import init_train_state
from rwkv_jax.training.step import make_train_step

ONE_DEVICE = MeshConfig(fsdp=1)
RUNS = {
    "one": (ONE_DEVICE, {}),
    "carry": (ONE_DEVICE, {"carry_state": True}),
    "bfloat16, accumulate": (ONE_DEVICE, {"dtype": "bfloat16", "accumulate": 2}),
    "data8": (MeshConfig(data=8, fsdp=1), {}),
    "fsdp8": (MeshConfig(), {}),
    "fsdp4-tensor2": (MeshConfig(tensor=2), {}),
    "data2-sequence4": (MeshConfig(data=2, fsdp=1, sequence=4), {}),
    "data2-fsdp2-tensor2": (MeshConfig(data=2, fsdp=2, tensor=2), {}),
}
VOCABULARY, ROWS, CONTEXT = 66, 16, 32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", nargs="*", default=list(models.VERSIONS))
    parser.add_argument("--mesh", nargs="*", default=list(RUNS), choices=list(RUNS))
    args = parser.parse_args()
    for version in args.version:
        for name, tree in forward(version).items():
            print(version, name, digest(tree), flush=True)
        for name in args.mesh:
            for part, tree in two_steps(version, name).items():
                print(version, name, part, digest(tree), flush=True)


def digest(tree) -> str:
    found = hashlib.sha256()
    for x in jax.tree.leaves(tree):
        found.update(np.asarray(x).tobytes())
    return found.hexdigest()[:16]


def model(version: str) -> ModelConfig:
    head = 64 if version == "4" else 32
    return ModelConfig(version, layers=2, width=128, head_size=head, vocab_size=VOCABULARY)


def forward(version: str) -> dict:
    """A forward pass with resets and lengths, its gradient, and greedy decoding."""
    cfg = model(version)
    leaves, tree = jax.tree.flatten(models.init_params(cfg, jax.random.key(1)))
    # Fresh projections are zero: nothing would flow through them.
    leaves = [
        x + 0.02 * jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(leaves)
    ]
    params = jax.tree.unflatten(tree, leaves)
    tokens = jax.random.randint(jax.random.key(2), (2, 48), 0, VOCABULARY)
    reset = jnp.zeros((2, 48), bool).at[1, jnp.array([7, 13, 30])].set(True)
    lengths = jnp.array([29, 48])
    valid = jnp.arange(48)[None] < lengths[:, None]
    found = {}
    for dtype in ("float32", "bfloat16"):

        def loss(params, dtype=dtype):
            logits, after = models.forward(
                params,
                tokens,
                cfg=cfg,
                reset=reset,
                lengths=lengths,
                dtype=jnp.dtype(dtype),
                remat="dots",
            )
            nats = jax.nn.logsumexp(logits, -1) - logits[..., 3]
            states = sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(after.blocks))
            return jnp.sum(jnp.where(valid, nats, 0.0)) + states, after

        (value, after), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        found |= {f"{dtype} loss": value, f"{dtype} gradient": gradient, f"{dtype} state": after}

    step = jax.jit(lambda params, tokens, state: models.forward(params, tokens, state, cfg=cfg))
    unstacked, state, token = models.unstack(params), None, tokens[:, :5]
    greedy = []
    for _ in range(64):
        logits, state = step(unstacked, token, state)
        token = jnp.argmax(logits[:, -1:], -1).astype(jnp.int32)
        greedy.append(token)
    return found | {"greedy tokens": greedy, "greedy state": state}


def two_steps(version: str, name: str) -> dict:
    """Two steps of training on noise of which a third is masked."""
    mesh_config, settings = RUNS[name]
    sampler = "sequential" if settings.get("carry_state") else "shuffle"
    cfg = Config(
        model=model(version),
        data=DataConfig(sampler=sampler),
        optimizer=OptimizerConfig(peak_lr=3e-2, warmup_steps=0, eps=1e-3),
        train=TrainConfig(batch=ROWS, context=CONTEXT, steps=8, **settings),
        mesh=mesh_config,
    )
    mesh = make_mesh(cfg)
    text = np.random.default_rng(0).integers(0, VOCABULARY, 5000).astype(np.uint16)
    streams = [Stream("noise", text, 0, text % 3 > 0)]
    loader = open_loader(streams, Batching(0, ROWS, CONTEXT, VOCABULARY, sampler))
    read = LocalRows(loader, mesh).read if mesh else loader.read
    state, step, metrics = init_train_state(cfg, mesh=mesh), make_train_step(cfg), []
    with sharding.use_mesh(mesh):
        for number in range(2):
            state, reported = step(state, read(number))
            metrics.append(jax.device_get(reported))
    return {"metrics": metrics, "parameters": state.params, "rest of the state": state}


if __name__ == "__main__":
    main()
