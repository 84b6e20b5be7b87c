"""A file's name from a menu, as another machine may have saved it in a workflow."""

from __future__ import annotations

from collections.abc import Iterable


def menu_name(name: str, menu: Iterable[str]) -> str | None:
    """The entry of a menu of file names that `name` means, or None: `sub\\\\x` from Windows is `sub/x` elsewhere."""
    names = list(menu)
    if name in names:
        return name
    same = [entry for entry in names if _with_slashes(entry) == _with_slashes(name)]
    return same[0] if same else None


def _with_slashes(name: str) -> str:
    return name.replace("\\", "/")
