"""Text of any size tokenised into one binidx pair, on every core, resumable.

The text is cut into units of some 32 MB, by the names and sizes of its files alone. A worker reads,
tokenises and writes one unit at a time, `OUT.parts/00012.bin` and `.idx`; `00012.json` appears last
and marks the part as finished. A command that was stopped resumes with the finished parts; once all
are finished, they are merged in order. So the bytes of the result depend on the text alone.

Workers are processes of one thread each: half of a unit's 2.4 s goes into parsing JSON lines and
into building lists and arrays of ids, which hold the interpreter lock.
"""

import contextlib
import ctypes
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
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_jax import disk
from rwkv_jax.config import DataConfig
from rwkv_jax.data.binidx import BinidxWriter, dtype_for, files_of, merge, open_binidx
from rwkv_jax.data.corpus import Corpus, check_field, names_file, skip_reason
from rwkv_jax.data.files import CorpusError, Report, SourceFile, find_files, longest_document
from rwkv_jax.data.records import LeftOut
from rwkv_jax.data.tables import group_sizes
from rwkv_jax.data.tokenizers import Tokenizer, open_tokenizer
from rwkv_jax.data.tokens import encoded, encoder_of, grouped
from rwkv_jax.errors import UserError, within_memory
from rwkv_jax.interrupts import blocked_interrupts, deferred_interrupts

FORMAT = 1
UNIT = 32 << 20
BATCH_CHARACTERS = 1 << 20
STEP = 1 << 20
"""Bytes between two reports of a worker."""
PATIENCE_S = 0.2
"""Seconds to wait for workers before checking for Ctrl-C."""
ALL_TEXT: dict[str, Any] = {"mixture": {}, "heldout": 0.0, "train_on": "all"}
FIRST = "first_left_out"
RESUME = "run the same command again to resume"

Progress = Callable[[int, int], None]
"""Called with the bytes on disk that are done, and with all of them."""


class Counts(NamedTuple):
    """The contents of a part, or of all of them: documents, their UTF-8 bytes, and their tokens
    with one end-of-document id each; the files of folders that were skipped (not readable UTF-8
    text, JSON for other purposes); the records read, and those without a text."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    skipped: int = 0
    records: int = 0
    left_out: int = 0


@dataclass(frozen=True)
class Unit:
    """What a worker tokenises at a time."""

    cfg: DataConfig
    files: tuple[SourceFile, ...]
    size: int
    """Bytes on disk."""
    part: Path = Path()
    """The pair that is written."""


@dataclass(frozen=True)
class Result:
    """A finished pair."""

    path: Path
    """Without `.bin` and `.idx`."""
    counts: Counts
    new_bytes: int
    """UTF-8 bytes tokenised by this call, without those of parts finished before."""


def tokenize(
    sources: Sequence[str],
    out: str | Path,
    cfg: DataConfig,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Writes the documents of the sources as a pair, each followed by the end-of-document id, and a
    description of it, `OUT.json`.

    Of `cfg`, `tokenizer`, `special_tokens`, `field`, `document` and `template` apply. `workers` is
    the number of processes; None: one for each core. Notices go to stderr. Raises UserError for a
    source that cannot be read, with file and line; a folder that cannot be written; a worker that
    was killed.
    Parts finished by then are kept for the next call.
    """
    if str(out).endswith("/") or Path(out).name in ("", ".."):
        raise UserError(f"OUT = {str(out)!r}: a folder; name the pair in it")
    data, index = files_of(Path(out).expanduser())
    prefix, tokenizer = data.with_suffix(""), open_tokenizer(cfg.tokenizer, "--tokenizer ")
    if not overwrite and (existing := [path for path in (data, index) if path.exists()]):
        raise UserError(f"{existing[0]}: already exists; name another, or add --overwrite")
    parts = Path(f"{prefix}.parts")
    units, skipped = [], 0
    for source in sources:
        files = find_files(source, "SOURCE = ", plain=not cfg.field)
        files = [x for x in files if not _is_output(x.path, prefix)]
        own = replace(cfg, source=source, **ALL_TEXT)
        check_field(own, files)
        more, faulty = _plan(own, files)
        units, skipped = units + more, skipped + faulty
    units = [replace(unit, part=parts / f"{i:05}") for i, unit in enumerate(units)]
    with (
        disk.writing(
            prefix, "make it writable, or name another OUT", full=f"free some space, then {RESUME}"
        ),
        _parts(parts, units, _fingerprint(units, tokenizer)),
    ):
        before = [_counts(unit.part) for unit in units]
        todo = [unit for unit, done in zip(units, before, strict=True) if done is None]
        workers = min(workers or _cores(), max(1, len(units)))
        _work(todo, workers, cfg.tokenizer, _counter(units, todo, progress))
        counts = _sum([*(_required(unit.part) for unit in units), Counts(skipped=skipped)])
        left_out = LeftOut()
        for unit in units:
            left_out.merge(_left_out(unit.part))
        left_out.check()
        if left_out.count:
            print(str(left_out), file=sys.stderr)
        if not counts.documents:
            raise CorpusError(f"{' '.join(sources)}: no text in it; give some that has")
        merge([unit.part for unit in units], prefix)
        about = {"tokenizer": tokenizer.identity(), "kind": tokenizer.kind, **counts._asdict()}
        about |= {name: getattr(cfg, name) for name in ("field", "document", "template")}
        about |= {"special_tokens": True} if cfg.special_tokens else {}
        _write_json(Path(f"{prefix}.json"), about | {"sources": list(sources)})
    return Result(prefix, counts, counts.bytes - _sum(filter(None, before)).bytes)


