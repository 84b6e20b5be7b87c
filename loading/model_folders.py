"""Folders in diffusers' layout in ComfyUI's model folders: which of them may be CogVideoX, and what they lack.

Unless a folder is clearly another model's, it is offered even if it lacks something; choosing it then says what.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .files import FileError, read_object
from .weight_files import ENDINGS, is_shard, list_names

TRANSFORMER = "CogVideoXTransformer3DModel"
FAMILY = "CogVideoX"
# owner/name, and models--owner--name/snapshots/HASH of the hub's cache.
_DEEPEST = 4
_MOST_FOLDERS = 2000
_PIPELINE_PARTS = ("transformer", "scheduler", "vae", "tokenizer", "text_encoder", "unet")


@dataclass(frozen=True)
class ModelFolder:
    """One folder.

    Attributes:
        weights: where the transformer's files are, or should be.
        kind: the family that its config names, for example CogVideoX or Wan; "" if it names none.
        problem: why it cannot be CogVideoX as it is, from its folders and configs alone; None if nothing is wrong.
    """

    weights: Path
    kind: str
    problem: FileError | None

    @property
    def is_another(self) -> bool:
        """Whether it is clearly another model's."""
        return self.kind not in ("", FAMILY)


def find_folders() -> dict[str, ModelFolder]:
    """Name with slashes -> folder, in `diffusers` and `diffusion_models`; includes folders of other models."""
    import folder_paths

    found: dict[str, ModelFolder] = {}
    for category in ("diffusers", "diffusion_models"):
        for root in map(Path, folder_paths.get_folder_paths(category)):
            for folder in _walk(root, whatever=category == "diffusers"):
                found.setdefault(folder.relative_to(root).as_posix(), _look(folder))
    return dict(sorted(found.items()))


def _walk(root: Path, whatever: bool) -> Iterator[Path]:
    """The folders below `root` that look like a model's; `whatever` adds its direct subfolders that hold no model."""
    left = _MOST_FOLDERS

    def below(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
        nonlocal left
        for child in _folders_in(folder):
            real = os.path.realpath(child)
            left -= 1
            if real in above or left < 0:  # a link back to a parent
                continue
            if _looks_like_a_model(child, parts=1 if whatever else 2):
                yield child
                continue
            inner = list(below(child, (*above, real))) if len(above) < _DEEPEST else []
            yield from inner
            if whatever and len(above) == 1 and not inner:
                yield child

    yield from below(root, (os.path.realpath(root),))


def _folders_in(folder: Path) -> list[Path]:
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    if entry.is_dir() and not entry.name.startswith("."):
                        found.append(folder / entry.name)
                except OSError:  # a link to itself
                    continue
    except OSError:  # choosing it will say why
        pass
    return sorted(found)


def _looks_like_a_model(folder: Path, parts: int) -> bool:
    """Whether a folder looks like diffusers' layout: configs, shards, or that many parts of a pipeline."""
    try:
        names = list_names(folder)
    except FileError:
        return False
    found = sum(name in _PIPELINE_PARTS for name in names)
    shards = any(is_shard(name) and name.lower().endswith(ENDINGS) for name in names)
    marks = "model_index.json" in names or "config.json" in names or "transformer" in names or found >= parts
    return marks or shards or any(name.endswith(".safetensors.index.json") for name in names)


def _look(folder: Path) -> ModelFolder:
    inside = folder / "transformer"
    weights = inside if _is_folder(inside) else folder
    try:
        whole = _family(folder / "model_index.json")
    except FileError:  # nothing in it is needed
        whole = ""
    try:
        kind = _family(weights / "config.json") or whole
    except FileError as problem:
        return ModelFolder(weights, whole, problem)
    return ModelFolder(weights, kind, _without_transformer(folder) if weights is folder else None)


def _family(config: Path) -> str:
    """The model family that a config names; '' if there is no config or it names none.

    Raises:
        FileError: the config is broken.
    """
    if not os.path.lexists(config):
        return ""
    entries = read_object(config)
    name = entries.get("_class_name") or entries.get("model_type")
    if not isinstance(name, str):
        return ""
    if name == TRANSFORMER or (config.name == "model_index.json" and name.startswith(FAMILY)):
        return FAMILY
    vae = re.fullmatch(r"AutoencoderKL(\w*)", name)
    words = re.split(r"(?:Video)?(?:Transformer|Pipeline|ImageToVideo|TextToVideo|UNet|Model$)", name)
    return f"{vae[1]} VAE".strip() if vae else words[0] or "Stable Diffusion"


def _without_transformer(folder: Path) -> FileError | None:
    """What to say about a folder without transformer/, or None if it holds the transformer's files itself."""
    names = list_names(folder)
    if "config.json" in names or any(name.lower().endswith((*ENDINGS, ".index.json")) for name in names):
        return None
    about = "download transformer/ and scheduler/ of a CogVideoX model from its page"
    if "transformer" in names:
        return FileError(folder / "transformer", "it is no folder that can be read", about)
    return FileError(folder, "the folder has no transformer/ in it", about)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False
