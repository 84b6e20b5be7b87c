"""Reads safetensors files, and says in words what is wrong with one that cannot be read. Never unpickles anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")

# How files begin that are renamed to .safetensors: zip (torch.save), pickle, HTML or LFS pointers in place of the file.
_OTHER_KINDS = (
    (b"PK", "a zip archive, as torch.save writes it"),
    (b"\x80", "a pickle"),
    (b"<", "a web page: the download was refused"),
    (b"version https://git-lfs", "a Git LFS pointer: the file itself was not downloaded"),
)


class FileError(ValueError):
    """A file that cannot be used: the message names it and says why."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{Path(path).name}: {reason} ({path})")
        self.reason = reason


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a file, as views of the file where that is possible, and its metadata.

    Raises:
        FileError: missing, incomplete, or not a safetensors file.
    """
    import comfy.utils

    check_file(path)
    tensors, metadata = reading(
        path, lambda: comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    )
    return tensors, metadata or {}


def check_file(path: Path) -> None:
    """Raise `FileError` unless `path` is a complete safetensors file. Reads its header alone."""
    from safetensors import safe_open

    if path.suffix.lower() not in (".safetensors", ".sft"):
        raise FileError(path, "only .safetensors files are read; convert it first")
    if not path.is_file():
        raise FileError(path, "there is no such file")

    def names() -> list[str]:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())

    if not reading(path, names):
        raise FileError(path, "it holds no tensors")


def reading(path: Path, read: Callable[[], Result]) -> Result:
    """What `read` returns, its errors turned into `FileError`."""
    try:
        return read()
    except Exception as error:
        raise FileError(path, _reason(path, error)) from error


def _reason(path: Path, error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError):
        return f"it cannot be read: {error.strerror or text}"
    with path.open("rb") as file:
        begin = file.read(32)
    if not begin:
        return "it is empty"
    for mark, kind in _OTHER_KINDS:
        # A header of a safetensors file begins with its length in 8 bytes, then a brace.
        if begin.startswith(mark) and begin[8:9] != b"{":
            return f"it is not a safetensors file but {kind}"
    if "IncompleteBuffer" in text or "HeaderTooSmall" in text or "InvalidHeaderLength" in text:
        return "it ends too early; copy or download it again"
    return f"it is not a valid safetensors file: {text.splitlines()[0] if text else type(error).__name__}"
