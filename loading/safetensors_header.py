"""Says what is wrong with a file that ought to be safetensors, from its header alone. Standard library only.

The format: the header's length in 8 bytes (little endian), the header in JSON, then the bytes of the tensors.
"""

from __future__ import annotations

import json
from pathlib import Path

_LONGEST_HEADER = 100_000_000
# How files begin that were renamed, or came in place of the one that was asked for.
_OTHER_KINDS = (
    (b"PK", "a zip archive, as torch.save writes it"),
    (b"\x80", "a pickle"),
    (b"<", "a web page: the download was refused"),
    (b"version https://git-lfs", "a Git LFS pointer: the file itself was not downloaded"),
)
TOO_SHORT = "it ends too early; copy or download it again"


def safetensors_problem(path: Path) -> str | None:
    """Why `path` is not a complete safetensors file, in words, or None when it is one."""
    try:
        if not path.is_file():
            return "there is no such file"
        size = path.stat().st_size
        with path.open("rb") as file:
            begin = file.read(32)
            length = int.from_bytes(begin[:8], "little")
            if not begin:
                return "it is empty"
            if begin[8:9] != b"{" or length > _LONGEST_HEADER:
                kinds = [kind for mark, kind in _OTHER_KINDS if begin.startswith(mark)]
                return f"it is not a safetensors file but {kinds[0]}" if kinds else "it is not a safetensors file"
            file.seek(8)
            header = file.read(length)
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    if len(header) < length:
        return TOO_SHORT
    try:
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        wanted = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return "its header is damaged; copy or download it again"
    if not tensors:
        return "it holds no tensors"
    if size < wanted:
        return TOO_SHORT
    return "it is longer than its header says; copy or download it again" if size > wanted else None
