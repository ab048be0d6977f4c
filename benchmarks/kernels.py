"""The kernels compiled ahead of time for accelerators that need not be there: do they, with what.

    python -m benchmarks.kernels [--target v5e H100 ...] [--quick]

Of every kernel, forward and backward: registers, bytes spilled and shared memory (CUDA, as `ptxas`
says), or VMEM (TPU, as XLA reserves). Compilers, not devices: nothing runs. Each target has a
process of its own. Needs `pip install -e '.[aot]'` (libtpu; JAX's CUDA plugin), and for CUDA a
`ptxas`, of a toolkit or of `pip install nvidia-cuda-nvcc nvidia-nvvm`.
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
from pathlib import Path

from rwkv_jax.hardware import GPUS, configuration

TPUS = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
TARGETS = [*TPUS, *GPUS]
SHAPE = {"batch": 2, "tokens": 1024, "heads": 4, "size": 64}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=TARGETS)
    parser.add_argument("--quick", action="store_true", help="bfloat16 with resets only")
    parser.add_argument("--here", choices=TARGETS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        for row in compiled(args.here, args.quick):
            print(json.dumps(row), flush=True)
        return

    from benchmarks import harness

    rows = [row for target in args.target for row in in_a_process(target, args.quick)]
    columns = ["target", "kernel", "inputs", "compiled in", "registers", "spilled", "on chip"]
    harness.table("Kernels, compiled ahead of time", columns, [cells(row) for row in rows])
    if args.target == TARGETS and not args.quick:
        found = {"ours": harness_versions()}
        harness.report("kernels", {"shape": SHAPE, "versions": found, "rows": rows})
    failed = [row for row in rows if "error" in row]
    for row in failed:
        harness.console.print(
            f"\n{row['target']}, {row['kernel']}, {row['inputs']}: {row['error']}"
        )
    sys.exit(bool(failed))


def harness_versions() -> dict:
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


def in_a_process(target: str, quick: bool) -> list[dict]:
    """The rows of a target: a compiler's abort ends no other, and flags are read at start."""
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
            # Of what emitters write, PTX alone: the rest takes a minute a kernel.
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


def compiled(target: str, quick: bool):
    """A row for each kernel of each program: a version's gradient, by type, with resets or not."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from rwkv_jax.wkv import wkv4, wkv6, wkv7

    if target in TPUS:
        options = {"chip_config_name": "megacore"} if target == "v4" else {}
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=TPUS[target], **options
        )
    else:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=configuration(*GPUS[target]), topology="1x1x1"
        )
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    platform, name = ("tpu", "pallas_tpu") if target in TPUS else ("cuda", "pallas_gpu")

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    b, t, h, n = SHAPE.values()
    letters = {"4": "kv", "6": "rkv", "7": "rkvab"}
    operators = {"4": wkv4, "6": wkv6, "7": wkv7}
    for version, operator in operators.items():
        for dtype in ("bfloat16",) if quick else ("bfloat16", "float32"):
            for resets in (True,) if quick else (False, True):
                shape = (b, t, h * n) if version == "4" else (b, t, h, n)
                x = {letter: array(shape, dtype) for letter in letters[version]}
                x["log_w"] = array(shape[2:] if version == "4" else shape, "float32")
                if version != "7":
                    x["u"] = array(shape[2:], "float32")
                reset = array((b, t), "bool") if resets else None

                def both(x, dy, reset, operator=operator):
                    def run(x):
                        return operator(**x, reset=reset, implementation=name)[0]

                    y, pull_back = jax.vjp(run, x)
                    return y, pull_back(dy)

                inputs = f"{dtype}{', resets' if resets else ''}"
                head = {"target": target, "inputs": inputs}
                began = time.time()
                try:
                    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                        lowered = jax.jit(both).trace(x, x["v"], reset)
                        program = lowered.lower(lowering_platforms=(platform,)).compile()
                except Exception as error:
                    message = " ".join(str(error).split())[:300]
                    yield {**head, "kernel": f"wkv{version}", "error": message}
                    continue
                seconds = {"seconds": time.time() - began}
                found = vmem(program) if target in TPUS else ptx(began)
                wanted = {f"wkv{version}_forward", f"wkv{version}_backward"}
                if set(found) != wanted:
                    message = f"kernels in the program: {sorted(found)}, not {sorted(wanted)}"
                    yield {**head, "kernel": f"wkv{version}", "error": message}
                    continue
                for kernel, numbers in found.items():
                    yield {**head, "kernel": kernel, **seconds, **numbers}
    if target in TPUS:
        yield from over_chips(target, topology.devices)


def over_chips(target: str, devices):
    """A row for each kind of mesh of four chips: rows and heads over explicit axes have kernels of
    their own; over automatic ones, which XLA cannot part kernels for, its own form compiles."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from rwkv_jax.wkv import wkv7

    b, t, h, n = 4, SHAPE["tokens"], 6, SHAPE["size"]
    for kind, count in ((AxisType.Explicit, 2), (AxisType.Auto, 0)):
        chips = np.resize(np.array(devices), (2, 2))
        mesh = Mesh(chips, ("data", "tensor"), axis_types=(kind,) * 2)
        parted = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
        x = {
            name: jax.ShapeDtypeStruct((b, t, h, n), dtype, sharding=parted)
            for name, dtype in [("log_w", "float32"), *((letter, "bfloat16") for letter in "rkvab")]
        }

        def both(x):
            y, pull_back = jax.vjp(lambda x: wkv7(**x)[0], x)
            return y, pull_back(y)

        row = {"target": target, "kernel": "wkv7", "inputs": f"4 chips, {kind.name.lower()} axes"}
        began = time.time()
        try:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                traced = jax.jit(both).trace(x)
                program = traced.lower(lowering_platforms=("tpu",)).compile()
        except Exception as error:
            yield {**row, "error": " ".join(str(error).split())[:300]}
            continue
        found = program.as_text().count('custom_call_target="tpu_custom_call"')
        if found == count:
            yield {**row, "seconds": time.time() - began}
        else:
            yield {**row, "error": f"{found} kernels in the program, not {count}"}