def _cores() -> int:
    """The cores that this process may use, where the system says."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _sum(counts: Iterable[Counts]) -> Counts:
    return Counts(*map(sum, zip(*counts, strict=True)))


def _counter(units: list[Unit], todo: list[Unit], progress: Progress | None) -> Report:
    """Adds up the bytes read by workers, for `progress`."""
    total = sum(unit.size for unit in units)
    done = total - sum(unit.size for unit in todo)

    def add(count: int) -> None:
        nonlocal done
        done = min(done + count, total)  # parts of a file overlap a little
        if progress:
            progress(done, total)

    add(0)
    return add


def _is_output(path: Path, prefix: Path) -> bool:
    """Whether a file is the pair itself, its description or in its parts, and so no text, where OUT
    lies in a folder that is read."""
    outputs = {os.path.abspath(f"{prefix}{end}") for end in (".bin", ".idx", ".json", ".parts")}
    whole = os.path.abspath(path).removesuffix(disk.PARTIAL)
    return whole in outputs or os.path.dirname(whole) in outputs


def _plan(cfg: DataConfig, files: Iterable[SourceFile]) -> tuple[list[Unit], int]:
    """The files cut into units in their order, and the number of files skipped."""
    pieces, skipped = [], 0
    for file in files:
        on_disk = file.path.stat().st_size
        lines = file.kind == "lines" or (cfg.document == "line" and file.kind == "text")
        cut = lines and not file.compression and on_disk > UNIT
        if cut and skip_reason(file, cfg):  # a small file is checked by its worker
            skipped += 1
            continue
        pieces += _cut(file, on_disk, cut)
    return [Unit(cfg, tuple(group), size) for group, size in grouped(pieces, UNIT)], skipped


def _cut(file: SourceFile, size: int, lines: bool) -> Iterator[tuple[SourceFile, int]]:
    """Parts of a file, each with its bytes on disk."""
    if lines:
        for begin in range(0, size, UNIT):
            end = min(begin + UNIT, size)
            yield replace(file, begin=begin, end=end), end - begin
    elif file.plain_name.endswith(".parquet") and size > UNIT:
        for rows, length in grouped(enumerate(group_sizes(file)), UNIT):
            yield replace(file, begin=rows[0], end=rows[-1] + 1), length
    else:
        yield file, size


def _fingerprint(units: list[Unit], tokenizer: Tokenizer) -> str:
    """A hash of all that decides the parts. Contents are not read: a file that changed has another
    size or time."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([FORMAT, UNIT, tokenizer.identity()]).encode())
    for unit in units:
        cfg = unit.cfg
        about: list[Any] = [cfg.field, cfg.document, cfg.template, names_file(cfg.source)]
        about += ["special tokens"] if cfg.special_tokens else []
        for file in unit.files:
            found = file.path.stat()
            about.append([str(file.path), file.begin, file.end, found.st_size, found.st_mtime_ns])
        digest.update(json.dumps(about).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _parts(folder: Path, units: list[Unit], fingerprint: str) -> Iterator[None]:
    """Locks the folder of parts, and removes parts of another text. At the end the folder is
    removed, after an exception only if it holds no finished part."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is writing it; wait for it, or name another OUT"
            ) from None
        manifest = folder / "manifest.json"
        if (known := _read_json(manifest).get("fingerprint")) != fingerprint:
            old = [path for path in folder.iterdir() if path.name != "lock"]
            if not known and any(not path.name.startswith(manifest.name) for path in old):
                raise UserError(f"{folder}: holds other files; remove it, or name another OUT")
            if known:
                print(f"{folder}: has parts of other text or settings: rebuilding", file=sys.stderr)
            for path in old:
                path.unlink()
            _write_json(manifest, {"format": FORMAT, "fingerprint": fingerprint})
        elif finished := _finished(units):
            print(f"{folder}: {finished:,} of {len(units):,} parts are done", file=sys.stderr)
        try:
            yield
        except BaseException as error:
            finished = _finished(units)
            if not finished:
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(
                    f"stopped with {finished:,} of {len(units):,} parts done; {RESUME}"
                ) from None
            raise
        shutil.rmtree(folder, ignore_errors=True)


def _finished(units: list[Unit]) -> int:
    return sum(_counts(unit.part) is not None for unit in units)


def _work(units: Sequence[Unit], workers: int, tokenizer: str, report: Report) -> None:
    """Makes the units' parts in processes, which end with this one, however it ends."""
    waiting, longest = iter(units), longest_document(workers)
    busy: dict[Connection, tuple[BaseProcess, Unit]] = {}
    with deferred_interrupts() as check:
        try:
            for unit in itertools.islice(waiting, workers):
                process, pipe = _start(tokenizer, longest)
                busy[pipe] = process, unit
                _send(pipe, unit)
            while busy:
                for pipe in wait(list(busy), PATIENCE_S):
                    assert isinstance(pipe, Connection)
                    process, unit = busy[pipe]
                    if not _receive(pipe, process, unit, report):
                        continue
                    unit = next(waiting, None)
                    _send(pipe, unit)
                    if unit:
                        busy[pipe] = process, unit
                    else:
                        busy.pop(pipe)[0].join()
                check()
        finally:
            for process, _ in busy.values():
                process.terminate()
                process.join()


def _start(tokenizer: str, longest: int) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = theirs, tokenizer, longest, os.getpid()
    process = context.Process(target=_serve, args=arguments, daemon=True)
    # Ctrl-C is for this process, which ends the others: they inherit that it is blocked. Starting
    # Python's resource tracker would unblock it again, so that comes first.
    resource_tracker.ensure_running()
    with blocked_interrupts():
        process.start()
    theirs.close()
    return process, ours


def _send(pipe: Connection, unit: Unit | None) -> None:
    """Sends a worker its next unit; None ends it."""
    with contextlib.suppress(ConnectionError):  # it has died, which receiving will report
        pipe.send(unit)


def _receive(pipe: Connection, process: BaseProcess, unit: Unit, report: Report) -> bool:
    """Takes one message of a worker; whether its unit is done. Raises the worker's exception."""
    try:
        message = pipe.recv()
    except (EOFError, OSError):
        process.join()
        code = process.exitcode or 0
        how = f"exit code {code}"
        if code < 0:
            how = f"{signal.Signals(-code).name}, as when memory runs out"
        raise UserError(
            f"{unit.files[0].path}, or a file after it: the worker that read it has died ({how});"
            f" {RESUME}, with --workers for fewer of them"
        ) from None
    if isinstance(message, Exception):
        raise message
    if message is not None:
        report(message)
    return message is None


def _serve(pipe: Connection, name: str, longest: int, parent: int) -> None:
    """A worker: for each unit sends the bytes it has read, now and then, and at last None."""
    _die_with(parent)
    os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone
        tokenizer = None
        while unit := pipe.recv():
            try:
                tokenizer = tokenizer or open_tokenizer(name)
                with within_memory(f"{RESUME}, with fewer --workers"):
                    _make_part(unit, tokenizer, longest, pipe.send)
            except Exception as error:
                error.add_note(traceback.format_exc())
                pipe.send(error)
            else:
                pipe.send(None)


def _die_with(parent: int) -> None:
    """So that no worker still writes a part which the next command has started to rebuild."""
    with contextlib.suppress(AttributeError, OSError):  # not on Linux
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _make_part(unit: Unit, tokenizer: Tokenizer, longest: int, report: Report) -> None:
    """Tokenises a unit into its part."""
    cfg, size, skipped = unit.cfg, 0, 0
    left_out = LeftOut(cfg.strict)
    with (
        BinidxWriter(unit.part, dtype_for(tokenizer.vocab_size)) as writer,
        _in_steps(report) as read,
    ):
        for file in unit.files:
            if not file.begin and file.end is None and skip_reason(file, cfg):
                skipped += 1
                continue
            documents = Corpus(cfg, (file,), longest=longest).documents(read, left_out)
            for document, ids in encoded(documents, encoder_of(cfg, tokenizer), BATCH_CHARACTERS):
                size += len(document.text.encode())
                writer.add(ids)
    counts = Counts(
        writer.documents, size, writer.tokens, skipped, left_out.records, left_out.count
    )
    _write_json(Path(f"{unit.part}.json"), counts._asdict() | {FIRST: left_out.first})


@contextlib.contextmanager
def _in_steps(report: Report) -> Iterator[Report]:
    """Adds up reports, so that fewer messages are sent."""
    held = 0

    def add(count: int) -> None:
        nonlocal held
        held += count
        if held >= STEP:
            report(held)
            held = 0

    yield add
    report(held)


def _counts(part: Path) -> Counts | None:
    """The contents of a finished part; None if there is none, or it is damaged."""
    try:
        described = _read_json(Path(f"{part}.json"))
        described.pop(FIRST, None)
        counts = Counts(**described)
        pair = open_binidx(part)
    except (TypeError, CorpusError):
        return None
    whole = (counts.documents, counts.tokens) == (len(pair.sizes), len(pair.tokens))
    return counts if whole else None


def _left_out(part: Path) -> LeftOut:
    """The records of a finished part that were left out."""
    found = _read_json(Path(f"{part}.json"))
    records, count = found.get("records", 0), found.get("left_out", 0)
    return LeftOut(records=records, count=count, first=found.get(FIRST, ""))


def _required(part: Path) -> Counts:
    if (counts := _counts(part)) is None:
        raise CorpusError(f"{part}.bin: damaged since it was written; {RESUME}")
    return counts


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    disk.write_text(path, json.dumps(value, indent=2) + "\n")
