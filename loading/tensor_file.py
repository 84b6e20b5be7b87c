"""Reads safetensors files, and says in words what is wrong with one that cannot be read. Never unpickles anything."""

from __future__ import annotations

from pathlib import Path

import torch

from .safetensors_header import safetensors_problem


class FileError(ValueError):
    """A file that cannot be used: the message names it and says why."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{Path(path).name}: {reason} ({path})")


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a file, as views of the file where that is possible, and its metadata.

    Raises:
        FileError: missing, incomplete, or not a safetensors file.
    """
    import comfy.utils

    if path.suffix.lower() not in (".safetensors", ".sft"):
        raise FileError(path, "only .safetensors files are read; convert it first")
    problem = safetensors_problem(path)
    if problem is not None:
        raise FileError(path, problem)
    try:
        tensors, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    except (OSError, ValueError, RuntimeError) as error:  # safetensors' own error is among them
        raise FileError(path, f"it cannot be read: {' '.join(str(error).split())[:300]}") from error
    return tensors, metadata or {}
