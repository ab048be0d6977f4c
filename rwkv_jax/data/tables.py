"""Rows of Parquet and Arrow files, read by pyarrow, a few hundred at a time."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rwkv_jax.data.files import CorpusError, SourceFile
from rwkv_jax.errors import UserError

ROWS = 256


def read_rows(
    file: SourceFile, field: str, *more: str, report: Callable[[int], None] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """A column and those of `more` that are there, row by row, counted from 1 and from the file's
    beginning. The column holds text, or a conversation's turns as a list.

    `report` is told the bytes on disk that the rows take. Raises CorpusError naming file and row of
    what is neither, UserError without pyarrow.
    """
    with _reading(file) as arrow, _open(arrow, file) as table:
        _check_column(arrow, table.schema, file, field)
        columns = [field, *(name for name in more if name in table.schema.names)]
        number, told = table.first, 0
        for batch, place in table.batches(columns):
            for values in zip(*map(batch.column, columns), strict=True):
                number += 1
                named = zip(columns, values, strict=True)
                where = f"{file.path}:{number}"
                yield number, {name: _value(value, where, name) for name, value in named}
            if report:
                report(place - told)
                told = place
        if report:
            report(table.size - told)


def group_sizes(file: SourceFile) -> list[int]:
    """Bytes on disk of each group of rows of a Parquet file."""
    with _reading(file) as arrow, _open(arrow, file) as table:
        return table.groups


@dataclass(frozen=True)
class _Table:
    schema: Any
    first: int
    """Rows before those that are read."""
    size: int
    """Bytes on disk of those that are read."""
    groups: list[int]
    batches: Callable[[list[str]], Iterator[tuple[Any, int]]]
    """Record batches with these columns, and the bytes on disk up to the end of each."""


@contextlib.contextmanager
def _reading(file: SourceFile) -> Iterator[Any]:
    """Yields pyarrow; turns its errors into one line."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{file.path}: needs a package that is not installed: pip install 'rwkv_jax[parquet]'"
        ) from error
    try:
        yield pyarrow
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        raise CorpusError(
            f"{file.path}: cannot be read as {file.path.suffix} ({reason}); copy or save it again"
        ) from error


@contextlib.contextmanager
def _open(arrow: Any, file: SourceFile) -> Iterator[_Table]:
    with contextlib.ExitStack() as stack:
        mapped = stack.enter_context(arrow.memory_map(str(file.path)))
        if file.path.suffix == ".parquet":
            yield _parquet(stack.enter_context(arrow.parquet.ParquetFile(mapped)), file)
            return
        # `datasets` writes streams; files of the other Arrow format begin with a name.
        whole = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        open_it = arrow.ipc.open_file if whole else arrow.ipc.open_stream
        reader = stack.enter_context(open_it(mapped))
        each = (reader.get_batch(i) for i in range(reader.num_record_batches)) if whole else reader
        rows = ((batch, mapped.tell()) for batch in each)
        yield _Table(reader.schema, 0, mapped.size(), [], lambda _: rows)


def _parquet(parquet: Any, file: SourceFile) -> _Table:
    about = parquet.metadata
    groups = [about.row_group(i) for i in range(about.num_row_groups)]
    sizes = [
        sum(group.column(i).total_compressed_size for i in range(group.num_columns))
        for group in groups
    ]
    chosen = range(len(groups))[file.begin : file.end]
    whole = len(chosen) == len(groups)
    size = file.path.stat().st_size if whole else sum(sizes[i] for i in chosen)
    rows = max(1, sum(groups[i].num_rows for i in chosen))

    def batches(columns: list[str]) -> Iterator[tuple[Any, int]]:
        done = 0
        for batch in parquet.iter_batches(ROWS, row_groups=list(chosen), columns=columns):
            done += batch.num_rows
            yield batch, size * done // rows

    first = sum(group.num_rows for group in groups[: file.begin])
    return _Table(parquet.schema_arrow, first, size, sizes, batches)


def _check_column(arrow: Any, schema: Any, file: SourceFile, field: str) -> None:
    if field not in schema.names:
        there = ", ".join(schema.names) or "none"
        raise CorpusError(
            f"{file.path}: no column {field!r}; set data.field to one of those there: {there}"
        )
    kind = schema.field(field).type
    inner = kind.value_type if arrow.types.is_dictionary(kind) else kind
    types = arrow.types
    text = (types.is_string, types.is_large_string, types.is_string_view)
    if not any(test(inner) for test in (*text, types.is_list, types.is_large_list)):
        raise CorpusError(
            f"{file.path}:1: column {field!r} holds {kind}, not text or a list of turns; set"
            " data.field to another"
        )


def _value(value: Any, where: str, field: str) -> Any:
    try:
        found = value.as_py()
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{where}: column {field!r} is not UTF-8 ({error.reason}); convert it first"
        ) from error
    if found is None:
        raise CorpusError(f"{where}: column {field!r} is null; leave out such rows")
    return found
