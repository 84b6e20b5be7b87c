"""The notes of the workflows in Chinese: `notes_zh.json` has every paragraph and its translation."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("notes_zh.json")
SAME = ("- ", "    ", "https://")
"""How lines begin that are the same in every language: files, commands and addresses."""


def in_chinese(markdown: str) -> str:
    """A note's translation.

    Raises:
        LookupError: a paragraph has none.
    """
    return "\n\n".join(_paragraph(text) for text in markdown.strip().split("\n\n"))


def _paragraph(text: str) -> str:
    found = _table().get(" ".join(text.split()))
    if found is not None:
        return found
    lines = text.split("\n")
    if not all(line.startswith(SAME) for line in lines):
        raise LookupError(f"{TABLE.name} has no translation of: {' '.join(text.split())}")
    return "\n".join(_table().get(line, line) for line in lines)


@cache
def _table() -> dict[str, str]:
    return json.loads(TABLE.read_text(encoding="utf-8"))
