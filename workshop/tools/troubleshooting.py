"""Writes the lists of messages in `docs/troubleshooting.md` from the product's code, for `python dev.py docs`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from .explanations import EXPLANATIONS, SECTIONS, Explanation
from .messages import PASSED_ON, UNKNOWN, Message, Product

PAGE = "docs/troubleshooting.md"
BEGIN = "<!-- From here on written by `python dev.py docs`; do not edit by hand. -->"
_ERRORS = """## Errors

An error names the node, the input, what was given, what is allowed, and ends with what to do. These are all of them.
"""
_FIRST = ("PSA Patch", "PSA Pyramid", "Every node")


def page(root: Path) -> str:
    """The text of the page: what was written by hand, and the lists from the code in `root`."""
    written = (root / PAGE).read_text(encoding="utf-8").partition(BEGIN)[0]
    product = Product(root)
    for key in sorted(product.passed_on() ^ set(PASSED_ON)):
        raise LookupError(f"a log line passes on a sentence: correct the entry {key!r} in workshop/tools/messages.py")
    return f"{written.rstrip()}\n\n{BEGIN}\n\n{lists(product.messages())}"


def write_page(root: Path) -> Path:
    """Write the page again and return its path."""
    path, text = root / PAGE, page(root)
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def lists(messages: Sequence[Message], explanations: Sequence[Explanation] = EXPLANATIONS) -> str:
    """The generated part of the page.

    Raises:
        LookupError: a message has no explanation or several, or an explanation has no message.
    """
    told = [message for message in messages if message.kind != "error"]
    explained = {message: explanation_of(message, explanations) for message in told}
    unused = [one.key for one in explanations if one not in explained.values()]
    if unused:
        raise LookupError(f"no message of the code contains {unused[0]!r}; take it out of workshop/tools/explanations/")
    parts = []
    for section in SECTIONS:
        rows = [
            (f"`{message.text}`", one.means, one.do)
            for one in explanations
            for message in told
            if explained[message] is one and one.section == section
        ]
        parts.append(f"## {section}\n\n{_table(('line', 'what it means', 'what to do'), dict.fromkeys(rows))}")
    errors = [message for message in messages if message.kind == "error"]
    return "\n".join([*parts, _ERRORS, *_of_errors(errors)]).rstrip() + "\n"


def explanation_of(message: Message, explanations: Sequence[Explanation] = EXPLANATIONS) -> Explanation:
    """The one explanation whose key a message contains; LookupError if there is none, or more than one."""
    found = [one for one in explanations if one.key in message.text]
    if len(found) != 1:
        keys = ", ".join(repr(one.key) for one in found) or "none"
        raise LookupError(
            f"{message.file} has the message {message.text!r}, which needs exactly one explanation in "
            f"workshop/tools/explanations/; it has {keys}"
        )
    return found[0]


def _of_errors(errors: Iterable[Message]) -> Iterable[str]:
    def rank(message: Message) -> tuple[int, str]:
        return (_FIRST.index(message.node) if message.node in _FIRST else len(_FIRST), message.node)

    for node, group in itertools.groupby(sorted(errors, key=rank), key=lambda message: message.node):
        rows = list(group)
        if all(row.field for row in rows):
            columns = [(f"`{row.field}`", _told(row.given), _told(row.allowed), row.do) for row in rows]
            table = _table(("input", "given", "allowed", "what to do"), dict.fromkeys(columns))
        else:
            table = _table(("what it says", "what to do"), dict.fromkeys((row.text, row.do) for row in rows))
        yield f"### {node}\n\n{table}"


def _told(text: str) -> str:
    """A value, or what stands for any."""
    return text if re.search(r"[a-z0-9]", text) else "any other value" if not text else UNKNOWN


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)
