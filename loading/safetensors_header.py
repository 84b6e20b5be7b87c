"""The header of a safetensors file, and what is wrong with a file that ought to be one. Standard library only.

The format: the header's length in 8 bytes (little endian), the header in JSON, then the bytes of the tensors, without
gaps. Code that reads the tensors later can trust a header that passed here.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from .files import FileError, printable

_LONGEST_HEADER = 100_000_000
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
_MOST_DIMENSIONS = 16
_AGAIN = "copy or download it again"
_CONVERT = "get the .safetensors file instead, or convert it"
# How renamed files start, or files that came instead of the right one; and what to do.
_OTHER_KINDS = (
    (b"PK", "a zip archive, as torch.save writes it", _CONVERT),
    (b"\x80", "a pickle", _CONVERT),
    (b"GGUF", "a GGUF file", "name it .gguf and load it with Unet Loader (GGUF) of the node pack ComfyUI-GGUF"),
    (b"version https://git-lfs", "a Git LFS pointer: the file itself was not downloaded", "run git lfs pull"),
    (b"<", "a web page: the download was refused", "download it again, logged in where the page asks for it"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"7z\xbc\xaf", "a 7-Zip archive", "unpack it first"),
    (b"Rar!", "a RAR archive", "unpack it first"),
    (b"\x89HDF", "an HDF5 file", _CONVERT),
    (b"\x89PNG", "a picture", "get the model's file"),
    (b"\xff\xd8\xff", "a picture", "get the model's file"),
    (b"RIFF", "a picture or a sound", "get the model's file"),
    (bytes(32), "nothing but zeros: the download did not finish", _AGAIN),
)
TOO_SHORT = "it ends too early"
_DAMAGED = "its header is damaged"


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself.

    Attributes:
        tensors: name -> (type as the format writes it, for example BF16, and shape).
        metadata: the file's own texts. not_texts: names in the metadata that the format does not allow, because what
            they stand for is no text; libraries refuse such files.
    """

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    metadata: dict[str, str]
    not_texts: tuple[str, ...] = ()


def safetensors_problem(path: Path) -> str | None:
    """Why `path` is not a complete safetensors file, in words, or None if it is one."""
    try:
        read_header(path)
    except FileError as error:
        return f"{error.reason}; {error.do}"
    return None


def read_header(path: Path) -> Header:
    """The header of a complete safetensors file.

    Raises:
        FileError: it is missing, incomplete or another kind of file; says which, and what to do.
    """
    try:
        if not path.is_file():
            raise FileError(
                path, "there is no such file; a folder or a broken link may have its name", "download the file"
            )
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            begin = file.read(512)
            length = int.from_bytes(begin[:8], "little")
            if begin[8:9] != b"{" or length > _LONGEST_HEADER:
                raise _other_kind(path, begin)
            file.seek(8)
            data = file.read(length)
    except OSError as error:
        raise FileError(
            path, f"it cannot be read: {error.strerror or 'the system refuses it'}", "see that it may be read"
        ) from error
    if len(data) < length:
        raise FileError(path, TOO_SHORT, _AGAIN)
    header, end = _parsed(path, data)
    if not header.tensors:
        raise FileError(path, "it holds no tensors", _AGAIN)
    if size != 8 + length + end:
        short = size < 8 + length + end
        raise FileError(path, TOO_SHORT if short else "it is longer than its header says", _AGAIN)
    return header


def _other_kind(path: Path, begin: bytes) -> FileError:
    if not begin:
        return FileError(path, "it is empty", _AGAIN)
    text = begin.removeprefix(b"\xef\xbb\xbf").lstrip()
    for mark, kind, advice in _OTHER_KINDS:
        if begin.startswith(mark) or text.startswith(mark):
            return FileError(path, f"it is not a safetensors file but {kind}", advice)
    try:
        said = printable(" ".join(text.decode("utf-8").split()))
    except UnicodeDecodeError:
        said = ""
    if said.isascii() and said and "\\x" not in said:
        return FileError(path, f"it is not a safetensors file but text: {said[:60]!r}", _AGAIN)
    return FileError(path, "it is not a safetensors file", _AGAIN)


def _parsed(path: Path, data: bytes) -> tuple[Header, int]:
    """The header, and how many bytes its tensors take up."""
    try:
        entries = json.loads(data.decode("utf-8"))
        metadata = entries.pop("__metadata__", None) or {}
        texts = {key: value for key, value in metadata.items() if isinstance(value, str)}
        tensors = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
        places = sorted((*map(_whole, entry["data_offsets"]), name) for name, entry in entries.items())
        end = 0
        for start, stop, name in places:
            kind, shape = tensors[name]
            if kind not in _BITS:
                raise FileError(
                    path, f"it holds numbers of the unknown type {kind!r:.20}", f"update ComfyUI, or {_AGAIN}"
                )
            bits = math.prod(map(_whole, shape)) * _BITS[kind]
            if start != end or 8 * (stop - start) != bits or len(shape) > _MOST_DIMENSIONS:
                raise FileError(path, _DAMAGED, _AGAIN)
            end = stop
    except FileError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(path, _DAMAGED, _AGAIN) from error
    return Header(tensors, texts, tuple(sorted(metadata.keys() - texts.keys()))), end


def _whole(number: object) -> int:
    if type(number) is not int or number < 0:
        raise ValueError("no whole number")
    return number
