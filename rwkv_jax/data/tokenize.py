"""Text of any size tokenised into one binidx pair, by every core, over as many starts as it takes.

The text is cut into units of some 32 MB, by the names and sizes of its files alone. Each worker
reads, tokenises and writes a unit by itself, `OUT.parts/00012.bin` and `.idx`; the last of its
files to appear, `.json`, says that the part is whole. A command that was stopped goes on with the
parts that are there; when there are all, they are merged in their order. So the bytes of the result
depend on the text alone.

Workers are processes of one thread each: of a unit's 2.4 s half goes into parsing JSON lines and
into making lists and arrays of ids, which hold the interpreter's lock that threads of one process
share.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_jax.config import DataConfig
from rwkv_jax.data.binidx import BinidxWriter, dtype_for, files_of, merge, open_binidx
from rwkv_jax.data.corpus import Corpus, fault_of
from rwkv_jax.data.files import CorpusError, SourceFile, find_files, longest_document
from rwkv_jax.data.prepare import pieces_for
from rwkv_jax.data.tables import group_sizes
from rwkv_jax.data.tokenizers import Tokenizer, open_tokenizer
from rwkv_jax.errors import UserError, within_memory
from rwkv_jax.interrupts import blocked_interrupts, deferred_interrupts

FORMAT = 1
UNIT = 32 << 20
STEP = 1 << 20
"""Bytes between two reports of a worker."""
PATIENCE_S = 0.2
"""Seconds of waiting for workers after which Ctrl-C is looked for."""

Progress = Callable[[int, int], None]
"""Told the bytes on disk that are done, and all."""


@dataclass(frozen=True)
class Counts:
    """What a part holds, or all of them."""

    documents: int = 0
    bytes: int = 0
    """UTF-8 bytes of the documents."""
    tokens: int = 0
    """With one after each document."""
    skipped: int = 0
    """Files of folders that are not readable UTF-8 text."""

    def __add__(self, other: "Counts") -> "Counts":
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return Counts(*(a + b for a, b in pairs))


@dataclass(frozen=True)
class Unit:
    """What a worker does at a time."""

    cfg: DataConfig
    files: tuple[SourceFile, ...]
    size: int
    """Bytes on disk."""


@dataclass(frozen=True)
class _Job:
    unit: Unit
    path: Path
    """Of its part."""


@dataclass(frozen=True)
class Result:
    """A finished pair."""

    path: Path
    """Without `.bin` and `.idx`."""
    counts: Counts
    new_bytes: int
    """Of the text, those that this call tokenised and found no finished part of."""


def tokenize(
    sources: Sequence[str],
    out: str | Path,
    *,
    tokenizer: str = "world",
    field: str = "text",
    document: str = "file",
    template: str = "g1",
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Result:
    """The documents of the sources as a pair, each followed by the end-of-document id, with a
    description beside it, `OUT.json`.

    Without `workers` there is one for each core. Notices go to stderr. Raises UserError: a source
    that cannot be read, which it names by file and line; a folder that cannot be written; a worker
    that was killed. Parts that are finished by then stay for the next call.
    """
    if str(out).endswith("/") or Path(out).name in ("", ".."):
        raise UserError(f"OUT = {str(out)!r}: a folder; name the pair in it")
    data, index = files_of(Path(out).expanduser())
    prefix, known = data.with_suffix(""), open_tokenizer(tokenizer, "--tokenizer ")
    if not overwrite and (there := [path for path in (data, index) if path.exists()]):
        raise UserError(f"{there[0]}: is there already; name another, or add --overwrite")
    parts, about = (prefix.with_name(prefix.name + end) for end in (".parts", ".json"))
    settings: dict[str, Any] = {"field": field, "document": document, "template": template}
    units, skipped = [], 0
    for source in sources:
        found = find_files(source, "SOURCE = ")
        own = [file for file in found if not _is_of(file.path, prefix)]
        more, faulty = _plan(DataConfig(source=source, heldout=0.0, **settings), own)
        units, skipped = units + more, skipped + faulty
    paths = [parts / f"{i:05}" for i in range(len(units))]
    workers = min(workers or _cores(), max(1, len(units)))
    with _writing(prefix), _parts(parts, paths, _fingerprint(units, known)):
        had = [_counts(path) for path in paths]
        jobs = [
            _Job(unit, path)
            for unit, path, counts in zip(units, paths, had, strict=True)
            if counts is None
        ]
        _work(jobs, workers, tokenizer, _counter(units, jobs, progress))
        counts = _sum(map(_required, paths)) + Counts(skipped=skipped)
        if not counts.documents:
            raise CorpusError(f"{' '.join(sources)}: no text in it; give some that has")
        merge(paths, prefix)
        described = {"tokenizer": known.identity(), "kind": known.kind, **asdict(counts)}
        _write_json(about, described | settings | {"sources": list(sources)})
    return Result(prefix, counts, counts.bytes - _sum(filter(None, had)).bytes)


def _cores() -> int:
    """Those that this process may use, where the system says."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _sum(counts: Iterable[Counts]) -> Counts:
    return sum(counts, Counts())


