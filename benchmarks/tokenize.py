"""The `tokenize` command beside PyPI's tokenizers of the World vocabulary, which use no files.

    python -m benchmarks.tokenize [--megabytes 200] [--peer-python PATH] [--rounds 3]

The text is Python source and documentation of this machine, as JSON lines; it is written once. The
command is timed from start to end, as by a user: it reads, parses, encodes, and writes the pair to
disk. The peers encode the same texts from memory in batches of 4 MB, and keep nothing; the Python
one of `rwkv` gets only the first 4 MB. All count the same tokens. Core seconds are the CPU time of
the processes as reported by the kernel.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import sysconfig
import time
from functools import partial
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Worker, console, shown, spread
from benchmarks.worker import versions

ROOTS = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "/usr/share/doc")
KINDS = ("", ".c", ".h", ".html", ".md", ".py", ".pyi", ".rst", ".txt")
PEERS = {
    "pyrwkv-tokenizer, batches": ("pyrwkv-tokenizer", False),
    "pyrwkv-tokenizer, one by one": ("pyrwkv-tokenizer", True),
    "rwkv-tokenizer, one by one": ("rwkv-tokenizer", True),
    "rwkv (Python)": ("rwkv", True),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--peer-python", default=sys.executable, help="has the peers' packages")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/tokenize"))
    args = parser.parse_args()
    text = args.folder / f"text{args.megabytes}.jsonl"
    size = write_text(text, args.megabytes * 10**6)
    cores = harness.device()["cores"]
    base = {"threads": cores, "text": str(text.resolve())}
    makers = {
        name: partial(
            Worker,
            "tokenize_peer.py",
            {
                **base,
                "package": package,
                "one_by_one": one_by_one,
                "bytes": 4 * 10**6 if package == "rwkv" else size,
            },
            python=args.peer_python,
            env={"TOKENIZERS_PARALLELISM": None},
        )
        for name, (package, one_by_one) in PEERS.items()
    }
    peers = harness.start_all(makers)
    ours = {f"tokenize --workers {n}": n for n in sorted({1, cores})}
    answers: dict[str, list[dict]] = {name: [] for name in (*ours, *peers)}
    for index in range(args.rounds):
        console.print(f"[dim]round {index + 1} of {args.rounds}[/]")
        names = list(answers)
        random.Random(index).shuffle(names)
        for name in names:
            answer = command(text, args.folder, ours[name]) if name in ours else peers[name].ask({})
            answers[name].append(answer)
    rates = {
        name: [a["bytes"] / 1e6 / a["seconds"] for a in some] for name, some in answers.items()
    }
    busy = {
        name: [a["bytes"] / 1e6 / a["core_seconds"] for a in some] for name, some in answers.items()
    }
    first = rates[f"tokenize --workers {cores}"]
    whole = {a["tokens"] for name, some in answers.items() for a in some if a["bytes"] == size}
    harness.table(
        f"{size / 1e6:,.0f} MB of text, {' or '.join(f'{n:,}' for n in whole)} tokens",
        ["", "MB/s", "MB a core-second", "of its MB/s, the command's"],
        [
            [
                name,
                shown(some, 1),
                shown(busy[name], 1),
                shown([a / b for a, b in zip(first, some, strict=True)], 2),
            ]
            for name, some in rates.items()
        ],
    )
    found = {"ours": versions("rwkv_jax", "pyrwkv-tokenizer", "numpy")}
    found |= {name: peer.about["versions"] for name, peer in peers.items()}
    for peer in peers.values():
        peer.close()
    result = {
        "text_bytes": size,
        "tokens": sorted(whole),
        "mb_per_s": {name: spread(some) for name, some in rates.items()},
        "mb_per_core_second": {name: spread(some) for name, some in busy.items()},
        "rounds": rates,
        "versions": found,
    }
    harness.report("tokenize", result)


def write_text(path: Path, size: int) -> int:
    """Writes texts of this machine as JSON lines, about `size` bytes; returns the exact number."""
    texts, held = set(), 0
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".partial").open("w", encoding="utf-8") as file:
            for source in (x for root in ROOTS for x in sorted(Path(root).rglob("*"))):
                if held >= size:
                    break
                if source.suffix not in KINDS or source.is_symlink() or not source.is_file():
                    continue
                try:
                    text = source.read_bytes().decode()
                except (OSError, UnicodeDecodeError):
                    continue
                if text and "\0" not in text and len(text) < 2_000_000 and hash(text) not in texts:
                    texts.add(hash(text))
                    held += len(text.encode())
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        path.with_suffix(".partial").rename(path)
    with path.open(encoding="utf-8") as lines:
        return sum(len(json.loads(line)["text"].encode()) for line in lines)


def command(text: Path, folder: Path, workers: int) -> dict:
    """Runs the command; its times and the counts it reports."""
    out = folder / "out"
    line = [sys.executable, "-m", "rwkv_jax", "tokenize", text, "-o", out, "--overwrite"]
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [*map(str, line), "--workers", str(workers)], check=True, stdout=subprocess.DEVNULL
    )
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    made = json.loads(out.with_name("out.json").read_text())
    # Peers do not count the end-of-document ids.
    tokens = made["tokens"] - made["documents"]
    return {
        "seconds": seconds,
        "core_seconds": busy,
        "bytes": made["bytes"],
        "tokens": tokens,
    }


if __name__ == "__main__":
    main()
