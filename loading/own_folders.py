"""Folders of this pack that ComfyUI's own menus list, each file in the menu of its kind and in no other."""

from __future__ import annotations

from pathlib import Path

_PACK = Path(__file__).resolve().parent.parent
OWN_LORAS = _PACK / "weights"
"""Where the paper's own download command puts its LoRA."""
OWN_FOLDERS = {
    "loras": OWN_LORAS,
    "diffusion_models": _PACK / "demo" / "weights" / "diffusion_models",
    "vae": _PACK / "demo" / "weights" / "vae",
}
"""ComfyUI's name for a kind of file -> our folder for it. None is inside another: menus list subfolders too."""


def register_own_folders() -> None:
    """Let ComfyUI's menus list the files in our folders: downloaded LoRAs, and the demo's model and VAE."""
    import folder_paths

    for kind, folder in OWN_FOLDERS.items():
        folder_paths.add_model_folder_path(kind, str(folder))
