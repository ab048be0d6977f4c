"""Programs compiled ahead of time, for accelerators that need not be present.

`compiled(target, cases)` compiles in a process of its own, because compilers may abort, and read
their flags at start. That process has the compilers write what they made of each kernel, and
answers with one row a kernel. Needs `pip install -e '.[aot]'`: libtpu, JAX's CUDA plugin and
`nvdisasm`; for GPUs also `ptxas`, from a toolkit or `pip install nvidia-cuda-nvcc nvidia-nvvm`.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import sass, vliw
from benchmarks.harness import ROOT
from rwkv_jax.hardware import GPUS

TARGETS = [*vliw.TPUS, *GPUS]
BOUND = -0.7
"""Below all log decays of version 7: as models do, it is promised, so that the kernel is alone."""
MOSAIC_GPU = "mosaic_gpu"
"""Version 7's implementation for Hopper GPUs, from JAX 0.11 on."""
DUMPS = "KERNELS_DUMPS"
"""The environment variable that names the folder where the compilers write."""


class Case(NamedTuple):
    """A program: the gradient of an operator, or its step where there is one token."""

    implementation: str
    version: str
    dtype: str = "bfloat16"
    batch: int = 2
    tokens: int = 1024
    heads: int = 32
    size: int = 64
    resets: bool = False
    level: str = "UNKNOWN"  # `jax_optimization_level`, JAX's default


class Call(NamedTuple):
    """A kernel's `pl.pallas_call`: its grid, how many programs of it are independent of each other,
    and the bytes of what it reads and writes, each once."""

    grid: tuple[int, ...]
    independent: int
    bytes: int


def compiled(target: str, cases: list[Case], checkout: Path = ROOT) -> Iterator[dict]:
    """A row for each kernel of each case; it has `error` if that failed. `checkout` is the one
    whose kernels are compiled."""
    with tempfile.TemporaryDirectory() as folder:
        flags = (
            f"to={folder}",
            "llo_text=true",
            "llo_pass_label_regex=.*(final|post-ra).*",  # those of other passes take time
        )
        dumps = {DUMPS: folder, "LIBTPU_INIT_ARGS": " ".join(f"--xla_jf_dump_{x}" for x in flags)}
        if target in GPUS:
            # Dump PTX only: the other emitters' dumps take a minute a kernel.
            dumps["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_dump_emitter_re=ptx"
            dumps["MOSAIC_GPU_DUMP_TO"] = folder
        yield from _asked({"target": target, "cases": cases}, dumps, checkout)


def compiled_on_meshes(target: str) -> Iterator[dict]:
    """A row for each program on a mesh, for TPUs."""
    return _asked({"target": target}, {}, ROOT)


def _asked(request: dict, environment: dict[str, str], checkout: Path) -> Iterator[dict]:
    """The rows of a process that runs `answer`."""
    # The checkout's package, with these benchmarks.
    start = f"import sys; sys.path.insert(0, {str(checkout)!r}); import rwkv_jax; del sys.path[0]"
    run = subprocess.run(
        [sys.executable, "-c", f"{start}; from benchmarks import aot; aot.answer()"],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-8",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            **environment,
        },
        cwd=ROOT,
        input=json.dumps(request),
        capture_output=True,
        text=True,
    )
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    if run.returncode:
        message = (run.stderr.strip().splitlines() or ["no message"])[-1]
        rows.append({"kernel": "all", "error": message})
    yield from ({"target": request["target"], **row} for row in rows)


def answer() -> None:
    """The process: a request in, rows out."""
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    request = json.load(sys.stdin)
    target = request["target"]
    if target in vliw.TPUS:
        options: dict[str, Any] = {"chip_config_name": "megacore"} if target == "v4" else {}
        platform, options["topology_name"] = "tpu", vliw.TPUS[target].topology
    else:
        platform = "cuda"
        options = {"target_config": GPUS[target].target_config(), "topology": "1x1x1"}
    devices = topologies.get_topology_desc(platform=platform, **options).devices
    mesh = Mesh(np.array(devices[:1]), ("x",))
    if "cases" in request:
        rows = (row for case in request["cases"] for row in kernels(target, mesh, Case(*case)))
    else:
        rows = on_meshes(devices)
    for row in rows:
        print(json.dumps(row), flush=True)


