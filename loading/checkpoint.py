"""CogVideoX checkpoints: found in ComfyUI's model folders, read, and made into a corrected MODEL.

A checkpoint is a native .safetensors file, or a folder as diffusers and huggingface-hub write it: the whole pipeline
(transformer/, scheduler/, vae/) or the transformer alone, in one file or in shards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..cogvideox.corrections import correct_model
from ..cogvideox.variant import find_variant
from ..errors import InputError
from .names import COGVIDEOX, to_native
from .tensor_file import FileError, read_tensors

NODE = "PSA CogVideoX Loader"
WEIGHT_DTYPES = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}
"""The choices of ComfyUI's own loader, and what they mean to it."""
_CLASS = "CogVideoXTransformer3DModel"
_INDEX = "diffusion_pytorch_model.safetensors.index.json"
"""The name that diffusers writes; a variant such as fp16 stands in the middle of it."""


def list_checkpoints() -> list[str]:
    """What the loader offers: the .safetensors files of `diffusion_models`, then the CogVideoX folders."""
    import folder_paths

    folders = _folders()
    inside = tuple(f"{name}/" for name in folders)
    files = [
        name
        for name in folder_paths.get_filename_list("diffusion_models")
        if name.lower().endswith((".safetensors", ".sft")) and not Path(name).as_posix().startswith(inside)
    ]
    return [*files, *folders]


def load_checkpoint(name: str, weight_dtype: str = "default", *, disable_dynamic: bool = False) -> Any:
    """A ComfyUI MODEL of the checkpoint `name` of `list_checkpoints`, corrected for its variant.

    Args:
        weight_dtype: as ComfyUI's own loader has it; default keeps the file's.
        disable_dynamic: ComfyUI asks for it when it loads the same checkpoint once more.

    Raises:
        InputError: no such checkpoint, not CogVideoX, or a file of it is missing, incomplete or not safetensors; the
            message then names the file.
    """
    if weight_dtype not in WEIGHT_DTYPES:
        raise InputError.of_choice("weight_dtype", weight_dtype, WEIGHT_DTYPES, NODE)
    try:
        model = _load(name, weight_dtype, disable_dynamic)
    except FileError as error:
        do = "mend or download it again, or choose another checkpoint"
        raise InputError("checkpoint", name, f"a checkpoint that can be used; {error}", NODE, do=do) from error
    model.cached_patcher_init = (load_checkpoint, (name, weight_dtype))
    return model


def _load(name: str, weight_dtype: str, disable_dynamic: bool) -> Any:
    import comfy.sd

    path = find_checkpoint(name)
    tensors, metadata = read_checkpoint(path)
    given = set(tensors)
    dynamic = {"disable_dynamic": True} if disable_dynamic else {}
    model = comfy.sd.load_diffusion_model_state_dict(
        tensors, model_options=dict(WEIGHT_DTYPES[weight_dtype]), metadata=metadata or None, **dynamic
    )
    if model is None or model.model.model_config.unet_config.get("image_model") != "cogvideox":
        do = "choose a CogVideoX checkpoint, or load this one with the loader for its kind"
        raise InputError("checkpoint", name, f"a CogVideoX checkpoint; this one has {_examples(given)}", NODE, do=do)
    _refuse_missing(model, given, path)
    try:
        variant = find_variant(model.model.model_config.unet_config, **read_configs(path))
    except ValueError as error:
        raise FileError(path, str(error)) from error
    return correct_model(model, variant, NODE)


def find_checkpoint(name: str) -> Path:
    """Where a checkpoint of `list_checkpoints` lies: a file or the folder with the transformer's files."""
    import folder_paths

    folder = _folders().get(name)
    if folder is not None:
        return folder
    file = folder_paths.get_full_path("diffusion_models", name) if name in list_checkpoints() else None
    if file is None:
        do = "press R to read the menu again, then choose from it"
        raise InputError("checkpoint", name, "a file or a folder that the menu lists", NODE, do=do)
    return Path(file)


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a checkpoint under ComfyUI's names, and the metadata of its first file. No tensor is copied.

    Raises:
        FileError: a file is missing, incomplete or not safetensors; names the file.
    """
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, str] = {}
    for file in weight_files(path):
        found, about = read_tensors(file)
        metadata = metadata or about
        tensors.update((to_native(key, COGVIDEOX), found[key]) for key in list(found))
    return tensors, metadata


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights of a checkpoint.

    Raises:
        FileError: there are none, or a shard that the index names is missing.
    """
    if path.is_file():
        return [path]
    index = next(iter(sorted(path.glob("*.safetensors.index.json"))), path / _INDEX)
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        if not names or any(Path(name).name != name for name in names):
            raise FileError(index, "it must list files of its own folder")
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise FileError(path / missing[0], f"this shard is missing ({len(missing)} of {len(names)} are)")
        return [path / name for name in names]
    files = sorted(path.glob("*.safetensors"))
    whole = [file for file in files if file.name == "diffusion_pytorch_model.safetensors"] or files
    if len(whole) == 1 and "-of-" not in whole[0].name:
        return whole
    if not files:
        raise FileError(path, "the folder holds no .safetensors file")
    raise FileError(index, f"it is missing, and {len(files)} files are there; download it too")


def read_configs(path: Path) -> dict[str, dict[str, Any]]:
    """The config files of a diffusers folder, by part: transformer, scheduler, vae. Empty for a bare file."""
    if path.is_file():
        return {}
    places = {
        "transformer": path / "config.json",
        "scheduler": path.parent / "scheduler" / "scheduler_config.json",
        "vae": path.parent / "vae" / "config.json",
    }
    return {part: read_json(place) for part, place in places.items() if place.is_file()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        FileError: it cannot be read or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(path, f"it cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise FileError(path, "it must hold a JSON object")
    return found


def _folders() -> dict[str, Path]:
    """Name in the menu -> folder with the transformer's files, of every CogVideoX folder up to two levels deep."""
    import folder_paths

    found: dict[str, Path] = {}
    for root in (*folder_paths.get_folder_paths("diffusers"), *folder_paths.get_folder_paths("diffusion_models")):
        for config in _configs(Path(root)):
            folder = config.parent
            shown = folder.parent if folder.name == "transformer" and folder.parent != Path(root) else folder
            found.setdefault(shown.relative_to(root).as_posix(), folder)
    return dict(sorted(found.items()))


def _configs(root: Path) -> Iterator[Path]:
    for pattern in ("*/config.json", "*/transformer/config.json", "*/*/transformer/config.json"):
        for config in root.glob(pattern):
            try:
                if read_json(config).get("_class_name") == _CLASS:
                    yield config
            except FileError:
                continue  # another program's file


def _refuse_missing(model: Any, given: set[str], path: Path) -> None:
    """ComfyUI would leave weights that no file held as they are, which is noise."""
    prefixes = ("", "model.diffusion_model.", "diffusion_model.")
    wanted = [key for key in model.model.diffusion_model.state_dict() if key.endswith((".weight", ".bias"))]
    missing = [key for key in wanted if not any(prefix + key in given for prefix in prefixes)]
    if missing:
        raise FileError(path, f"{len(missing)} of {len(wanted)} weights are missing, such as {_examples(missing)}")


def _examples(names: Any) -> str:
    return ", ".join(sorted(names)[:3])
