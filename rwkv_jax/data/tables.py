"""Rows of Parquet and Arrow files, read by pyarrow, a few hundred at a time."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rwkv_jax.data.files import CorpusError, Report, SourceFile, unreported
from rwkv_jax.errors import UserError

ROWS = 256


def read_rows(
    file: SourceFile, field: str, *more: str, report: Report = unreported
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The values of a column, and of those of `more` that exist, row by row; rows count from 1 at
    the start of the file. The column holds text, or the turns of a conversation as a list; None is
    null.

    Raises CorpusError naming file and row of anything else, UserError without pyarrow.
    """
    with _reading(file) as arrow, _open(arrow, file) as table:
        _check_column(arrow, table.schema, file, field)
        columns = [field, *(name for name in more if name in table.schema.names)]
        number, reported = table.first, 0
        for batch, place in table.batches(columns):
            for values in zip(*map(batch.column, columns), strict=True):
                number += 1
                named = zip(columns, values, strict=True)
                where = f"{file.path}:{number}"
                yield number, {name: _value(value, where, name) for name, value in named}
            report(place - reported)
            reported = place
        report(table.size - reported)


def columns_of(file: SourceFile) -> list[str]:
    """The names of the columns of a table. Raises as `read_rows`."""
    with _reading(file) as arrow, _open(arrow, file) as table:
        return table.schema.names


def group_sizes(file: SourceFile) -> list[int]:
    """Bytes on disk of each row group of a Parquet file."""
    with _reading(file) as arrow, _open(arrow, file) as table:
        return table.groups


@dataclass(frozen=True)
class _Table:
    schema: Any
    first: int
    """Number of rows before the part that is read."""
    size: int
    """Bytes on disk of the part that is read."""
    groups: list[int]
    batches: Callable[[list[str]], Iterator[tuple[Any, int]]]
    """Record batches of the given columns, each with the bytes on disk up to its end."""


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
        if file.plain_name.endswith(".parquet"):
            yield _parquet(stack.enter_context(arrow.parquet.ParquetFile(mapped)), file)
            return
        # `datasets` writes Arrow streams; Arrow files start with this name.
        seekable = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        open_reader = arrow.ipc.open_file if seekable else arrow.ipc.open_stream
        reader = stack.enter_context(open_reader(mapped))
        each = map(reader.get_batch, range(reader.num_record_batches)) if seekable else reader
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
        found = ", ".join(schema.names) or "none"
        raise CorpusError(
            f"{file.path}: no column {field!r}; set data.field to one of its columns: {found}"
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
        return value.as_py()
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{where}: column {field!r} is not UTF-8 ({error.reason}); convert it first"
        ) from error
