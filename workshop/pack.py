"""How scripts import the pack: the way ComfyUI does, from its `__init__.py`. The repository root must never be on
sys.path, because ComfyUI has its own top-level module `nodes`.

A script started by its path loads this file without sys.path as well:

    runpy.run_path(str(Path(__file__).resolve().parents[1] / "pack.py"))["load_pack"]()
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def load_pack() -> ModuleType:
    """Import this repository's pack as `comfyui_psa`."""
    return load_package("comfyui_psa", ROOT)


def load_package(name: str, folder: Path) -> ModuleType:
    """Import the package in `folder` as `name`.

    Raises:
        FileNotFoundError: it has no `__init__.py`.
    """
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
