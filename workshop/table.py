"""CSV files of results: a header, then one row per measurement; floats are written with six significant digits."""

from __future__ import annotations

import csv
import dataclasses
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

Record = TypeVar("Record")


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]], *, append: bool = False) -> None:
    """Write a new file, or append to an existing one. Missing values and None become empty cells; values without a
    column are skipped."""
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
    """Like `write_rows`, for dataclass instances of one kind: one column per field."""
    columns = [field.name for field in dataclasses.fields(kind)]
    write_rows(path, columns, map(dataclasses.asdict, records), append=append)


def read_records(path: Path, kind: type[Record]) -> list[Record]:
    """Read what `write_records` wrote. Fields are str, int or float, or one of these or None (an empty cell).

    Raises:
        TypeError: a column is not a field, or a field without a default has no column.
        ValueError: a cell does not have its field's type.
    """
    types = {name: typing.get_args(hint) or (hint,) for name, hint in typing.get_type_hints(kind).items()}

    def value(name: str, text: str) -> Any:
        allowed = types.get(name, (str,))
        return None if text == "" and type(None) in allowed else allowed[0](text)

    return [kind(**{name: value(name, text) for name, text in row.items()}) for row in read_rows(path)]


def _text(value: object) -> object:
    return format(value, ".6g") if isinstance(value, float) else value
