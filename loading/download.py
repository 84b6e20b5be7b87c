"""Downloads a LoRA from the Hugging Face hub into a folder, only on request.

huggingface-hub talks to the server. Its own download into a folder starts again from zero after a break (2.4), so we
keep the partial file: `<name>.<etag>.incomplete` next to the target, renamed once it is complete. Standard library and
huggingface-hub only: `dev.py weights` uses this file without ComfyUI.
"""

from __future__ import annotations

import errno
import hashlib
import inspect
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from .safetensors_header import safetensors_problem

REPOSITORY = "GYP666/BLADE"
FILE = "cogvideox-5b-psa-lora/pytorch_lora_weights.safetensors"
"""The 4-step LoRA for CogVideoX-5B that was trained with PSA (arXiv 2512.04025)."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DownloadError(ValueError):
    """A download that failed: one sentence."""


def download_lora(
    folder: Path, repository: str = REPOSITORY, file: str = FILE, *, endpoint: str | None = None, progress: Any = None
) -> Path:
    """Fetch `file` of a repository to `folder`/`file` and return its path; a file that is there is not fetched again.

    Args:
        folder: must exist. endpoint: a server other than the hub's. progress: a tqdm class, by default the terminal's.

    Raises:
        DownloadError: a name that leaves the folder or is not safetensors, no network, no such file, no permission, no
            room, or a file that turns out not to be safetensors; the message says which, and what to do.
    """
    check_names(repository, file)
    target = folder / PurePosixPath(file)
    if not target.resolve().is_relative_to(folder.resolve()):
        raise DownloadError(f"{file} would lie outside {folder}")
    if safetensors_problem(target) is None:
        return target
    try:
        import huggingface_hub
    except ImportError as error:
        raise DownloadError("the package huggingface-hub is missing: pip install huggingface-hub") from error
    url = huggingface_hub.hf_hub_url(repository, file, endpoint=endpoint)
    try:
        partial = _fetch(url, target, progress)
        problem = safetensors_problem(partial)
        if problem is None:
            partial.replace(target)
            return target
        partial.unlink()
    except DownloadError:
        raise
    except Exception as error:  # versions of huggingface-hub use different libraries underneath
        raise DownloadError(f"{repository}/{file} was not downloaded: {_reason(error, folder)}") from error
    raise DownloadError(f"{repository}/{file} was not kept: {problem}")


def _fetch(url: str, target: Path, progress: Any) -> Path:
    """Complete the partial file of `target` and return it; goes on from what an earlier call got."""
    import huggingface_hub
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    about = huggingface_hub.get_hf_file_metadata(url)
    etag = re.sub(r"\W", "", about.etag or "")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{etag[:16]}.incomplete")
    if partial.is_symlink():
        raise DownloadError(f"{partial} is a link, which a download does not follow; delete it and start it again")
    more = {"tqdm_class": progress} if progress is not None and _supports(http_get, "tqdm_class") else {}
    if partial.is_file() and partial.stat().st_size > (about.size or 0):
        partial.unlink()
    with open(partial, "ab", opener=_no_link) as out:
        there = partial.stat().st_size
        http_get(url, out, resume_size=there, headers=build_hf_headers(), expected_size=about.size, **more)
    # The etag of a large file is its SHA-256.
    if len(etag) == 64 and _sha256(partial) != etag:
        partial.unlink()
        raise OSError("the file arrived damaged; start it again")
    return partial


def _no_link(path: str, flags: int) -> int:
    """Opens a file but does not follow a link, if the system can tell them apart."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def check_names(repository: str, file: str) -> None:
    """Raise `DownloadError` unless both are plain names: owner/name, and a relative .safetensors path without '..'."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise DownloadError(f"repository {repository!r}: allowed is owner/name, as in {REPOSITORY}")
    parts = file.split("/")
    plain = all(re.fullmatch(r"[\w][\w. -]*", part) for part in parts) and not any(part.endswith(".") for part in parts)
    if not plain or not file.endswith(".safetensors"):
        raise DownloadError(f"file {file!r}: allowed is a .safetensors file of the repository, as in {FILE}")


def _supports(function: Any, parameter: str) -> bool:
    return parameter in inspect.signature(function).parameters


def _reason(error: BaseException, folder: Path) -> str:
    """Why a download failed, in words, from what huggingface-hub raises and what caused it."""
    from huggingface_hub import errors

    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    # LocalEntryNotFoundError is an EntryNotFoundError that only means: not here, and the server did not help.
    unknown_file = any(
        isinstance(link, errors.EntryNotFoundError) and not isinstance(link, errors.LocalEntryNotFoundError)
        for link in chain
    )
    responses = [getattr(link, "response", None) for link in chain]
    status = next((response.status_code for response in responses if response is not None), None)
    if any(getattr(link, "errno", None) in _FULL for link in chain):
        return f"there is no room in {folder}; free some and start it again, it goes on where it stopped"
    if caused_by(PermissionError):
        return f"{folder} may not be written to"
    if caused_by(errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the network may not be used"
    if caused_by(errors.GatedRepoError):
        return "its owner must grant access: ask on its page, then `hf auth login`"
    if caused_by(errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private: `hf auth login`"
    if unknown_file:
        return "the repository has no such file"
    if status in (401, 403):
        return "the server refuses access: `hf auth login`"
    if status is not None:
        return f"the server answered with status {status}; start it again later, it goes on where it stopped"
    if caused_by(errors.LocalEntryNotFoundError, ConnectionError) or "connect" in type(chain[0]).__name__.lower():
        return "the server cannot be reached; with a network start it again, it goes on where it stopped"
    return f"{type(chain[0]).__name__}: {' '.join(str(chain[0]).split())[:300]}"
