"""What a message says in one case or another, within one text: how that is written down, shown and taken apart."""

from __future__ import annotations

import re
from collections.abc import Sequence

UNKNOWN = "…"
"""What a message only knows when it is shown."""
_MOST_CHOICES = 3
_OPEN, _BAR, _CLOSE = "⟦", "¦", "⟧"  # occur in no message
_INNERMOST = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}")


def either(texts: Sequence[str]) -> str:
    """One of some texts. If one of them is empty, there may be nothing."""
    texts = [""] * ("" in texts) + [text for text in dict.fromkeys(texts) if text]
    return texts[0] if len(texts) == 1 else f"{_OPEN}{_BAR.join(texts)}{_CLOSE}"


def perhaps(text: str) -> str:
    """A text or nothing."""
    return either(["", text])


def join(between: str, texts: Sequence[str]) -> str:
    """The texts with `between` between them; one that may be nothing has what goes before it within itself."""
    return between.join(texts).replace(f"{between}{_OPEN}{_BAR}", f"{_OPEN}{_BAR}")


def shown(text: str) -> str:
    """A text for readers: `(one / other)`, in square brackets if it may be none; `…` if they are unknown or many."""
    while found := _INNERMOST.search(text):
        first, *others = choices = found[1].split(_BAR)
        words = f"({' / '.join(choices)})" if first else f"[{' / '.join(others)}]"
        text = _with(text, found, UNKNOWN if _is_open(choices) else words)
    return text


def cases(text: str) -> list[str]:
    """All that a text can say, each without alternatives. Those that are unknown or many are `…` in it, and texts of
    their own."""
    found = _INNERMOST.search(text)
    if not found:
        return [text]
    choices = found[1].split(_BAR)
    texts = [_with(text, found, UNKNOWN), *choices] if _is_open(choices) else [_with(text, found, c) for c in choices]
    return list(dict.fromkeys(case for one in texts for case in cases(one)))


def _is_open(choices: list[str]) -> bool:
    some = [choice for choice in choices if choice]
    return UNKNOWN in some or len(some) > _MOST_CHOICES


def _with(text: str, found: re.Match[str], words: str) -> str:
    return text[: found.start()] + words + text[found.end() :]
