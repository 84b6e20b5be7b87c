"""ComfyUI's LoRA folders: what is in them, and where a download goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..choices.errors import InputError
from .download import FILE, REPOSITORY, DownloadError, check_names, download_lora
from .own_folders import OWN_LORAS


def list_loras() -> list[str]:
    """What the loader offers: the .safetensors files of ComfyUI's loras folders."""
    import folder_paths

    return [name for name in folder_paths.get_filename_list("loras") if name.lower().endswith(".safetensors")]


def check_download(repository: str, file: str) -> None:
    """Raise InputError for names that cannot belong to a repository or a LoRA file."""
    for field, given, allowed, pair in (
        ("repository", repository, f"owner/name, as in {REPOSITORY}", (repository.strip(), FILE)),
        ("file", file, f"a .safetensors file of the repository, as in {FILE}", (REPOSITORY, file.strip())),
    ):
        try:
            check_names(*pair)
        except DownloadError as error:
            do = f"copy the {field} from its page on huggingface.co"
            raise InputError(field, given, allowed, "PSA LoRA Download", do=do) from error


def download_into_loras(repository: str, file: str) -> str:
    """Download into ComfyUI's first loras folder with ComfyUI's progress bar; returns the name in the LoRA menus.

    Raises:
        DownloadError: see `download.download_lora`.
    """
    import folder_paths

    folders = [Path(path) for path in folder_paths.get_folder_paths("loras") if Path(path) != OWN_LORAS]
    if not folders:
        raise DownloadError("ComfyUI has no loras folder")
    folders[0].mkdir(parents=True, exist_ok=True)
    path = download_lora(folders[0].resolve(), repository.strip(), file.strip(), progress=_progress_class())
    return str(path.relative_to(folders[0].resolve()))


def _progress_class() -> type[Any]:
    """A tqdm that also moves ComfyUI's progress bar, and stops when the user interrupts."""
    import comfy.model_management
    import comfy.utils
    from tqdm import tqdm

    bar = comfy.utils.ProgressBar(1)

    class ComfyProgress(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            shown = super().update(n)
            if self.total:
                bar.update_absolute(int(self.n), int(self.total))
            return shown

    return ComfyProgress
