"""What a GPU kernel's machine code says, without a GPU: registers, and instructions in its loop.

XLA dumps the kernel as PTX, `ptxas` assembles it, and `nvdisasm` prints the machine code (SASS). A
chunk is one turn of the longest loop; where there is no loop, the whole program is counted. Counts
are static: what a warp executes if it takes every branch. How long it waits is decided when it
runs, so that they are no time. But a multiprocessor begins at most four instructions a cycle, and
so a chunk of a program takes at least `issue` of its cycles, also where several programs share it.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from rwkv_jax.hardware import Gpu

KINDS = {
    "tensor": r"[A-Z]G?MMA|UTC\w*MMA",
    "float": r"F(ADD|MUL|FMA|SEL|SETP|SET|MNMX)\d?|H(ADD|MUL|FMA|SET|SETP|MNMX)2|F2FP?|F2I|I2FP?",
    "mufu": r"MUFU",
    "shared": r"LDSM?|STSM?|ATOMS",
    "shuffle": r"SHFL|REDUX",
    "local": r"LDL|STL",
    "global": r"LDG\w*|STG|LD|ST|ATOMG?|RED|UTMA\w+",
    "barriers": r"BAR|SYNCS",
    "other": r"\w+",
}
"""Instructions by kind; an instruction is of the first that its name matches."""


def counts(gpu: Gpu, folder: Path, kernel: str) -> dict:
    """Registers, bytes of spilled registers (stores) and of shared memory, how many programs fit on
    a multiprocessor, and the instructions a chunk, of a kernel that XLA or Mosaic GPU dumped."""
    entry = re.compile(rf"\.entry {kernel}(?:_mosaic_gpu_kernel)?\(")
    found = [x for x in folder.glob("*.ptx") if entry.search(x.read_text())]
    if len(found) != 1:
        raise ValueError(f"{len(found)} kernels {kernel} were dumped as PTX, not 1")
    code, resources = found[0].read_text(), found[0].with_suffix(".resources.txt")
    if resources.exists():  # Mosaic GPU's
        threads = int(re.findall(r"\.maxntid (\d+)", code)[0])
        shared = int(re.findall(r"smem_scratch_bytes=(\d+)", resources.read_text())[0])
        each = 128  # warpgroups have code of their own, all of it inside one loop's bounds
    else:
        threads, shared = launch(_only(folder, "*thunk_sequence.txt"), kernel)
        each = threads
    target = re.findall(r"\.target (\w+)", code)[0]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        report = run("ptxas", "-v", f"-arch={target}", str(found[0]), "-o", cubin.name).stderr
        names = loop(run("nvdisasm", "-c", cubin.name).stdout)
    if "C7511" in report:
        raise ValueError("ptxas serialises wgmma (C7511): every product waits for the one before")
    registers = int(re.findall(r"Used (\d+) registers", report)[0])
    return {
        "registers": registers,
        "spilled_bytes": int(re.findall(r"(\d+) bytes spill stores", report)[0]),
        "shared_bytes": shared,
        "threads": threads,
        "programs": programs(gpu, threads, registers, shared),
        "issue": len(names) * each // 128,
        "instructions": by_kind(names),
    }


def programs(gpu: Gpu, threads: int, registers: int, shared: int) -> int:
    """How many programs a multiprocessor runs at once."""
    a_warp = -(-registers * 32 // 256) * 256  # allocated in steps of 256
    most, blocks = (2048, 32) if gpu.minor == 0 else (1536, 24)
    return min(
        blocks,
        most // threads,
        65536 // (a_warp * threads // 32),
        gpu.core // (shared + 1024),  # the system takes 1 KiB of each
    )


def launch(thunks: str, kernel: str) -> tuple[int, int]:
    """Threads and bytes of shared memory of a kernel's programs."""
    found = re.search(rf" {kernel} grid: .* threads: \[(\d+), 1, 1\] +shared_memory: (\d+)", thunks)
    if not found:
        raise ValueError(f"XLA's list of launches has no {kernel}")
    return int(found[1]), int(found[2])


def loop(code: str) -> list[str]:
    """The names of the instructions of the longest loop in a disassembly, or if it has none of
    all."""
    names, labels, longest = [], {}, range(0)
    for line in code.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(names)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z]\w*)(.*)", line):
            names.append(found[1])
            back = re.search(r"\((\.L\w+)\)", found[2]) if found[1] == "BRA" else None
            if back and back[1] in labels:
                longest = max(longest, range(labels[back[1]], len(names)), key=len)
    if not names:
        raise ValueError(f"not a disassembly: {code[:80]!r}")
    # Every program ends with a branch to itself.
    return [names[i] for i in longest] if len(longest) > 1 else names


def by_kind(names: list[str]) -> dict[str, int]:
    found = Counter(
        next(kind for kind, form in KINDS.items() if re.fullmatch(form, name)) for name in names
    )
    return {kind: found[kind] for kind in KINDS}


def _only(folder: Path, pattern: str) -> str:
    (found,) = folder.glob(pattern)
    return found.read_text()


def run(tool: str, *arguments: str) -> subprocess.CompletedProcess:
    path = find(tool)
    if path is None:
        raise FileNotFoundError(
            f"no {tool}: install a CUDA toolkit, or nvidia-cuda-nvcc, "
            "nvidia-nvvm and nvidia-cuda-nvdisasm"
        )
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True)


def find(tool: str) -> str | None:
    """A program of NVIDIA's packages, on the path, or of a toolkit in its usual place."""
    packaged = [f"{folder}/nvidia/cu13/bin/{tool}" for folder in sys.path]
    places = [*packaged, shutil.which(tool), f"/usr/local/cuda/bin/{tool}"]
    return next((path for path in places if path and Path(path).exists()), None)
