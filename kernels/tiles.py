"""How the attention kernel is cut for a GPU: rows of a tile, warps, tiles in flight, and which kernel.

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
        warpgroups: `attend_hopper` takes the calls that it serves.
    """

    rows: int
    warps: int
    stages: int
    bulk: bool = False
    wait: bool = False
    warpgroups: bool = False


def attend_tile(q: torch.Tensor, block_q: int, dim: int) -> AttendTile:
    """The tile for q [B, H, L, D] on its device; `dim` is D, padded to a power of two."""
    if not q.is_cuda:  # the interpreter
        return AttendTile(rows=32, warps=4, stages=1)
    if torch.version.hip is not None:
        return AttendTile(rows=64, warps=4, stages=1)
    if torch.cuda.get_device_capability(q.device)[0] == 9:
        found = {name: importlib.util.find_spec(name) is not None for name in _OPTIONAL}
        return AttendTile(
            rows=64, warps=4, stages=2, bulk=found[_OPTIONAL[0]], wait=True, warpgroups=found[_OPTIONAL[1]]
        )
    return AttendTile(rows=64, warps=4, stages=2 if dim <= 128 else 1)


_OPTIONAL = ("triton.tools.tensor_descriptor", "triton.experimental.gluon.nvidia.hopper")
