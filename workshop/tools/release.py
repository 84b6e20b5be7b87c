"""What a release to ComfyUI's registry holds: the files that git tracks, without those that `.comfyignore` names."""

from __future__ import annotations

import subprocess
from pathlib import Path

IGNORE = ".comfyignore"


def tracked_files(root: Path) -> list[str]:
    """The files that git tracks in `root`, relative to it, with forward slashes."""
    return _git(root, "ls-files", "-z", "--cached")


def released_files(root: Path) -> list[str]:
    """The tracked files that a release holds. The patterns are git's own, so that git itself applies them."""
    left_out = set(_git(root, "ls-files", "-z", "--cached", "--ignored", f"--exclude-from={root / IGNORE}"))
    return [name for name in tracked_files(root) if name not in left_out]


def _git(root: Path, *words: str) -> list[str]:
    ran = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, encoding="utf-8", check=True)
    return [name for name in ran.stdout.split("\0") if name]
