"""Reads small files from strangers, mostly JSON, and says in words what is wrong with them. Standard library only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MOST_BYTES = 4 * 1024 * 1024
"""More than any model's config or index needs: the index of the largest models is below 1 MB."""
_MEND = "correct it or download it again"
_ACCESS = "see that the file may be read, and that its disk is there"


class FileError(ValueError):
    """A file that cannot be used: the message names it and says why.

    Attributes:
        reason: why, without the file's name; do: what to do about it.
    """

    def __init__(self, path: Path | str, reason: str, do: str = "download it again") -> None:
        super().__init__(f"{printable(Path(path).name)}: {reason} ({printable(str(path))})")
        self.reason, self.do = reason, do


def printable(text: str) -> str:
    """A file's name for a message: line breaks and bytes that are not text become escapes, the rest stays."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def read_object(path: Path, most: int = MOST_BYTES) -> dict[str, Any]:
    """The object in a JSON file of at most `most` bytes: UTF-8, UTF-16 or UTF-32, with or without a byte-order mark.

    Raises:
        FileError: it cannot be read, is too large, or holds something else.
    """
    return parse_object(path, read_bytes(path, most))


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """The content of an ordinary file.

    Raises:
        FileError: there is none, it cannot be read, or it is larger than `most` bytes.
    """
    try:
        if not path.is_file():  # opening a pipe would wait forever
            raise FileError(path, "it cannot be read: it is not a file", _MEND)
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise FileError(path, f"it cannot be read: {error.strerror or 'the system refuses it'}", _ACCESS) from error
    if len(data) > most:
        raise FileError(path, f"it is larger than {most // 1024} kB; no file of its kind is")
    return data


def parse_object(path: Path, data: bytes | str) -> dict[str, Any]:
    """The JSON object in `data`, which came from `path`.

    Raises:
        FileError: it is something else.
    """
    try:
        found = json.loads(data)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise FileError(path, f"it cannot be read: it is not JSON (see {place})", _MEND) from error
    except RecursionError as error:
        reason = "it cannot be read: its JSON is nested too deeply"
        raise FileError(path, reason, _MEND) from error
    except ValueError as error:  # not text, or a number with thousands of digits
        raise FileError(path, "it cannot be read: it is not JSON in UTF-8 or UTF-16", "save it as UTF-8") from error
    if not isinstance(found, dict):
        raise FileError(path, "it cannot be read: it must hold a JSON object {...}", _MEND)
    return found
