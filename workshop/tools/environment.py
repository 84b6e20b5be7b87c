"""The virtual environment in `.dev/venv`: created once, then recognised by a stamp file.

This is the development environment; users install requirements.txt into their own ComfyUI. Standard library only.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections import deque
from pathlib import Path

from . import comfyui_source
from .paths import DEV, FRONTEND, ROOT, VENV, VENV_PYTHON
from .terminal import Failure, Phase

OLDEST_PYTHON = (3, 10)
NEEDED_GIGABYTES = 8


def ensure_environment(comfyui: Path | None = None) -> Path:
    """Create whatever is missing in `.dev/` and return ComfyUI's folder.

    Args:
        comfyui: an existing ComfyUI; None unpacks one into `.dev/ComfyUI`.

    Raises:
        Failure: Python is too old, the disk too full, the network down, or the folder has no ComfyUI.
    """
    if sys.version_info < OLDEST_PYTHON:
        raise Failure(
            f"Python {'.'.join(map(str, OLDEST_PYTHON))} or newer is required; this is {sys.version.split()[0]}."
        )
    if comfyui is not None:
        comfyui = comfyui.expanduser().resolve()
        if not (comfyui / "main.py").is_file() or not (comfyui / "requirements.txt").is_file():
            raise Failure(f"There is no ComfyUI in {comfyui}: main.py or requirements.txt is missing.")
    else:
        comfyui = comfyui_source.COMFYUI
    if not _stamp_matches(comfyui):
        _build(comfyui)
    return comfyui


def _build(comfyui: Path) -> None:
    DEV.mkdir(exist_ok=True)
    free = shutil.disk_usage(DEV).free / 1e9
    if not VENV.exists() and free < NEEDED_GIGABYTES:
        raise Failure(f"The environment needs {NEEDED_GIGABYTES} GB of free disk space; only {free:.1f} GB are free.")
    if not _works():
        with Phase("Creating the virtual environment in .dev/venv"):
            made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True)
        if made.returncode:
            raise Failure(
                f"{sys.executable} could not create a virtual environment (on Debian or Ubuntu: install python3-venv): "
                + _last_line(made.stdout + made.stderr)
            )
    if comfyui == comfyui_source.COMFYUI:
        comfyui_source.ensure_comfyui(run_pip)
    # Python compiles what is imported when it is; to compile all of the packages takes a quarter of the time.
    requirements = [f"--requirement={path}" for path in _requirement_files(comfyui)]
    run_pip("Installing packages", ["install", "--no-compile", *requirements])
    # Users' frontends update by themselves, so the browser tests run on the newest as well as on the core's own.
    newest = ["--no-deps", "--upgrade", f"--target={FRONTEND}", "comfyui-frontend-package"]
    run_pip("Installing the newest frontend into .dev/frontend", ["install", *newest])
    _stamp().write_text(_fingerprint(comfyui), encoding="utf-8")


def run_pip(title: str, arguments: list[str]) -> None:
    """Run the environment's pip and show its progress; raise `Failure` with pip's own reason if it fails."""
    command = [str(VENV_PYTHON), "-m", "pip", *arguments, "--no-input", "--disable-pip-version-check"]
    process = subprocess.Popen(
        [*command, "--progress-bar=off"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    last: deque[str] = deque(maxlen=30)
    try:
        with Phase(title) as phase:
            for line in process.stdout:
                last.append(line)
                if line.lstrip().startswith(("Collecting ", "Downloading ", "Building ", "Installing ")):
                    phase.update(line.split(" from ")[0].strip()[:72])
            if process.wait():
                errors = [line for line in last if line.startswith("ERROR")] or list(last)[-1:]
                raise Failure(f"pip failed ({title.lower()}): {' '.join(errors)[:600].strip()}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _requirement_files(comfyui: Path) -> list[Path]:
    return [ROOT / "workshop/requirements.txt", comfyui / "requirements.txt"]


def _fingerprint(comfyui: Path) -> str:
    digest = hashlib.sha256()
    for path in _requirement_files(comfyui):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _stamp() -> Path:
    return VENV / "psa-requirements.sha256"


def _stamp_matches(comfyui: Path) -> bool:
    needed = (VENV_PYTHON, FRONTEND, _stamp(), comfyui / "requirements.txt")
    if not all(path.exists() for path in needed):
        return False
    return _stamp().read_text(encoding="utf-8") == _fingerprint(comfyui)


def _works() -> bool:
    """True if the environment's Python starts, finds pip and is recent enough."""
    if not VENV_PYTHON.exists():
        return False
    script = f"import pip, sys; sys.exit(sys.version_info < {OLDEST_PYTHON})"
    try:
        return subprocess.run([str(VENV_PYTHON), "-c", script], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]
