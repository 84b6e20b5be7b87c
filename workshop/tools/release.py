"""The contents of a release to ComfyUI's registry: all files tracked by git, except those matched by `.comfyignore`."""

from __future__ import annotations

import subprocess
from pathlib import Path

IGNORE = ".comfyignore"


def tracked_files(root: Path) -> list[str]:
    """The files tracked by git in `root`, as relative paths with forward slashes."""
    return _git(root, "ls-files", "-z", "--cached")


def released_files(root: Path) -> list[str]:
    """The tracked files that belong to a release. The patterns use git's syntax, so git applies them."""
    ignored = set(_git(root, "ls-files", "-z", "--cached", "--ignored", f"--exclude-from={root / IGNORE}"))
    return [name for name in tracked_files(root) if name not in ignored]


def _git(root: Path, *words: str) -> list[str]:
    ran = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, encoding="utf-8", check=True)
    return [name for name in ran.stdout.split("\0") if name]
