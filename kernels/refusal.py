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
    if _is_plain(given):
        text = repr(given)
        return text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 3]}..."
    if hasattr(given, "shape"):
        size = "x".join(map(str, given.shape))
        return f"an array of {size}" if size else "an array of one number"
    return "something of another type"


def _is_plain(given: object) -> bool:
    """Whether Python writes a value without class names: text, numbers, and collections of them."""
    if isinstance(given, dict):
        return all(map(_is_plain, (*given.keys(), *given.values())))
    if isinstance(given, list | tuple | set | frozenset):
        return all(map(_is_plain, given))
    return given is None or isinstance(given, str | int | float)
