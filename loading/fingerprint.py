"""Whether a file named by a node's input has changed: by its size and time, never its content, which may be many GB."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_BESIDE = "adapter_config.json"


def lora_fingerprint(name: str) -> list[tuple[str, int, int] | None]:
    """The fingerprint of a LoRA in ComfyUI's loras folders, and of the configuration next to it."""
    return [_state(path) for found in _places(name) for path in (found, found.with_name(_BESIDE))]


def _places(name: str) -> Iterator[Path]:
    """Where files of that name may be. Workflows saved on Windows have backslashes."""
    import folder_paths

    for folder in folder_paths.get_folder_paths("loras"):
        yield Path(folder, *name.replace("\\", "/").split("/"))


def _state(path: Path) -> tuple[str, int, int] | None:
    try:
        state = path.stat()
    except (OSError, ValueError):  # loading it will say why
        return None
    return str(path), state.st_size, state.st_mtime_ns
