"""How large a tile the attention kernel works on, by GPU, type and head size.

What was measured where stands in `benchmarks/`; other GPUs take what fits their shared memory.
"""

from __future__ import annotations

import dataclasses
import os

import torch


@dataclasses.dataclass(frozen=True)
class AttendTile:
    """Shape of one program: key rows of a tile, warps, tiles in flight.

    bulk: keys come by the tensor memory accelerator (compute capability 9.0 and newer). wait: see `_fast_tile`.
    """

    rows: int
    warps: int
    stages: int
    bulk: bool = False
    wait: bool = False


def attend_tile(q: torch.Tensor, block_q: int, dim: int, int8: bool) -> AttendTile:
    """The tile for q [B, H, L, D] on its device; `dim` is D, padded to a power of two."""
    if not q.is_cuda:  # the interpreter
        return AttendTile(rows=32, warps=4, stages=1)
    if torch.version.hip is not None:
        return AttendTile(rows=64 if q.element_size() == 2 else 32, warps=4, stages=1)
    capability = torch.cuda.get_device_capability(q.device)
    if q.element_size() == 4:
        return AttendTile(rows=32, warps=4 if block_q <= 64 else 8, stages=1)
    if capability[0] == 9:
        return AttendTile(rows=64, warps=4, stages=2, bulk=_has_descriptors(), wait=True)
    return AttendTile(rows=64, warps=4, stages=2 if dim <= 128 else 1)


def _has_descriptors() -> bool:
    try:
        import triton.tools.tensor_descriptor  # noqa: F401
    except ImportError:
        return False
    return os.environ.get("TRITON_INTERPRET") != "1"
