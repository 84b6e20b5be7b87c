"""Reads the tensors of safetensors files. Never unpickles anything."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from .files import FileError as FileError
from .files import printable
from .safetensors_header import read_header

log = logging.getLogger("ComfyUI-PSA")


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a file, as views of the file if possible, and its metadata.

    Raises:
        FileError: it is missing, incomplete or not a safetensors file.
    """
    import comfy.utils

    if path.suffix.lower() not in (".safetensors", ".sft"):
        raise FileError(path, "only .safetensors files are read", "convert it first")
    header = read_header(path)
    try:
        tensors, _ = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    except MemoryError:
        raise
    except Exception as error:  # several libraries read files here, each with its own errors
        log.warning("PSA: %s: %s", path, error)
        if header.not_texts:
            reason = f"its metadata must be text, and {printable(header.not_texts[0][:60])} is not"
            raise FileError(
                path, reason, "save it again with the safetensors library, or choose another file"
            ) from error
        raise FileError(path, "its header is right, but its tensors cannot be read") from error
    return tensors, header.metadata