def vmem(program) -> dict[str, dict]:
    """VMEM that each kernel of a TPU program reserves."""
    found = {}
    for line in program.as_text().splitlines():
        if 'custom_call_target="tpu_custom_call"' not in line:
            continue
        kernel = re.search(r"wkv\d_(forward|backward)", line)
        sizes = re.findall(r'"used_scoped_memory_configs":\[\{[^]]*?"size":"(\d+)"', line)
        if kernel:
            found[kernel[0]] = {"vmem_bytes": int(sizes[0])} if sizes else {}
    return found


def ptx(since: float) -> dict[str, dict]:
    """What `ptxas` and XLA say of each kernel that was written to the dump since then."""
    assembler = find_ptxas()
    found = {}
    for path in glob.glob(os.environ["KERNELS_DUMP"] + "/*.ptx"):
        text = Path(path).read_text()
        target = re.search(r"\.target (\w+)", text)
        entry = re.search(r"\.entry (wkv\d_(?:forward|backward))", text)
        if os.path.getmtime(path) < since or not target or not entry:
            continue
        command = [assembler, "-v", f"-arch={target[1]}", path, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        found[entry[1]] = {
            "registers": int(re.findall(r"Used (\d+) registers", said)[0]),
            "spilled_bytes": int(re.findall(r"(\d+) bytes spill stores", said)[0]),
        }
    for path in glob.glob(os.environ["KERNELS_DUMP"] + "/*thunk_sequence.txt"):
        for line in Path(path).read_text().splitlines():
            kernel = re.search(r"(wkv\d_(?:forward|backward)) .*shared_memory: (\d+)", line)
            if kernel and os.path.getmtime(path) >= since and kernel[1] in found:
                found[kernel[1]]["shared_bytes"] = int(kernel[2])
    return found


def find_ptxas() -> str:
    """The assembler of the NVIDIA package, of the path, or of a toolkit in its usual place."""
    packaged = [f"{folder}/nvidia/cu13/bin/ptxas" for folder in sys.path]
    for path in [*packaged, shutil.which("ptxas"), "/usr/local/cuda/bin/ptxas"]:
        if path and Path(path).exists():
            return path
    raise SystemExit("no ptxas: install a CUDA toolkit, or nvidia-cuda-nvcc and nvidia-nvvm")


if __name__ == "__main__":
    main()
