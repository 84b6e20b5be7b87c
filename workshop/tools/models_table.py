"""Writes the table of models in `docs/compatibility.md` from the files of the families, for `python dev.py docs`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from .syntax import name_of

PAGE = "docs/compatibility.md"
FAMILIES = "patching/families"
_BEGIN = "<!-- Written by `python dev.py docs` from patching/families/; do not edit by hand. -->"
_END = "<!-- Until here. -->"
_TITLES = ("model", "variant", "size of heads", "before the video", "video", "after it", "PSA")
_DEFAULTS = {"name": "", "heads": "128", "before": "-", "grid": "T x H x W", "after": "-", "psa": "sparse"}


def rows(root: Path) -> Iterator[tuple[str, ...]]:
    """A row for every variant of every family: the family, and the columns of `support.Variant`. The files are read
    without running them, so that nothing needs to be installed."""
    for path in sorted((root / FAMILIES).glob("[a-z]*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        family = next(call for call in calls if name_of(call.func) == "Family")
        for variant in (call for call in calls if name_of(call.func) == "Variant"):
            given = {"name": ast.literal_eval(variant.args[0])}
            given |= {keyword.arg: ast.literal_eval(keyword.value) for keyword in variant.keywords if keyword.arg}
            yield ast.literal_eval(family.args[0]), *(_DEFAULTS | given).values()


def page(root: Path) -> str:
    """The text of the page with the table as it should be.

    Raises:
        LookupError: the page has no place for it.
    """
    text = (root / PAGE).read_text(encoding="utf-8")
    lines = [_TITLES, ("---",) * len(_TITLES), *rows(root)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    written, places = re.subn(f"{_BEGIN}.*?{_END}", lambda _: f"{_BEGIN}\n\n{table}\n{_END}", text, flags=re.S)
    if places != 1:
        raise LookupError(f"{PAGE} needs the line {_BEGIN!r} once, and {_END!r} after it")
    return written


def write_page(root: Path) -> Path:
    """Write the page again and return its path."""
    path, text = root / PAGE, page(root)
    path.write_text(text, encoding="utf-8", newline="\n")
    return path