def kernels(target: str, mesh: Any, case: Case) -> Iterator[dict]:
    """A row for each kernel of a case."""
    import jax

    folder = Path(os.environ[DUMPS])
    for path in folder.iterdir():  # of the case before
        path.unlink()
    wanted = {f"wkv{case.version}_{name}" for name in ("forward", "backward")}
    if case.tokens == 1:
        wanted = {f"wkv{case.version}_step"}
    jax.config.update("jax_optimization_level", case.level)
    jax.clear_caches()  # the level is no part of how kernels were traced
    start = time.process_time()
    try:
        calls, program = compile_for(mesh, *program_of(mesh, case))
        seconds = time.process_time() - start
        if case.implementation == MOSAIC_GPU:
            calls = dict.fromkeys(wanted)  # it has no `pallas_call` of its own
        if set(calls) != wanted:
            raise ValueError(f"kernels in the program: {sorted(calls)}, not {sorted(wanted)}")
        for kernel, call in sorted(calls.items(), reverse=True):  # forward first
            if target in vliw.TPUS:
                units = case.batch * case.tokens * case.heads  # tokens of a head
                tpu = vliw.TPUS[target]
                found = vliw.counts(tpu, folder, kernel, units, call)
                found["vmem_bytes"] = vliw.vmem(program.as_text(), kernel)
            else:
                found = sass.counts(GPUS[target], folder, kernel)
            yield {"kernel": kernel, **case._asdict(), "seconds": round(seconds, 1), **found}
    except Exception as error:
        yield {"kernel": f"wkv{case.version}", **case._asdict(), "error": summary(error)}


def summary(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def program_of(mesh: Any, case: Case) -> tuple[Callable, tuple]:
    """A case's function, and its arguments' shapes."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from rwkv_jax import wkv

    operator = getattr(wkv, f"wkv{case.version}")
    operator = partial(operator, implementation=case.implementation)
    if case.version == "7":
        operator = partial(operator, log_w_min=BOUND)

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    _, version, dtype, b, t, h, n, resets, _ = case
    shape = (b, t, h * n) if version == "4" else (b, t, h, n)
    letters = {"4": "kv", "6": "rkv", "7": "rkvab"}[version]
    x = {letter: array(shape, dtype) for letter in letters}
    x["log_w"] = array(shape[2:] if version == "4" else shape, "float32")
    if version != "7":
        x["u"] = array(shape[2:], "float32")
    reset = array((b, t), "bool") if resets else None

    def step(x, state):
        return operator(**x, state=state)

    def gradient(x, dy, reset):
        y, pull_back = jax.vjp(lambda x: operator(**x, reset=reset)[0], x)
        return y, pull_back(dy)

    if t == 1:
        return step, (x, array((b, h, n, n), "float32"))
    return gradient, (x, x["v"], reset)


def compile_for(mesh: Any, function: Callable, arguments: tuple) -> tuple[dict[str, Call], Any]:
    """The kernels of a function by name, and its program for the mesh's devices."""
    import jax

    (platform,) = {device.platform for device in mesh.devices.flat}
    platform = "cuda" if platform == "gpu" else platform
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(function).trace(*arguments)
        return dict(calls(traced.jaxpr)), traced.lower(lowering_platforms=(platform,)).compile()


def calls(jaxpr: Any) -> Iterator[tuple[str, Call]]:
    """The kernels in a jaxpr and those within, without those interpreted for CPUs."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "pallas_call" and not eqn.params["interpret"]:
            grid = eqn.params["grid_mapping"].grid
            order = getattr(eqn.params["compiler_params"], "dimension_semantics", grid)
            free = math.prod(n for n, of in zip(grid, order, strict=True) if of == "parallel")
            moved = sum(x.aval.size * x.aval.dtype.itemsize for x in [*eqn.invars, *eqn.outvars])
            yield str(eqn.params["name"]), Call(grid, free, moved)
            continue
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from calls(inner)


def on_meshes(devices: Any) -> Iterator[dict]:
    """A row for each axis type of a mesh of four TPUs. Over explicit axes each chip has a kernel
    for its rows and heads. XLA cannot partition a kernel over automatic ones: its own form compiles
    there."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from rwkv_jax.wkv import wkv7

    def gradient(x, reset):
        y, pull_back = jax.vjp(lambda x: wkv7(**x, log_w_min=BOUND, reset=reset)[0], x)
        return y, pull_back(y)

    for kind, expected in ((AxisType.Explicit, 2), (AxisType.Auto, 0)):
        chips = np.resize(np.array(devices), (2, 2))
        mesh = Mesh(chips, ("data", "tensor"), axis_types=(kind,) * 2)

        def array(shape, dtype, *spec, mesh=mesh):
            sharding = NamedSharding(mesh, PartitionSpec(*spec))
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        x = {
            name: array((4, 1024, 6, 64), dtype, "data", None, "tensor")
            for name, dtype in [("log_w", "float32"), *((letter, "bfloat16") for letter in "rkvab")]
        }
        row = {"kernel": "wkv7", "mesh": kind.name.lower()}
        start = time.process_time()
        try:
            _, program = compile_for(mesh, gradient, (x, array((4, 1024), "bool", "data")))
            count = program.as_text().count('custom_call_target="tpu_custom_call"')
            if count != expected:
                raise ValueError(f"{count} kernels in the program, not {expected}")
            yield {**row, "seconds": round(time.process_time() - start, 1)}
        except Exception as error:
            yield {**row, "error": summary(error)}
