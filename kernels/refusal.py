"""The one form of a refusal: what was given, what is allowed, what to do. Plain sentences for errors in any layer."""

from __future__ import annotations

_MOST_LETTERS = 80


def refusal(field: str, given: object, allowed: str) -> str:
    """`field: 'x' was given; allowed: ...`, without a full stop at the end."""
    return f"{field}: {shown(given)} was given; allowed: {allowed.rstrip('. ')}"


def sentence(words: str) -> str:
    """The words with a capital letter and a full stop; raises ValueError if there are none."""
    words = words.strip().rstrip(".")
    if not words:
        raise ValueError("an error must say what to do")
    return f"{words[0].upper()}{words[1:]}."


def shown(given: object) -> str:
    """A value as a message shows it: plain data as Python writes it, cut if it is long, and no class names."""
    if isinstance(given, str | int | float | list | tuple | dict | set | frozenset) or given is None:
        text = repr(given)
        return text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 3]}..."
    if hasattr(given, "shape"):
        size = "x".join(map(str, given.shape))
        return f"an array of {size}" if size else "an array of one number"
    return "something of another type"
