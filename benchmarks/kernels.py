"""Compile the kernels ahead of time, for accelerators that need not be present.

    python -m benchmarks.kernels [--target v5e H100 ...] [--quick]

Prints for every kernel, forward and backward, its registers, spilled bytes and shared memory (CUDA,
from `ptxas`), or the VMEM that XLA reserves (TPU). Nothing runs. Each target is compiled in its own
process. Needs `pip install -e '.[aot]'` (libtpu; JAX's CUDA plugin), and for CUDA `ptxas`, from a
toolkit or from `pip install nvidia-cuda-nvcc nvidia-nvvm`.
"""

import argparse
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from rwkv_jax.hardware import GPUS

TPUS = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
TARGETS = [*TPUS, *GPUS]
SHAPE = {"batch": 2, "tokens": 1024, "heads": 4, "size": 64}
BOUND = -0.7
"""Below all log decays of version 7: as models do, it is promised, so that the kernel is alone."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=TARGETS)
    parser.add_argument("--quick", action="store_true", help="bfloat16 with resets only")
    parser.add_argument("--here", choices=TARGETS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        for row in compile_target(args.here, args.quick):
            print(json.dumps(row), flush=True)
        return

    from benchmarks import harness

    rows = [row for target in args.target for row in compile_in_subprocess(target, args.quick)]
    columns = ["target", "kernel", "inputs", "compiled in", "registers", "spilled", "on chip"]
    harness.table("Kernels, compiled ahead of time", columns, [cells(row) for row in rows])
    if args.target == TARGETS and not args.quick:
        versions = {"ours": compiler_versions()}
        harness.report("kernels", {"shape": SHAPE, "versions": versions, "rows": rows})
    failed = [row for row in rows if "error" in row]
    for row in failed:
        harness.console.print(
            f"\n{row['target']}, {row['kernel']}, {row['inputs']}: {row['error']}"
        )
    sys.exit(bool(failed))


def compiler_versions() -> dict:
    from importlib.metadata import PackageNotFoundError, version

    from benchmarks.worker import versions

    found = versions("jax", "jaxlib")
    for name in ("libtpu", "jax-cuda13-plugin"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def cells(row: dict) -> list[str]:
    seconds = f"{row['seconds']:.1f} s" if "seconds" in row else "failed"
    size = row.get("shared_bytes", row.get("vmem_bytes"))
    return [
        row["target"],
        row["kernel"],
        row["inputs"],
        seconds,
        str(row.get("registers", "")),
        f"{row['spilled_bytes']:,} B" if "spilled_bytes" in row else "",
        "" if size is None else f"{size / 1024:,.0f} KiB",
    ]


def compile_in_subprocess(target: str, quick: bool) -> list[dict]:
    """The rows of a target. In its own process, because compilers may abort, and read their flags
    at start."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-8",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "KERNELS_DUMP": folder,
        }
        if target in GPUS:
            # Dump PTX only: the other emitters' dumps take a minute a kernel.
            environment["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_dump_emitter_re=ptx"
        command = [sys.executable, "-m", "benchmarks.kernels", "--here", target]
        run = subprocess.run(
            command + ["--quick"] * quick, env=environment, capture_output=True, text=True
        )
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    if run.returncode:
        message = (run.stderr.strip().splitlines() or ["no message"])[-1]
        row = {"target": target, "kernel": "all", "inputs": "", "error": message}
        rows.append(row)
    return rows


def compile_target(target: str, quick: bool) -> Iterator[dict]:
    """A row for each kernel of each program; a program is the gradient of an operator, for each
    version and dtype, with and without resets."""
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    if target in TPUS:
        options = {"chip_config_name": "megacore"} if target == "v4" else {}
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=TPUS[target], **options
        )
    else:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=GPUS[target].target_config(), topology="1x1x1"
        )
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))
    for version in "467":
        for dtype in ("bfloat16",) if quick else ("bfloat16", "float32"):
            for resets in (True,) if quick else (False, True):
                yield from compile_gradient(target, mesh, version, dtype, resets)
    if target in TPUS:
        yield from compile_on_meshes(target, topology.devices)


