"""Completes `pyproject.toml` and the pages for a release to ComfyUI's registry: `python dev.py registry`.

The registry wants the addresses of the repository and of the icon, and the pages tell what to clone. A repository can
move and be forked, so they are not written into the files that it keeps, but added where a release is made.
"""

from __future__ import annotations

import re
from pathlib import Path

ICON = "docs/pictures/icon.svg"
PAGES = ("README.md", "docs/quick-start.md")
UNKNOWN = "<address of this repository>"
"""What the pages say instead."""
ADDRESS = re.compile(r"https://[\w.-]+(/[\w.-]+){2,}")


def completed(text: str, address: str, tag: str) -> str:
    """The text of `pyproject.toml` with `[project.urls]` and the address of the icon.

    Args:
        address: of the repository, https://HOST/OWNER/NAME; tag: of the version, "v0.2.0".

    Raises:
        LookupError: the address or the tag is wrong, or the text has an address already.
    """
    address = _bare(address)
    if not ADDRESS.fullmatch(address):
        raise LookupError(f"--address is {address!r}; allowed: the repository's, such as https://HOST/OWNER/NAME.")
    found = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    version = found[1] if found else "none"
    if tag != f"v{version}":
        raise LookupError(f"--tag is {tag!r}, but pyproject.toml has version {version}; tag it v{version}.")
    if "[project.urls]" in text or text.count("[tool.comfy]\n") != 1:
        raise LookupError("pyproject.toml is complete already; take the one that git keeps.")
    urls = {
        "Repository": address,
        "Documentation": f"{address}/blob/{tag}/docs/index.md",
        "Bug Tracker": f"{address}/issues",
    }
    lines = ["[project.urls]", *(f'"{name}" = "{url}"' for name, url in urls.items()), "", "[tool.comfy]"]
    icon = f'Icon = "{address}/raw/{tag}/{ICON}"'
    return text.replace("[tool.comfy]\n", "\n".join([*lines, icon]) + "\n")


def complete(root: Path, address: str, tag: str) -> list[Path]:
    """Write `pyproject.toml` in `root` with its addresses, see `completed`, and PAGES with the repository's; return
    the paths."""
    path = root / "pyproject.toml"
    path.write_text(completed(path.read_text(encoding="utf-8"), address, tag), encoding="utf-8")
    pages = [root / name for name in PAGES]
    for page in pages:
        page.write_text(page.read_text(encoding="utf-8").replace(UNKNOWN, _bare(address)), encoding="utf-8")
    return [path, *pages]


def _bare(address: str) -> str:
    return address.removesuffix("/").removesuffix(".git")
