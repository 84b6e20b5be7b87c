#!/usr/bin/env python3
"""Packs a trained model into a few small files, for places that do not accept large ones.

    python workshop/training/parcel.py pack FOLDER PARTS [--mebibytes 15]
    python workshop/training/parcel.py unpack PARTS FOLDER

Rounded weights (see `files.on_grid`) are stored losslessly as 8-bit integers with one step size per row, compressed.
"""

from __future__ import annotations

import argparse
import io
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load, safe_open, save

PART = "psa_model.part{number}of{count}"
STEP = ".row_step"
"""Suffix of the tensor that holds the step sizes of a weight stored as integers."""


def contents(folder: Path) -> list[Path]:
    """The finished files in a model's folder that go into a parcel."""
    return sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".jpg", ".json"))


def pack(folder: Path, parts: Path, mebibytes: float = 15.0) -> list[Path]:
    """Write the model in `folder`, with its pictures and figures, as parts of limited size, and return their paths.

    Parts of an earlier parcel are replaced only once all the new ones are written.
    """
    box = io.BytesIO()
    with zipfile.ZipFile(box, "w", zipfile.ZIP_DEFLATED) as parcel:
        for path in contents(folder):
            content = path.read_bytes()
            if path.suffix == ".safetensors":
                content = _rewritten(path, content, _to_numbers)
            parcel.writestr(str(path.relative_to(folder).as_posix()), content)
    content, size = box.getvalue(), int(mebibytes * 2**20)
    count = -(-len(content) // size)
    parts.mkdir(parents=True, exist_ok=True)
    old, new = set(parts.glob(PART.format(number="*", count="*"))), []
    for number in range(count):
        path = parts / PART.format(number=number + 1, count=count)
        unfinished = path.with_suffix(path.suffix + "-unfinished")
        unfinished.write_bytes(content[number * size : (number + 1) * size])
        new.append((unfinished, path))
    for unfinished, path in new:
        unfinished.replace(path)
    for path in old - {path for _, path in new}:
        path.unlink()
    return [path for _, path in new]


def unpack(parts: Path, folder: Path) -> None:
    """Write a parcel's model into `folder`.

    Raises:
        FileNotFoundError: there is no parcel, or a part is missing; the message names it.
        ValueError: the parts belong to different parcels.
    """
    found = sorted(parts.glob(PART.format(number="*", count="*")))
    if not found:
        raise FileNotFoundError(f"There is no {PART.format(number=1, count='N')} in {parts}.")
    count = int(found[0].name.rsplit("of", 1)[1])
    wanted = [parts / PART.format(number=number + 1, count=count) for number in range(count)]
    missing = [path.name for path in wanted if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)} is missing from {parts}; copy all parts of the model there.")
    try:
        with zipfile.ZipFile(io.BytesIO(b"".join(path.read_bytes() for path in wanted))) as parcel:
            if parcel.testzip():
                raise zipfile.BadZipFile
            for name in parcel.namelist():
                target = folder / name
                if not target.resolve().is_relative_to(folder.resolve()):
                    raise ValueError(f"The parcel in {parts} would write outside {folder}.")
                content = parcel.read(name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
                if target.suffix == ".safetensors":
                    target.write_bytes(_rewritten(target, content, _from_numbers))
    except (zipfile.BadZipFile, zlib.error):
        raise ValueError(f"The parts in {parts} do not belong together; copy them again.") from None


State = dict[str, torch.Tensor]


def _rewritten(path: Path, content: bytes, change: Callable[[State], State]) -> bytes:
    """The content of a safetensors file with changed tensors and the same metadata."""
    with safe_open(str(path), framework="pt") as file:
        facts = file.metadata()
    return save(change(load(content)), metadata=facts)


def _to_numbers(state: State) -> State:
    found = {}
    for name, value in state.items():
        found[name] = value
        if value.ndim != 2 or value.dtype != torch.bfloat16:
            continue
        weight = value.float()
        # With this step size, the largest weight of a row is 64 to 127 steps: as fine as any grid of up to 8 bits.
        step = torch.exp2(torch.floor(torch.log2(weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / 64)))
        numbers = weight / step
        if bool((numbers == numbers.round()).all()) and float(numbers.abs().max()) <= 127:
            found[name], found[name + STEP] = numbers.to(torch.int8), step.to(torch.bfloat16)
    return found


def _from_numbers(state: State) -> State:
    return {
        name: (value.float() * state[name + STEP].float()).to(torch.bfloat16) if name + STEP in state else value
        for name, value in state.items()
        if not name.endswith(STEP)
    }


def main() -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, paths in (("pack", ("folder", "parts")), ("unpack", ("parts", "folder"))):
        command = commands.add_parser(name)
        for path in paths:
            command.add_argument(path, type=Path)
        if name == "pack":
            command.add_argument("--mebibytes", type=float, default=15.0, help="maximum size of a part")
    arguments = parser.parse_args()
    try:
        if arguments.command == "pack":
            for path in pack(arguments.folder, arguments.parts, arguments.mebibytes):
                print(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")
        else:
            unpack(arguments.parts, arguments.folder)
            print(f"the model is in {arguments.folder}")
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
