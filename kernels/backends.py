"""Which backend computes a call, and why another one cannot: a reason is a sentence that a user can read.

Nothing is computed here. Triton is looked up when it is needed, never at import.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from .config import PyramidConfig
from .levels import BlockLists
from .refusal import refusal

BACKENDS = ("auto", "triton", "torch")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


NO_GRADIENTS = "gradients are asked for, and PSA computes none; if you need none, call the model under torch.no_grad()"


class BackendError(RuntimeError):
    """The backend that was asked for cannot compute the call; the message is the reason."""


def gradient_reason(*tensors: torch.Tensor) -> str | None:
    """Why no backend computes a call on these tensors, or None: none has a backward pass or a forward derivative.

    A backend that did compute the call would return an output without a graph, and nothing would be trained.
    """
    recorded = torch.is_grad_enabled()
    for tensor in tensors:
        if (recorded and tensor.requires_grad) or forward_ad.unpack_dual(tensor).tangent is not None:
            return NO_GRADIENTS
    return None


def in_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tensors in the type in which torch's own attention computes them: inside torch.autocast that is autocast's, even
    if a model hands over several types. Whoever takes a call out of torch's hands must do the same."""
    device = tensors[0].device.type
    # Compilers cannot trace the question whether the device has autocast.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    if not known or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def triton_reason(q: torch.Tensor) -> str | None:
    """Why the Triton backend cannot compute q [B, H, L, D], or None when it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if q.dtype not in _DTYPES:
        return f"the Triton kernel computes float16, bfloat16 and float32, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] > 256:
        return f"the Triton kernel supports head sizes up to 256, not {q.shape[-1]}"
    if q.is_cuda:
        if q.dtype == torch.float32:
            return "on a GPU the Triton kernels compute float16 and bfloat16, not float32"
        if torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 0):
            return "the Triton kernel needs an NVIDIA GPU of compute capability 8.0 or newer"
        return None
    if os.environ.get("TRITON_INTERPRET") != "1":
        return f"the Triton kernel needs a GPU, and the tensors are on {q.device.type}"
    return None


def choose_backend(name: str, q: torch.Tensor, precision: str = "auto") -> str:
    """The backend for q: `auto` takes Triton on a GPU and torch elsewhere.

    Raises:
        BackendError: the named backend cannot compute the call, or auto finds none that would be faster than dense.
        ValueError: no such backend.
    """
    if name not in BACKENDS:
        raise ValueError(refusal("backend", name, ", ".join(BACKENDS)))
    if name == "torch" or (name == "auto" and not q.is_cuda):
        if precision == "int8":
            raise BackendError("precision int8 needs the Triton backend; torch computes in the type of the model")
        return "torch"
    reason = triton_reason(q)
    if reason is None:
        return "triton"
    if name == "auto":
        reason += "; the torch backend is meant for CPUs and would be slower than dense attention here"
    raise BackendError(reason)


def is_tuned(backend: str, q: torch.Tensor, config: PyramidConfig) -> bool:
    """Whether calls of a backend on tensors like q [B, H, L, D] run with a tile that was measured on their GPU; True
    for a backend that has no tiles."""
    if backend != "triton":
        return True
    from .gpu.autotune import is_tuned as is_tuned_on_gpu

    return is_tuned_on_gpu(q, config)


def video_attention(backend: str) -> Callable[..., BlockLists]:
    """PSA on the video tokens by a backend; all have the signature of `torch_backend.attend_video`."""
    if backend == "triton":
        from .gpu.backend import attend_video
    else:
        from .torch_backend import attend_video
    return attend_video
