"""Time sharded across devices: the bytes they exchange, and a gradient step over 65,536 tokens.

    python -m benchmarks.sequence [--devices 8] [--tokens 4096 16384 65536]

On virtual devices of this CPU, which share its cores: bytes and memory are those of real devices,
times are not. First the operators' gradient (B=1, H=12, N=64; version 4: 768 channels): what a
device receives and allocates, by length. Then a whole step of version 7 (2 layers, 128 wide), whose
loss and gradient are compared with those of one device.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import harness
from benchmarks.harness import console
from benchmarks.worker import versions
from rwkv_jax import ModelConfig, init_params, models
from rwkv_jax.loss import cross_entropy
from rwkv_jax.planning.collectives import bytes_moved
from rwkv_jax.testing import Shape, wkv4_inputs, wkv6_inputs, wkv7_inputs
from rwkv_jax.wkv import wkv4, wkv6, wkv7

OPERATORS = {"4": (wkv4, wkv4_inputs), "6": (wkv6, wkv6_inputs), "7": (wkv7, wkv7_inputs)}
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--tokens", nargs="*", type=int, default=[4096, 16384, 65536])
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)
    mesh = jax.make_mesh((args.devices,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        operators = {
            version: {tokens: operator(version, tokens, mesh) for tokens in args.tokens}
            for version in OPERATORS
        }
    model = step(args.tokens[-1], mesh)
    columns = ["version", "tokens", "KiB received", "MiB allocated"]
    rows = [
        [version, f"{tokens:,}", f"{x['received'] / 1024:,.0f}", f"{x['allocated'] / MIB:,.1f}"]
        for version, cells in operators.items()
        for tokens, x in cells.items()
    ]
    title = f"Forward and backward over {args.devices} devices: each one's share"
    harness.table(title, columns, rows)
    console.print(
        f"\nversion 7, 2 layers, 128 wide: {args.tokens[-1]:,} tokens in"
        f" {model['seconds']:.1f} s over {args.devices} devices ({model['alone_seconds']:.1f} s on"
        f" one), {model['allocated'] / MIB:,.0f} MiB a device"
        f" ({model['alone_allocated'] / MIB:,.0f} on one); loss {model['loss']:.6f}, apart"
        f" {model['loss_apart']:.0e}; gradient apart {model['gradient_apart']:.0e}"
    )
    found = {"ours": versions("jax", "jaxlib", "numpy")}
    result = {"devices": args.devices, "versions": found, "operators": operators, "model": model}
    harness.report("sequence", result)


def operator(version: str, tokens: int, mesh: jax.sharding.Mesh) -> dict:
    console.print(f"[dim]version {version}, {tokens} tokens[/]")
    run, inputs = OPERATORS[version]
    per_token = NamedSharding(mesh, PartitionSpec(None, "sequence"))
    shared = NamedSharding(mesh, PartitionSpec())
    x = {}
    for name, z in inputs("typical", Shape(1, 1, 12, 64)).items():
        shape = (1, tokens, *z.shape[2:]) if z.ndim > 2 else z.shape
        sharding = per_token if z.ndim > 2 else shared
        x[name] = jax.ShapeDtypeStruct(shape, z.dtype, sharding=sharding)

    def both(x, dy):
        y, pull_back = jax.vjp(lambda x: run(**x, mesh_axis="sequence")[0], x)
        return y, pull_back(dy)[0]

    program = jax.jit(both).lower(x, x["v"]).compile()
    received = bytes_moved(program.as_text())
    return {
        "received": sum(received.values()),
        "received_by_kind": received,
        "allocated": program.memory_analysis().temp_size_in_bytes,
    }


def step(tokens: int, mesh: jax.sharding.Mesh) -> dict:
    """A gradient of the whole model, across devices and on one."""
    cfg = ModelConfig(version="7", layers=2, width=128, vocab_size=512)
    params = init_params(cfg, jax.random.key(0))
    # Fresh projections are zero: nothing would flow through them.
    params = jax.tree.map(
        lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape), params
    )
    text = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, tokens + 1), np.int32)

    def loss(params, text, axis):
        hidden, _ = models.backbone(params, text[:, :-1], cfg=cfg, mesh_axis=axis, remat="dots")
        return cross_entropy(hidden, params.head, text[:, 1:])[0]

    def run(params, axis):
        program = (
            jax.jit(lambda params, text: jax.value_and_grad(loss)(params, text, axis))
            .lower(params, text)
            .compile()
        )
        jax.block_until_ready(program(params, text))
        began = time.perf_counter()
        out = jax.block_until_ready(program(params, text))
        allocated = program.memory_analysis().temp_size_in_bytes
        return out, time.perf_counter() - began, allocated

    (whole, whole_grad), alone, alone_allocated = run(params, None)
    with jax.set_mesh(mesh):
        everywhere = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        (split, split_grad), seconds, allocated = run(everywhere, "sequence")
    one, other = (ravel_pytree(jax.device_get(x))[0] for x in (whole_grad, split_grad))
    return {
        "loss": float(whole),
        "loss_apart": abs(float(split) / float(whole) - 1),
        "gradient_apart": float(jnp.linalg.norm(other - one) / jnp.linalg.norm(one)),
        "seconds": seconds,
        "alone_seconds": alone,
        "allocated": allocated,
        "alone_allocated": alone_allocated,
    }


if __name__ == "__main__":
    main()
