"""The static checks: style, layers, types. For `dev.py check`, CI and pre-commit.

The last two need the pack under the name it is imported by. The repository's folder may be called anything, so a link
in a temporary folder gives it that name.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .paths import DEV, ROOT, VENV_SCRIPTS
from .server import link_pack

NAME = "comfyui_psa"
KINDS = ("style", "layers", "types")


def run_checks(kinds: list[str], root: Path = ROOT) -> bool:
    """Run the given `KINDS` of checks, each to the end, and print what they find. True if they find nothing."""
    with linked_as_package(root) as folder:
        codes = [subprocess.run(command, cwd=folder).returncode for kind in kinds for command in _commands(kind, root)]
    return not any(codes)


def _commands(kind: str, root: Path) -> list[list[str | Path]]:
    config = root / "pyproject.toml"
    if kind == "style":
        ruff = VENV_SCRIPTS / "ruff"
        return [[ruff, "check", root], [ruff, "format", "--check", root]]
    if kind == "layers":
        return [[VENV_SCRIPTS / "lint-imports", "--no-logo", "--no-cache", config]]
    return [[VENV_SCRIPTS / "mypy", f"--config-file={config}", f"--cache-dir={DEV / 'mypy_cache'}"]]


@contextlib.contextmanager
def linked_as_package(root: Path) -> Iterator[Path]:
    """A temporary folder in which `root` is the package `comfyui_psa`."""
    with tempfile.TemporaryDirectory() as folder:
        link_pack(Path(folder) / NAME, root)
        yield Path(folder)