def compile_gradient(target: str, mesh, version: str, dtype: str, resets: bool) -> Iterator[dict]:
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from rwkv_jax import wkv

    operator = getattr(wkv, f"wkv{version}")
    if version == "7":
        operator = partial(operator, log_w_min=BOUND)
    platform, name = ("tpu", "pallas_tpu") if target in TPUS else ("cuda", "pallas_gpu")

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    b, t, h, n = SHAPE.values()
    shape = (b, t, h * n) if version == "4" else (b, t, h, n)
    letters = {"4": "kv", "6": "rkv", "7": "rkvab"}[version]
    x = {letter: array(shape, dtype) for letter in letters}
    x["log_w"] = array(shape[2:] if version == "4" else shape, "float32")
    if version != "7":
        x["u"] = array(shape[2:], "float32")
    reset = array((b, t), "bool") if resets else None

    def gradient(x, dy, reset):
        y, pull_back = jax.vjp(lambda x: operator(**x, reset=reset, implementation=name)[0], x)
        return y, pull_back(dy)

    row = {"target": target, "inputs": f"{dtype}{', resets' if resets else ''}"}
    start = time.time()
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            traced = jax.jit(gradient).trace(x, x["v"], reset)
            program = traced.lower(lowering_platforms=(platform,)).compile()
    except Exception as error:
        yield {**row, "kernel": f"wkv{version}", "error": " ".join(str(error).split())[:300]}
        return
    seconds = time.time() - start
    found = vmem(program) if target in TPUS else registers(start)
    expected = {f"wkv{version}_forward", f"wkv{version}_backward"}
    if set(found) != expected:
        message = f"kernels in the program: {sorted(found)}, not {sorted(expected)}"
        yield {**row, "kernel": f"wkv{version}", "error": message}
        return
    for kernel, numbers in found.items():
        yield {**row, "kernel": kernel, "seconds": seconds, **numbers}


def compile_on_meshes(target: str, devices) -> Iterator[dict]:
    """A row for each axis type of a mesh of four chips. Over explicit axes each chip has a kernel
    for its rows and heads. XLA cannot partition a kernel over automatic ones: its own form compiles
    there."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from rwkv_jax.wkv import wkv7

    b, t, h, n = 4, SHAPE["tokens"], 6, SHAPE["size"]
    for kind, expected in ((AxisType.Explicit, 2), (AxisType.Auto, 0)):
        chips = np.resize(np.array(devices), (2, 2))
        mesh = Mesh(chips, ("data", "tensor"), axis_types=(kind,) * 2)
        sharding = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
        x = {
            name: jax.ShapeDtypeStruct((b, t, h, n), dtype, sharding=sharding)
            for name, dtype in [("log_w", "float32"), *((letter, "bfloat16") for letter in "rkvab")]
        }

        def gradient(x):
            y, pull_back = jax.vjp(lambda x: wkv7(**x, log_w_min=BOUND)[0], x)
            return y, pull_back(y)

        row = {"target": target, "kernel": "wkv7", "inputs": f"4 chips, {kind.name.lower()} axes"}
        start = time.time()
        try:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                traced = jax.jit(gradient).trace(x)
                program = traced.lower(lowering_platforms=("tpu",)).compile()
        except Exception as error:
            yield {**row, "error": " ".join(str(error).split())[:300]}
            continue
        count = program.as_text().count('custom_call_target="tpu_custom_call"')
        if count == expected:
            yield {**row, "seconds": time.time() - start}
        else:
            yield {**row, "error": f"{count} kernels in the program, not {expected}"}


def vmem(program) -> dict[str, dict]:
    """The VMEM that each kernel of a TPU program reserves."""
    found = {}
    for line in program.as_text().splitlines():
        if 'custom_call_target="tpu_custom_call"' not in line:
            continue
        kernel = re.search(r"wkv\d_(forward|backward)", line)
        sizes = re.findall(r'"used_scoped_memory_configs":\[\{[^]]*?"size":"(\d+)"', line)
        if kernel:
            found[kernel[0]] = {"vmem_bytes": int(sizes[0])} if sizes else {}
    return found


def registers(since: float) -> dict[str, dict]:
    """Registers, spilled bytes and shared memory of each kernel dumped since then, from `ptxas` and
    XLA."""
    assembler = find_ptxas()
    found = {}
    for path in glob.glob(os.environ["KERNELS_DUMP"] + "/*.ptx"):
        text = Path(path).read_text()
        target = re.search(r"\.target (\w+)", text)
        entry = re.search(r"\.entry (wkv\d_(?:forward|backward))", text)
        if os.path.getmtime(path) < since or not target or not entry:
            continue
        command = [assembler, "-v", f"-arch={target[1]}", path, "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        found[entry[1]] = {
            "registers": int(re.findall(r"Used (\d+) registers", report)[0]),
            "spilled_bytes": int(re.findall(r"(\d+) bytes spill stores", report)[0]),
        }
    for path in glob.glob(os.environ["KERNELS_DUMP"] + "/*thunk_sequence.txt"):
        for line in Path(path).read_text().splitlines():
            kernel = re.search(r"(wkv\d_(?:forward|backward)) .*shared_memory: (\d+)", line)
            if kernel and os.path.getmtime(path) >= since and kernel[1] in found:
                found[kernel[1]]["shared_bytes"] = int(kernel[2])
    return found


def find_ptxas() -> str:
    """`ptxas` of the NVIDIA package, on the path, or of a toolkit in its usual place."""
    packaged = [f"{folder}/nvidia/cu13/bin/ptxas" for folder in sys.path]
    for path in [*packaged, shutil.which("ptxas"), "/usr/local/cuda/bin/ptxas"]:
        if path and Path(path).exists():
            return path
    raise SystemExit("no ptxas: install a CUDA toolkit, or nvidia-cuda-nvcc and nvidia-nvvm")


if __name__ == "__main__":
    main()
