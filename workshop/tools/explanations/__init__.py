"""What each log line and each reason of the product means and what to do, for `docs/troubleshooting.md`. Errors are not
here: they say themselves what is allowed and what to do.

A section is a text file in this folder: its title, then blocks of lines, with an empty line between: the key, a part of
the message that never changes, then what it means and, after `->`, what to do. Without `->` there is nothing to do.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

_FILES = ("running", "dense", "after", "memory", "kernels", "models", "diffusers")
"""In the order of the page."""
NOTHING = "Nothing."


@dataclasses.dataclass(frozen=True)
class Explanation:
    """About the messages that contain `key`, a part of them that never changes.

    Attributes:
        section: one of `SECTIONS`. means, do: sentences.
    """

    section: str
    key: str
    means: str
    do: str = NOTHING


def _read(text: str) -> list[Explanation]:
    title, *blocks = text.strip().split("\n\n")
    found = []
    for block in blocks:
        key, *lines = block.split("\n")
        means, _, do = " ".join(line.strip() for line in lines).partition(" -> ")
        found.append(Explanation(title.removeprefix("# "), key, means, do or NOTHING))
    return found


EXPLANATIONS = tuple(
    one for name in _FILES for one in _read(Path(__file__).with_name(f"{name}.txt").read_text(encoding="utf-8"))
)
SECTIONS = tuple(dict.fromkeys(one.section for one in EXPLANATIONS))
