"""CogVideoX checkpoints: found in ComfyUI's model folders, checked, read, and made into a corrected MODEL.

A checkpoint is a .safetensors file with ComfyUI's or diffusers' names, or a folder as diffusers and huggingface-hub
write it: the whole pipeline (transformer/, scheduler/, vae/) or only the transformer, in one file or in shards. All
that headers and configs can tell is checked before a weight is read.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch

from ..choices.errors import InputError
from ..cogvideox.corrections import correct_model
from ..cogvideox.variant import Variant, find_variant
from .files import FileError, read_object
from .model_folders import FAMILY, find_folders
from .native_weights import NotCogVideoX, check_sizes, native_names, unused_scales, with_native_layers
from .recognise import describe, examples
from .safetensors_header import Header, read_header
from .tensor_file import read_tensors
from .weight_files import ENDINGS, is_shard, weight_files

NODE = "PSA CogVideoX Loader"
WEIGHT_DTYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}
"""The choices of ComfyUI's own loader, and what they mean to it."""

log = logging.getLogger("ComfyUI-PSA")


@dataclasses.dataclass(frozen=True)
class Checked:
    """A checkpoint that can be loaded, as far as its headers and configs tell.

    Attributes:
        files: the files with its weights, in reading order.
        names: name in a file -> ComfyUI's name, for every tensor that ComfyUI gets.
        unused: names of tensors that are not part of the model.
        variant: the model's variant.
    """

    path: Path
    files: list[Path]
    names: dict[str, str]
    unused: list[str]
    variant: Variant


def list_checkpoints() -> list[str]:
    """What the loader offers: the .safetensors files of `diffusion_models`, then folders that may be CogVideoX.

    The files of an offered folder are not offered separately, unless the folder lacks something.
    """
    folders = {name: folder for name, folder in find_folders().items() if not folder.is_another}
    inside = tuple(f"{name}/" for name, folder in folders.items() if folder.kind == FAMILY)
    nearly = tuple(f"{name}/" for name in folders)
    files = [
        name
        for plain, name in _files().items()
        if not plain.startswith(inside) and not (is_shard(plain) and plain.startswith(nearly))
    ]
    return [*files, *folders]


def load_checkpoint(name: str, weight_dtype: str = "default", *, disable_dynamic: bool = False) -> Any:
    """A ComfyUI MODEL of the checkpoint `name` of `list_checkpoints`, corrected for its variant.

    Args:
        weight_dtype: as in ComfyUI's own loader; default keeps the file's.
        disable_dynamic: set by ComfyUI when it loads the same checkpoint again.

    Raises:
        InputError: no such checkpoint, not CogVideoX, or one of its files is missing, incomplete or not safetensors;
            the message then names the file.
    """
    if not isinstance(weight_dtype, str) or weight_dtype not in WEIGHT_DTYPES:
        raise InputError.of_choice("weight_dtype", weight_dtype, WEIGHT_DTYPES, NODE)
    checked = check_checkpoint(name)
    try:
        model = _load(checked, weight_dtype, disable_dynamic)
    except FileError as error:
        raise _unusable(name, error) from error
    model.cached_patcher_init = (load_checkpoint, (name, weight_dtype))
    return model


def check_checkpoint(checkpoint: str) -> Checked:
    """Everything that can be said about a checkpoint without reading a weight.

    Raises:
        InputError: as `load_checkpoint`.
    """
    path = find_checkpoint(checkpoint)
    try:
        files = weight_files(path)
        header = _joined([read_header(file) for file in files])
        names = native_names(header.tensors)
        config, unused = check_sizes(path, header, names)
        unused += [name for name in header.tensors if name not in names]
        variant = find_variant(config, **read_configs(path))
    except NotCogVideoX as error:
        what, do = describe(header, "choose a CogVideoX transformer, as a file or as diffusers' folder")
        raise InputError("checkpoint", checkpoint, f"a CogVideoX checkpoint; {what}", NODE, do=do) from error
    except FileError as error:
        raise _unusable(checkpoint, error) from error
    except ValueError as error:
        raise _unusable(checkpoint, FileError(path, str(error))) from error
    return Checked(path, files, names, unused, variant)


def checkpoint_state(name: object) -> list[tuple[str, int, int]]:
    """Path, size and time of every file of a checkpoint: the value differs once one of them has changed."""
    try:
        path = find_checkpoint(name)
        files = list(weight_files(path))
        files += [] if path.is_file() else [place for place in _config_places(path).values() if place.is_file()]
        return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except (InputError, FileError, OSError):  # loading it will say why
        return []


