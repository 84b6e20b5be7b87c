"""Writes the table of models in `docs/compatibility.md` from the files of the families, for `python dev.py docs`.

Every row needs a test, which the table names.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from .syntax import name_of

PAGE = "docs/compatibility.md"
FAMILIES = "patching/families"
TESTS = "tests/patching"
_BEGIN = "<!-- Written by `python dev.py docs` from patching/families/; do not edit by hand. -->"
_END = "<!-- Until here. -->"
_TITLES = ("model", "variant", "size of heads", "before the video", "video", "after it", "PSA", "test")
_TABLES = ("CASES", "DENSE")
"""Names of the tables in which a test lists the rows that it checks."""
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


def tests(root: Path) -> dict[str, str]:
    """Names of rows -> the file of the test that lists them."""
    found = {}
    for path in sorted((root / TESTS).glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and name_of(node.targets[0]) in _TABLES:
                words = (part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant))
                found |= {word: path.name for word in words if isinstance(word, str)}
    return found


def page(root: Path) -> str:
    """The text of the page with the table as it should be.

    Raises:
        LookupError: the page has no place for it, or a row has no test.
    """
    text = (root / PAGE).read_text(encoding="utf-8")
    listed, tested = list(rows(root)), tests(root)
    missing = [name for _, name, *_ in listed if name not in tested]
    if missing:
        raise LookupError(f"{', '.join(missing)}: no test in {TESTS} lists it in a table {' or '.join(_TABLES)}")
    lines = [_TITLES, ("---",) * len(_TITLES), *((*row, f"`{tested[row[1]]}`") for row in listed)]
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
