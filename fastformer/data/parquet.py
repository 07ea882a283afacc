"""Read parquet files record by record; a damaged file is refused with its name and the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastformer.lines import check_is_file

_ROWS = 1024
"""Number of records read at once."""


def parquet_records(path: Path, start: int = 0, column: str | None = None) -> Iterator[tuple[int, Any]]:
    """Yield the number of each record, counted from 1, and its values by column, or its value in one `column`.

    Args:
        path: the file.
        start: number of records to skip.
        column: read this column only.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or not parquet, or has no such column.
    """
    check_is_file(path)
    import pyarrow

    try:
        yield from _records(path, start, column)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or not parquet: {error}") from error


def _records(path: Path, start: int, column: str | None) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as table:
        names = table.schema_arrow.names
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{path}: {twice[0]!r} names two columns; the names must differ")
        if column is not None and column not in names:
            raise ValueError(f"{path}: no {column!r} column; found {', '.join(names)}")
        number = 0
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if number + rows <= start:  # the whole group is before the start: do not read it
                number += rows
                continue
            columns = None if column is None else [column]
            for batch in table.iter_batches(batch_size=_ROWS, row_groups=[group], columns=columns):
                for values in batch.to_pylist():
                    number += 1
                    if number > start:
                        yield number, values if column is None else values[column]
