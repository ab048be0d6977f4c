"""Memory needed to convert and to load a large file of weights.

    python -m benchmarks.weights [--layers 12] [--folder runs/weights]

The file is a version 7 of width 4096 in bfloat16, 6 GB at 12 layers; the folder needs room for two
of them. Each job runs in its own process, whose anonymous memory is read from /proc every few
milliseconds: pages of the mapped file do not count, as the kernel can drop them. Linux only.
"""

import argparse
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks import harness
from benchmarks.worker import versions
from rwkv_jax.checkpoint import keymaps, weights
from rwkv_jax.checkpoint.files import Deferred
from rwkv_jax.config import ModelConfig

GIB = 2**30
LOAD = """
import os, sys
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={sys.argv[2]}"
import jax, rwkv_jax
from rwkv_jax import models
from rwkv_jax.checkpoint import keymaps, weights
cfg = keymaps.check(weights.read(sys.argv[1]).tensors)
devices = jax.sharding.Mesh(jax.devices(), ("fsdp",))
def place(x):
    axis = next((i for i, n in enumerate(x.shape) if i and n % len(jax.devices()) == 0), None)
    spec = ["fsdp" if i == axis else None for i in range(len(x.shape))]
    return jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec(*spec))
places = jax.tree.map(place, models.abstract_params(cfg)) if sys.argv[2] != "1" else None
jax.block_until_ready(rwkv_jax.load(sys.argv[1], sharding=places))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--folder", type=Path, default=Path("runs/weights"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    source, target = args.folder / "large.pth", args.folder / "converted.safetensors"
    cfg = ModelConfig(version="7", layers=args.layers, width=4096, vocab_size=65536)
    shapes = keymaps.expected(cfg)
    weights.write(source, {name: noise(shape) for name, shape in shapes.items()})
    convert = ["-m", "rwkv_jax", "convert", source, target, "--overwrite"]
    jobs = {
        "convert": convert,
        "convert --dtype float16": [*convert, "--dtype", "float16"],
        "load on one device": ["-c", LOAD, source, "1"],
        "load over 8 virtual devices": ["-c", LOAD, source, "8"],
    }
    rows = {
        name: harness.run_alone([sys.executable, *map(str, job)])["anonymous"] / GIB
        for name, job in jobs.items()
    }
    size = source.stat().st_size / GIB
    source.unlink()
    target.unlink()
    largest = max(2 * np.prod(shape) for shape in shapes.values()) / GIB
    harness.table(
        f"A file of {size:.2f} GiB, largest tensor {largest:.2f} GiB: peak anonymous memory, GiB",
        ["", "peak", "beyond the parameters"],
        [
            [name, f"{peak:.2f}", f"{peak - size:.2f}" if name.startswith("load") else ""]
            for name, peak in rows.items()
        ],
    )
    result = {"file_gib": size, "largest_tensor_gib": largest, "peak_anonymous_gib": rows}
    harness.report("weights", result | {"versions": {"ours": versions("jax", "jaxlib", "numpy")}})


def noise(shape: tuple[int, ...]) -> Deferred:
    """A tensor of random finite numbers, computed when it is written."""

    def make() -> np.ndarray:
        bits = np.random.default_rng(0).integers(0, 2**14, size=shape, dtype=np.uint16)
        return bits.view(ml_dtypes.bfloat16)

    return Deferred(shape, ml_dtypes.bfloat16, make)


if __name__ == "__main__":
    main()