def _counter(
    units: Iterable[Unit], jobs: Iterable[_Job], progress: Progress | None
) -> Callable[[int], None]:
    """Adds up what workers read, for `progress`."""
    total = sum(unit.size for unit in units)
    done = total - sum(job.unit.size for job in jobs)

    def add(count: int) -> None:
        nonlocal done
        done = min(done + count, total)  # parts of a file overlap a little
        if progress:
            progress(done, total)

    add(0)
    return add


def _is_of(path: Path, prefix: Path) -> bool:
    """Whether it is the pair itself, what describes it, or in its parts: no text, where OUT lies in
    a folder that is read."""
    beside = [prefix.with_name(prefix.name + end) for end in (".bin", ".idx", ".json", ".parts")]
    own = {os.path.abspath(x) for x in beside}
    whole = os.path.abspath(path).removesuffix(".partial")
    return whole in own or os.path.dirname(whole) in own


def _plan(cfg: DataConfig, files: Iterable[SourceFile]) -> tuple[list[Unit], int]:
    """The files cut into units in their order, and how many are left out."""
    units, group, size, skipped = [], [], 0, 0
    for file in files:
        on_disk = file.path.stat().st_size
        lines = file.json_lines or (cfg.document == "line" and not file.table)
        cut = lines and not file.compressed and on_disk > UNIT
        if cut and fault_of(file, _named(cfg)):  # of a small file its worker says so
            skipped += 1
            continue
        for piece, length in _cut(file, on_disk, cut):
            if group and size + length > UNIT:
                units.append(Unit(cfg, tuple(group), size))
                group, size = [], 0
            group.append(piece)
            size += length
    if group:
        units.append(Unit(cfg, tuple(group), size))
    return units, skipped


def _named(cfg: DataConfig) -> bool:
    """Whether the source is a file given by its own path."""
    return Path(cfg.source).expanduser().is_file()


def _cut(file: SourceFile, size: int, lines: bool) -> Iterator[tuple[SourceFile, int]]:
    """Parts of a file and their bytes on disk."""
    if lines:
        for begin in range(0, size, UNIT):
            end = min(begin + UNIT, size)
            yield replace(file, begin=begin, end=end), end - begin
    elif file.path.suffix == ".parquet" and size > UNIT:
        first, length, sizes = 0, 0, group_sizes(file)
        for i, group in enumerate(sizes):
            if length and length + group > UNIT:
                yield replace(file, begin=first, end=i), length
                first, length = i, 0
            length += group
        yield replace(file, begin=first, end=len(sizes)), length
    else:
        yield file, size


def _fingerprint(units: list[Unit], tokenizer: Tokenizer) -> str:
    """A hash of what decides the parts. Contents are not read: files that changed have another size
    or time."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([FORMAT, UNIT, tokenizer.identity()]).encode())
    for unit in units:
        cfg = unit.cfg
        about: list[Any] = [cfg.field, cfg.document, cfg.template, _named(cfg)]
        for file in unit.files:
            found = file.path.stat()
            about.append([str(file.path), file.begin, file.end, found.st_size, found.st_mtime_ns])
        digest.update(json.dumps(about).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _writing(prefix: Path) -> Iterator[None]:
    """Turns a failure of the file system into one line."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "make it writable, or name another OUT"
        if full:
            remedy = "free some space: the same command goes on"
        raise UserError(f"{error.filename or prefix}: {error.strerror}; {remedy}") from error


