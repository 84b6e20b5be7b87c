"""Paths. Everything that dev.py creates goes into `.dev/` and `output/`, both ignored by git."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEV = ROOT / ".dev"
VENV = DEV / "venv"
VENV_SCRIPTS = VENV / ("Scripts" if os.name == "nt" else "bin")
VENV_PYTHON = VENV_SCRIPTS / ("python.exe" if os.name == "nt" else "python")
COMFYUI = DEV / "ComfyUI"
FRONTEND = DEV / "frontend"
HOME = DEV / "home"
BYTECODE = DEV / "bytecode"
SERVER_LOG = DEV / "server.log"
OUTPUT = ROOT / "output"
WORKFLOWS = ROOT / "workflows"
LOCALES = ROOT / "locales"
DEMO_WEIGHTS = ROOT / "demo" / "weights"


def chosen_comfyui() -> Path | None:
    """The ComfyUI folder given by the environment variable COMFYUI_PATH, or None."""
    named = os.environ.get("COMFYUI_PATH", "").strip()
    return Path(named).expanduser().resolve() if named else None


def comfyui_folder() -> Path:
    """The ComfyUI folder to use: COMFYUI_PATH if set, otherwise our own in `.dev/`."""
    return chosen_comfyui() or COMFYUI
