"""How much memory a run may hold for its corrections in a diffusers pipeline, and pinned memory of the host."""

from __future__ import annotations

import contextlib
import os

import torch

_SPARE = 2**30
"""Bytes that stay free on a device: what the model asks for varies from step to step."""


def free_for_run(device: torch.device) -> int:
    """Bytes that a run may hold on a device besides what its model needs.

    What torch has reserved is not counted: the model has used it in this run and will use it again.
    """
    if device.type != "cuda":
        return free_on_host()
    return max(0, torch.cuda.mem_get_info(device)[0] - _SPARE)


def free_on_host() -> int:
    """Bytes that may be held on the host: half of what is free, 0 if that is not known.

    Processes that torchrun has started on this host share them.
    """
    return _free() // (2 * max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _free() -> int:
    try:
        import psutil
    except ImportError:
        names = getattr(os, "sysconf_names", {})
        known = {"SC_AVPHYS_PAGES", "SC_PAGE_SIZE"} <= names.keys()
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 0
    return psutil.virtual_memory().available


def pin(tensor: torch.Tensor) -> None:
    """Pin a tensor of the host; if that is impossible, copies of it wait."""
    if int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)):
        # CUDA keeps the error, and the next kernel would raise it.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")


def unpin(tensor: torch.Tensor) -> None:
    """Undo `pin`."""
    if tensor.is_pinned():
        torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