@contextlib.contextmanager
def _parts(folder: Path, paths: list[Path], fingerprint: str) -> Iterator[None]:
    """Has the folder of parts for itself; what is in it is of this text, or is removed. At the end
    it is removed, after an exception only if no part in it is finished."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is writing it; wait for it, or name another OUT"
            ) from None
        manifest = folder / "manifest.json"
        if (known := _load(manifest).get("fingerprint")) != fingerprint:
            old = [path for path in folder.iterdir() if path.name != "lock"]
            if not known and any(not path.name.startswith(manifest.name) for path in old):
                raise UserError(f"{folder}: holds other files; remove it, or name another OUT")
            if known:
                print(f"{folder}: of other text or settings; made anew", file=sys.stderr)
            for path in old:
                path.unlink()
            _write_json(manifest, {"format": FORMAT, "fingerprint": fingerprint})
        elif finished := sum(_counts(path) is not None for path in paths):
            print(f"{folder}: {finished:,} of {len(paths):,} parts are there", file=sys.stderr)
        try:
            yield
        except BaseException as error:
            finished = sum(_counts(path) is not None for path in paths)
            if not finished:
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(
                    f"stopped with {finished:,} of {len(paths):,} parts done;"
                    " the same command goes on"
                ) from None
            raise
        shutil.rmtree(folder, ignore_errors=True)


def _work(
    jobs: Sequence[_Job], workers: int, tokenizer: str, report: Callable[[int], None]
) -> None:
    """Does the jobs in processes, which end with this one, however it ends."""
    waiting, longest = iter(jobs), longest_document(workers)
    hands: dict[Connection, tuple[BaseProcess, _Job]] = {}
    with deferred_interrupts() as check:
        try:
            for job in itertools.islice(waiting, workers):
                process, pipe = _start(tokenizer, longest)
                hands[pipe] = process, job
                _give(pipe, job)
            while hands:
                for pipe in wait(list(hands), PATIENCE_S):
                    assert isinstance(pipe, Connection)
                    process, job = hands[pipe]
                    if not _hear(pipe, process, job, report):
                        continue
                    job = next(waiting, None)
                    _give(pipe, job)
                    if job:
                        hands[pipe] = process, job
                    else:
                        hands.pop(pipe)[0].join()
                check()
        finally:
            for process, _ in hands.values():
                process.terminate()
                process.join()


def _start(tokenizer: str, longest: int) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    given = theirs, tokenizer, longest, os.getpid()
    process = context.Process(target=_serve, args=given, daemon=True)
    # Ctrl-C is for this process, which ends the others: they inherit that it is blocked. Starting
    # Python's tracker of resources would unblock it again, so that comes first.
    resource_tracker.ensure_running()
    with blocked_interrupts():
        process.start()
    theirs.close()
    return process, ours


def _give(pipe: Connection, job: _Job | None) -> None:
    """Sends a worker what is next; None: it may end."""
    with contextlib.suppress(ConnectionError):  # it has died: hearing from it will say so
        pipe.send(job)


def _hear(pipe: Connection, process: BaseProcess, job: _Job, report: Callable[[int], None]) -> bool:
    """Takes one message of a worker: whether its job is done. Raises what it raised."""
    try:
        message = pipe.recv()
    except (EOFError, OSError):
        process.join()
        name = job.unit.files[0].path
        how = f"exit code {process.exitcode}"
        if (process.exitcode or 0) < 0:
            how = f"{signal.Signals(-(process.exitcode or 0)).name}, as when memory runs out"
        raise UserError(
            f"{name}, or what follows it: the worker that read it has died ({how}); the same"
            " command goes on, with --workers for fewer of them"
        ) from None
    if isinstance(message, Exception):
        raise message
    if message is not None:
        report(message)
    return message is None


def _serve(pipe: Connection, name: str, longest: int, parent: int) -> None:
    """A worker: answers each job with the bytes it has read, now and then, and at last None."""
    _die_with(parent)
    os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    with contextlib.suppress(EOFError, ConnectionError):  # whoever asked is gone
        tokenizer = None
        while job := pipe.recv():
            try:
                tokenizer = tokenizer or open_tokenizer(name)
                with within_memory("take fewer --workers: the same command goes on"):
                    _make_part(job, tokenizer, longest, pipe.send)
            except Exception as error:
                error.add_note(traceback.format_exc())
                pipe.send(error)
            else:
                pipe.send(None)


def _die_with(parent: int) -> None:
    """So that no worker writes a part that the next command has begun anew."""
    with contextlib.suppress(AttributeError, OSError):  # elsewhere than on Linux
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _make_part(
    job: _Job, tokenizer: Tokenizer, longest: int, report: Callable[[int], None]
) -> None:
    """Tokenises a unit into its part."""
    cfg, dtype = job.unit.cfg, dtype_for(tokenizer.vocab_size)
    size = skipped = 0
    with BinidxWriter(job.path, dtype) as writer, _in_steps(report) as read:
        for file in job.unit.files:
            if not file.begin and file.end is None and fault_of(file, _named(cfg)):
                skipped += 1
                continue
            for document in Corpus(cfg, (file,), 0, 0, "", longest).documents(read):
                size += len(document.text.encode())
                pieces = (tokenizer.encode(piece) for piece in pieces_for(tokenizer, document.text))
                arrays = (np.fromiter(ids, dtype, len(ids)) for ids in pieces)
                writer.add(*arrays, [tokenizer.eod])
    _write_json(
        _described(job.path), asdict(Counts(writer.documents, size, writer.tokens, skipped))
    )


@contextlib.contextmanager
def _in_steps(report: Callable[[int], None]) -> Iterator[Callable[[int], None]]:
    """Adds up what is reported to make few messages of it."""
    held = 0

    def add(count: int) -> None:
        nonlocal held
        held += count
        if held >= STEP:
            report(held)
            held = 0

    yield add
    report(held)


def _described(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _counts(path: Path) -> Counts | None:
    """What a finished part holds; None if it is not there, or damaged."""
    try:
        counts = Counts(**_load(_described(path)))
        pair = open_binidx(path)
    except (TypeError, CorpusError):
        return None
    whole = (counts.documents, counts.tokens) == (len(pair.sizes), len(pair.tokens))
    return counts if whole else None


def _required(path: Path) -> Counts:
    if (counts := _counts(path)) is None:
        raise CorpusError(f"{path}.bin: damaged since it was written; the same command goes on")
    return counts


def _load(path: Path) -> dict[str, Any]:
    """A JSON object that `_write_json` wrote; an empty one if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """All of it, or what was there before."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
