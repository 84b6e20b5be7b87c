"""How the attention kernel is cut for a GPU: rows of a tile, warps, tiles in flight.

What was measured where stands in `benchmarks/`; other GPUs take what fits their shared memory.
"""

from __future__ import annotations

import dataclasses
import importlib.util

import torch


@dataclasses.dataclass(frozen=True)
class AttendTile:
    """Shape of one program of `attend_triton`.

    Attributes:
        rows: key rows of a tile; warps; stages: tiles in flight.
        bulk: keys of level 1 come by the tensor memory accelerator (compute capability 9.0 and newer).
        wait: see `attend_triton._fast_tile`.
        stagger: cycles by which the second program of a multiprocessor starts later; units: multiprocessors.
    """

    rows: int
    warps: int
    stages: int
    bulk: bool = False
    wait: bool = False
    stagger: int = 0
    units: int = 0


def attend_tile(q: torch.Tensor, block_q: int, dim: int) -> AttendTile:
    """The tile for q [B, H, L, D] on its device; `dim` is D, padded to a power of two."""
    if not q.is_cuda:  # the interpreter
        return AttendTile(rows=32, warps=4, stages=1)
    if torch.version.hip is not None:
        return AttendTile(rows=64, warps=4, stages=1)
    if torch.cuda.get_device_capability(q.device)[0] == 9:
        bulk = importlib.util.find_spec("triton.tools.tensor_descriptor") is not None
        return AttendTile(rows=64, warps=4, stages=2, bulk=bulk, wait=True, stagger=800, units=132)
    return AttendTile(rows=64, warps=4, stages=2 if dim <= 128 else 1)
