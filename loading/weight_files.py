"""Which files hold the weights of a checkpoint: one file, or the shards of a folder as diffusers writes it."""

from __future__ import annotations

import re
from pathlib import Path

from .files import FileError, printable, read_object

ENDINGS = (".safetensors", ".sft")
INDEX = "diffusion_pytorch_model.safetensors.index.json"
"""The name that diffusers writes; a variant (for example fp16) goes in the middle of it."""
_WHOLE = "diffusion_pytorch_model.safetensors"
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.\w+$")
_ACCESS = "see that it may be read, and that its disk is there"
_UNFINISHED = (".incomplete", ".part", ".partial", ".aria2", ".crdownload", ".tmp", ".download")


def is_shard(name: str) -> bool:
    """Whether a file is one of several, by its name: 'model-00001-of-00002.safetensors'."""
    found = _SHARD.search(name)
    return found is not None and int(found[2]) != 1


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights of a checkpoint.

    Raises:
        FileError: there are none, or some are missing; says what to do.
    """
    if path.is_file():
        return [path]
    names = list_names(path)
    indexes = sorted(
        (name for name in names if name.endswith(".safetensors.index.json")), key=lambda n: (n != INDEX, n)
    )
    problems: list[FileError] = []
    for name in indexes:
        try:
            return _indexed(path, name)
        except FileError as problem:
            problems.append(problem)
    files = [path / name for name in names if name.lower().endswith(ENDINGS) and (path / name).is_file()]
    whole = [file for file in files if not is_shard(file.name)]
    whole = [file for file in whole if file.name == _WHOLE] or whole
    if len(whole) == 1:
        return whole
    if problems:
        raise problems[0]
    raise _nothing_to_load(path, names, files, whole)


def list_names(folder: Path) -> list[str]:
    """The entries of a folder, by name.

    Raises:
        FileError: the folder cannot be read.
    """
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise FileError(
            folder, f"the folder cannot be read: {error.strerror or 'the system refuses it'}", _ACCESS
        ) from error


def _indexed(folder: Path, index: str) -> list[Path]:
    """The files that an index lists, checked to be all there."""
    listed = read_object(folder / index).get("weight_map")
    names = list(listed.values()) if isinstance(listed, dict) else []
    if not names or not all(isinstance(name, str) and name and Path(name).name == name for name in names):
        raise FileError(folder / index, "it must list files of its own folder under weight_map")
    names = sorted(set(names))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        reason = f"this shard is missing ({len(missing)} of {len(names)} are)"
        raise FileError(folder / missing[0], reason, "download it too")
    return [folder / name for name in names]


def _nothing_to_load(folder: Path, names: list[str], files: list[Path], whole: list[Path]) -> FileError:
    if whole:
        listed = ", ".join(printable(file.name) for file in whole[:4])
        return FileError(folder, f"it holds {len(whole)} models ({listed})", f"keep one, or name one {_WHOLE}")
    if files:
        return FileError(folder / INDEX, f"it is missing, and {len(files)} files are there", "download it too")
    reason = "the folder holds no .safetensors file"
    unfinished = [name for name in names if name.lower().endswith(_UNFINISHED)]
    pickles = [name for name in names if name.lower().endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if unfinished:
        return FileError(folder, f"{reason}; {printable(unfinished[0])} did not finish", "start that download again")
    if pickles:
        reason += f"; {printable(pickles[0])} is a pickle, which is not read"
        return FileError(folder, reason, "download the .safetensors files instead")
    return FileError(folder, reason, "download those of transformer/ from the model's page")
