"""Rows of files of labelled data: JSON lines, tables and parquet; and what a reader takes from a row, checked.

Errors name the file and the line, what was found there and what is accepted.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from fastformer.data.labelled.examples import Examples
from fastformer.data.parquet import parquet_records
from fastformer.lines import check_is_file, decoded_lines, json_object, numbered_lines

Example = TypeVar("Example", bound=tuple)

# Python's own limit is 131,072 characters.
csv.field_size_limit((1 << 31) - 1)

NOTHING: tuple[Any, ...] = (None, "", [], {})
"""Values that count as missing."""


class Row(NamedTuple):
    """A record of a file, and its place (file and line)."""

    where: str
    values: dict[str, Any]


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the records of a file: JSON lines, CSV (quoted as in RFC 4180), TSV (never quoted, as GLUE's) or parquet.

    Raises:
        ValueError: the suffix is unknown, or a line is not a record.
    """
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        yield from _json_rows(path)
    elif suffix in (".csv", ".tsv"):
        yield from _table_rows(path)
    elif suffix == ".parquet":
        yield from _parquet_rows(path)
    else:
        raise ValueError(f"{path}: unknown suffix {suffix!r}; accepted are .jsonl, .ndjson, .csv, .tsv, .parquet")


def _json_rows(path: Path) -> Iterator[Row]:
    for number, line in numbered_lines(path):
        if line.strip():
            where = f"{path}, line {number}"
            yield Row(where, json_object(line, where))


def _table_rows(path: Path) -> Iterator[Row]:
    check_is_file(path)
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            yield from _records(file, path)
        except UnicodeDecodeError:
            for _ in decoded_lines(path):  # its error names the line
                pass
            raise


def _records(file: IO[str], path: Path) -> Iterator[Row]:
    if path.suffix.lower() == ".csv":
        spaced = ", " in file.readline()  # "text, label": the space belongs neither to the name nor to the values
        file.seek(0)
        records = csv.reader(file, strict=True, skipinitialspace=spaced)
    else:
        records = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    header: list[str] = []
    while True:
        where = f"{path}, line {records.line_num + 1}"
        try:
            record = next(records, None)
        except csv.Error as error:
            raise ValueError(f"{where}: not CSV: {error}") from error
        if record is None:
            break
        if not record:
            continue
        if not header:
            if _is_cola(record):
                yield Row(where, {"label": record[1], "sentence": record[3]})
                record = ["", "label", "", "sentence"]
            header = _column_names(record, where)
            continue
        if len(record) != len(header):
            raise ValueError(f"{where}: found {len(record)} columns, expected {len(header)}: {', '.join(header)}")
        yield Row(where, dict(zip(header, record, strict=True)))
    if not header:
        raise ValueError(f"{path} is empty; its first line must name the columns")


def _column_names(header: list[str], where: str) -> list[str]:
    names = [name.strip() for name in header]
    for name in names:
        if name and names.count(name) > 1:
            raise ValueError(f"{where}: {name!r} names two columns; the names in the first line must differ")
    return names


def _is_cola(header: list[str]) -> bool:
    """Whether the first line is a record of GLUE's CoLA without a header: source, label, original mark, sentence."""
    return len(header) == 4 and header[1] in ("0", "1") and header[2] in ("", "*", "?", "??", "?*")


def _parquet_rows(path: Path) -> Iterator[Row]:
    for number, values in parquet_records(path):
        yield Row(f"{path}, row {number}", values)


def one_of(row: Row, names: Sequence[str], what: str, required: bool = True) -> Any:
    """Return the value of the first of these columns that the row has; None if it has none, or null there."""
    value = next((row.values[name] for name in names if name in row.values), None)
    if value is None and required:
        found = ", ".join(map(str, row.values)) or "nothing"
        empty = " that is not null" if any(name in row.values for name in names) else ""
        raise ValueError(f"{row.where}: no {what}{empty}; found {found}; accepted are {', '.join(names)}")
    return value


def text_of(row: Row, names: Sequence[str], what: str, required: bool = True) -> Any:
    """Return the text in the one of these columns that has a value, checked; None if it is missing and not required."""
    check_one(row, names, what)
    value = one_of(row, names, what, required)
    return None if value is None else checked_text(value, row.where, what)


def check_one(row: Row, names: Sequence[str], what: str) -> None:
    """Raise ValueError if several of these columns have values, and the values differ."""
    given = [name for name in names if row.values.get(name) not in NOTHING]
    if any(row.values[name] != row.values[given[0]] for name in given):
        raise ValueError(f"{row.where}: found {' and '.join(given)}, but only one may be the {what}; give one")


def checked_text(value: Any, where: str, what: str) -> str:
    """Return a text as it is; raise ValueError if it is no string or is empty."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {what} must be a string, found {shown(value)}")
    if not value.strip():
        raise ValueError(f"{where}: {what} is empty")
    return value


def shown(value: Any) -> str:
    """Return the type and the first characters of a value, for an error."""
    return f"{type(value).__name__} {value!s:.60}"


def examples_of(path: Path, rows: Iterator[Row], make: Callable[[Row], Example]) -> Examples[Example]:
    """Return the example that `make` returns for each row; raise ValueError if there are none."""
    return at_least_one(path, ((row.where, make(row)) for row in rows))


def at_least_one(path: Path, located: Iterator[tuple[str, Example]]) -> Examples[Example]:
    """Return examples with their places; raise ValueError if there are none."""
    examples = Examples(located)
    if not examples:
        raise ValueError(f"{path} holds no examples")
    return examples
