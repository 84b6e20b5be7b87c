"""The CSV files of results: a header, and a row for every measurement; fractions with six significant digits."""

from __future__ import annotations

import csv
import dataclasses
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

Record = TypeVar("Record")


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]], *, append: bool = False) -> None:
    """Write a new file, or below the rows that are there. What a row lacks, or has as None, is left empty; what has no
    column is left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a" if append else "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        if not append:
            writer.writeheader()
        writer.writerows({name: _text(value) for name, value in row.items()} for row in rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file, as text."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_records(path: Path, kind: type, records: Iterable[Any], *, append: bool = False) -> None:
    """As `write_rows`: dataclasses of one kind, a column for each field."""
    columns = [field.name for field in dataclasses.fields(kind)]
    write_rows(path, columns, map(dataclasses.asdict, records), append=append)


def read_records(path: Path, kind: type[Record]) -> list[Record]:
    """What `write_records` wrote. Fields are str, int, float, or one of them or None, which an empty cell then is.

    Raises:
        TypeError: a column is no field, or a field without a default has no column.
        ValueError: a cell is not of its field's type.
    """
    types = {name: typing.get_args(hint) or (hint,) for name, hint in typing.get_type_hints(kind).items()}

    def value(name: str, text: str) -> Any:
        allowed = types.get(name, (str,))
        return None if text == "" and type(None) in allowed else allowed[0](text)

    return [kind(**{name: value(name, text) for name, text in row.items()}) for row in read_rows(path)]


def _text(value: object) -> object:
    return format(value, ".6g") if isinstance(value, float) else value
