"""A file's name from a menu, possibly saved in a workflow on another machine."""

from __future__ import annotations

from collections.abc import Iterable


def menu_name(name: str, menu: Iterable[str]) -> str | None:
    """The menu entry that the file name `name` means, or None: `sub\\\\x` from Windows is `sub/x` elsewhere."""
    names = list(menu)
    if name in names:
        return name
    same = [entry for entry in names if _with_slashes(entry) == _with_slashes(name)]
    return same[0] if same else None


def _with_slashes(name: str) -> str:
    return name.replace("\\", "/")
