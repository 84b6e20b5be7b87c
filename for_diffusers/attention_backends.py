"""What PSA does not see, and what to say of it: some of diffusers' attention backends, and blocks that are skipped."""

from __future__ import annotations

import sys
from typing import Any

import torch

from ..sampling.findings import ranges, unseen_blocks
from ..sampling.record import Record

_SEEN_BACKENDS = ("native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math")
"""diffusers' attention backends that go through scaled_dot_product_attention."""


def unseen_backend(attention: torch.nn.Module) -> str | None:
    """Why PSA cannot see the calls of a self-attention module, if its attention backend already tells."""
    backend = _backend_of(attention)
    return None if backend is None or backend in _SEEN_BACKENDS else unseen_reason(attention)


def _backend_of(attention: torch.nn.Module) -> str | None:
    """The name of a module's attention backend: its own, or the one that diffusers uses everywhere; None if it has no
    choice of backends."""
    processor: Any = getattr(attention, "processor", None)
    if not hasattr(processor, "_attention_backend"):
        return None
    backend = processor._attention_backend
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    if backend is None and dispatch is not None:
        backend, _ = dispatch._AttentionBackendRegistry.get_active_backend()
    return None if backend is None else str(getattr(backend, "value", backend))


def unseen_reason(attention: torch.nn.Module) -> str:
    """What to say of a self-attention module whose calls PSA does not see, as a sentence with what to do."""
    backend = _backend_of(attention)
    named = "" if backend is None else f" (attention backend: {backend})"
    return (
        f"the self-attention does not go through torch's scaled_dot_product_attention{named}, so PSA cannot see it; "
        "choose a backend that does, such as pipe.transformer.set_attention_backend('native'), or remove your "
        "own attention processor, or what replaces torch's function"
    )


def unseen_note(record: Record) -> list[str]:
    """A sentence about blocks that PSA did not see, if it saw others."""
    missing = unseen_blocks(record, record.steps)
    if not missing or len(missing) == record.blocks:
        return []
    which = f"block{'s' * (len(missing) > 1)} {ranges(missing)}"
    if record.fallbacks:
        return [f"PSA did not see the attention of {which}; fallbacks say why, and what to do"]
    return [
        f"PSA did not see the attention of {which}: a cache, a hook or a guidance skips it; if that was not meant, "
        f"remove what does"
    ]
