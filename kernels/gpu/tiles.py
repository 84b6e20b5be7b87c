"""How the attention kernel is cut for a GPU: rows per tile, warps, tiles in flight.

The measurements are in `workshop/benchmarks/`. Other GPUs have a tile here that fits their shared memory
(tests/kernels/test_compile.py); `autotune.py` starts its search on the GPU from there.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util

import torch

MEASURED = ("sm90",)
"""GPUs (as `gpu_of` names them) whose tile below is the fastest we have found; no search there."""


@dataclasses.dataclass(frozen=True)
class AttendTile:
    """Shape of one program of `attend.py`.

    Attributes:
        rows: key rows per tile; warps; stages: tiles in flight.
        bulk: keys and values of level 1 are loaded by the tensor memory accelerator (compute capability 9.0).
        wait: see `attend_tile.fast_tile`.
        halves: query blocks of 128 rows or more are computed in two halves, see the same place.
    """

    rows: int
    warps: int
    stages: int
    bulk: bool = False
    wait: bool = False
    halves: bool = False


@functools.lru_cache(maxsize=64)  # asked several times in every call
def gpu_of(device: torch.device) -> str:
    """What kernels are compiled for: `sm90` and the like, `hip`, or `interpreter` for a CPU."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "hip"
    return "sm{}{}".format(*torch.cuda.get_device_capability(device))


def power_of_two(count: int) -> int:
    """The least power of two that is not below `count`. Triton's own function takes a third of a launch's time."""
    return 1 << (count - 1).bit_length()


def padded_dim(dim: int, int8: bool = False) -> int:
    """The head size that kernels compute with: a power of two, at least what a matrix unit takes."""
    return max(32 if int8 else 16, power_of_two(dim))


@functools.lru_cache(maxsize=64)
def attend_tile(gpu: str, dim: int) -> AttendTile:
    """The built-in tile for heads of `dim`, a power of two, on a GPU as `gpu_of` names it."""
    if gpu == "interpreter":
        return AttendTile(rows=32, warps=4, stages=1, halves=True)
    if gpu == "hip":
        return AttendTile(rows=64, warps=4, stages=1)
    if gpu == "sm90":
        bulk = importlib.util.find_spec("triton.tools.tensor_descriptor") is not None
        return AttendTile(rows=64, warps=4, stages=2, bulk=bulk, wait=True, halves=True)
    return AttendTile(rows=64, warps=4, stages=2 if dim <= 128 else 1)


def importance_stages(gpu: str, dim: int) -> int:
    """Tiles in flight of the importance kernel, for heads of `dim`, a power of two, on a GPU as `gpu_of` names it."""
    if gpu in ("interpreter", "hip"):
        return 1
    return 3 if gpu in ("sm80", "sm90") or dim <= 128 else 1