def find_checkpoint(name: object) -> Path:
    """Where a checkpoint from `list_checkpoints` is: a file, or the folder with the transformer's files.

    Raises:
        InputError: there is none of that name, or it is a folder that cannot be CogVideoX as it is.
    """
    import folder_paths

    # Workflows saved on Windows have backslashes.
    plain = name.replace("\\", "/") if isinstance(name, str) else ""
    folders = find_folders()
    folder = folders.get(name if isinstance(name, str) and name in folders else plain)
    if folder is not None and folder.is_another:
        what, do = f"this folder is a {folder.kind} model's", "take ComfyUI's own file of it with Load Diffusion Model"
        raise InputError("checkpoint", name, f"a CogVideoX checkpoint; {what}", NODE, do=do)
    if folder is not None and folder.problem is not None:
        raise _unusable(name, folder.problem)
    if folder is not None:
        return folder.weights
    listed = _files().get(plain)
    file = listed and folder_paths.get_full_path("diffusion_models", listed)
    if not file:
        do = "press R to read the menu again, then choose from it"
        raise InputError("checkpoint", name, "a file or a folder that the menu lists", NODE, do=do)
    return Path(file)


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a checkpoint under ComfyUI's names, and the metadata of its first file. No tensor is copied.

    Raises:
        FileError: a file is missing, incomplete or not safetensors; names the file.
    """
    files = weight_files(path)
    return _read(files, native_names(_joined([read_header(file) for file in files]).tensors))


def read_configs(path: Path) -> dict[str, dict[str, Any]]:
    """The config files of a diffusers folder, by part: transformer, scheduler, vae. Empty for a bare file."""
    if path.is_file():
        return {}
    return {part: read_object(place) for part, place in _config_places(path).items() if place.is_file()}


def _config_places(path: Path) -> dict[str, Path]:
    return {
        "transformer": path / "config.json",
        "scheduler": path.parent / "scheduler" / "scheduler_config.json",
        "vae": path.parent / "vae" / "config.json",
    }


def _load(checked: Checked, weight_dtype: str, disable_dynamic: bool) -> Any:
    import comfy.model_management
    import comfy.sd

    if checked.unused:
        count, some = len(checked.unused), examples(checked.unused)
        log.warning(
            "PSA: %s: %d tensors are not part of CogVideoX and not used, for example %s", checked.path, count, some
        )
    tensors, metadata = _read(checked.files, checked.names)
    dynamic = {"disable_dynamic": True} if disable_dynamic else {}
    try:
        model = comfy.sd.load_diffusion_model_state_dict(
            tensors, model_options=dict(WEIGHT_DTYPES[weight_dtype]), metadata=metadata or None, **dynamic
        )
    except (MemoryError, torch.cuda.OutOfMemoryError, comfy.model_management.InterruptProcessingException):
        raise
    except Exception as error:  # a stranger's weights can set off anything in ComfyUI
        log.warning("PSA: %s", checked.path, exc_info=True)
        raise FileError(checked.path, "ComfyUI cannot make a model of its weights") from error
    if model is None or model.model.model_config.unet_config.get("image_model") != "cogvideox":
        raise FileError(checked.path, "ComfyUI does not take its weights for CogVideoX", "update ComfyUI")
    unscaled = unused_scales(checked.names.values(), model.model.state_dict())
    if unscaled:
        reason = f"ComfyUI does not use the scales of its weights, so these would be wrong, for example {unscaled[0]}"
        do = "take a file in ComfyUI's own fp8 format, or the bf16 file with weight_dtype fp8_e4m3fn"
        raise FileError(checked.path, reason, do)
    return correct_model(model, checked.variant, NODE)


def _read(files: list[Path], names: dict[str, str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        found, about = read_tensors(file)
        metadata = metadata or about
        tensors.update((names[key], found[key]) for key in list(found) if key in names)
    return tensors, with_native_layers(metadata, names)


def _joined(headers: list[Header]) -> Header:
    """The headers of a checkpoint's files merged into one, with the metadata of the first file that has any."""
    tensors = {name: entry for header in headers for name, entry in header.tensors.items()}
    return Header(tensors, next((header.metadata for header in headers if header.metadata), {}))


def _files() -> dict[str, str]:
    """Name with slashes -> ComfyUI's name, for the .safetensors files of `diffusion_models`."""
    import folder_paths

    names = folder_paths.get_filename_list("diffusion_models")
    return {name.replace("\\", "/"): name for name in names if name.lower().endswith(ENDINGS)}


def _unusable(name: object, error: FileError) -> InputError:
    do = f"{error.do}, or choose another checkpoint"
    return InputError("checkpoint", name, f"a checkpoint that can be used; {error}", NODE, do=do)
