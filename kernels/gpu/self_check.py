"""Whether the kernels compute what they should on this machine: the first call of every kind is checked, its choice of
levels (`exact_ranking.py`) and its output (`exact.py`).

Compilers and drivers have turned right kernels into wrong ones before, and a wrong picture looks like a bad model. What
was found is kept in Triton's cache beside the tuned tile, until the GPU, its driver, Triton, torch or the kernels
change. Where the cache cannot be written, every process checks once.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from typing import NamedTuple

import torch
import triton

from ..broken import KernelError
from ..config import PyramidConfig
from ..delta import Delta
from ..levels import BlockLists
from .cache import read_fact, source_of, write_fact
from .call import Call
from .exact import what_differs
from .exact_ranking import Ranked, what_misranks
from .tiles import AttendTile

log = logging.getLogger("ComfyUI-PSA")

FILE = "comfyui_psa_check.json"


class Kind(NamedTuple):
    """What makes calls run other code of ours: kernels are compiled, and launches chosen, by these. A tuple, since one
    is made in every call.

    Attributes:
        ranking: how levels are chosen; None if they are given.
        orders: number of dimensions of the index of the query and key order, 0 for raster order.
        listed: type of the lists. extra: whether there are tokens outside the blocks. group: of the correction, or 0.
    """

    dtype: torch.dtype
    dim: int
    block_q: int
    block_kv: int
    int8: bool
    levels: tuple[int, ...]
    uneven: bool
    ranking: tuple | None
    orders: tuple[int, int]
    listed: torch.dtype | None
    extra: bool
    group: int
    tile: AttendTile

    @classmethod
    def of(
        cls,
        q: torch.Tensor,
        config: PyramidConfig,
        orders: tuple[torch.Tensor | None, torch.Tensor | None],
        lists: BlockLists | None,
        extra: torch.Tensor | None,
        delta: Delta | None,
        tile: AttendTile,
    ) -> Kind:
        """The kind of a call on q [B, H, L, D]; orders: the index of both; lists: None if levels are chosen."""
        ranking = None
        if lists is None:
            ranking = config.mode, config.importance, config.reduction, config.sample_share, bool(config.similarity_cap)
        return cls(
            q.dtype,
            q.shape[3],
            config.block_q,
            config.block_kv,
            config.precision == "int8",
            config.stored_factors,
            config.mode != "topk",
            ranking,
            (0 if orders[0] is None else orders[0].ndim, 0 if orders[1] is None else orders[1].ndim),
            None if lists is None else lists.blocks.dtype,
            extra is not None,
            0 if delta is None else delta.group,
            tile,
        )


class Trust:
    """What is known about one kind of call on one device.

    Attributes:
        checked: whether a call was compared, in this process or an earlier one.
        differs: what was wrong with it, as a part of a sentence; None if nothing was.
    """

    def __init__(self, device: torch.device, kind: Kind) -> None:
        self._machine = machine(device)
        self._key = f"{self._machine}, torch {torch.__version__}, kernels {source_of()}, {kind}"
        fact = read_fact(self._key, FILE)
        differs = fact.get("differs", 0) if isinstance(fact, dict) else 0
        self.checked = differs is None or isinstance(differs, str)
        self.differs = differs if isinstance(differs, str) else None

    def refuse(self) -> None:
        """Raises KernelError if the kernels were found to be wrong."""
        if self.differs is not None:
            raise KernelError(self._machine, self.differs)

    def check_ranking(self, ranked: Ranked) -> None:
        """Compare how the first call chose its levels; raises KernelError if that is wrong."""
        differs = what_misranks(ranked)
        if differs is not None:
            self._found(differs)

    def check(self, call: Call, out: torch.Tensor) -> None:
        """Compare the output [B, H, L, D] of the first call; raises KernelError if it is wrong."""
        differs = what_differs(call, out)
        if differs == "":
            self.checked = True  # in this process only: the next one may have a call that says something
        else:
            self._found(differs)

    def _found(self, differs: str | None) -> None:
        self.differs, self.checked = differs, True
        write_fact(self._key, FILE, {"differs": self.differs})
        log.debug("PSA: kernels checked, %s: %s", self._key, self.differs or "right")
        self.refuse()


@functools.lru_cache(maxsize=256)
def trust(device: torch.device, kind: Kind) -> Trust:
    """What this process knows about a kind of call on a device."""
    return Trust(device, kind)


def may_check(device: torch.device) -> bool:
    """Whether results can be read now: not while a stream records a graph."""
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def machine(device: torch.device) -> str:
    """The device, its driver and Triton, by name and version."""
    if device.type != "cuda":
        return f"Triton's interpreter {triton.__version__}"
    return f"{torch.cuda.get_device_name(device)} (driver {_driver()}, Triton {triton.__version__})"


@functools.lru_cache(maxsize=1)
def _driver() -> str:
    """Version of the GPU's driver; that of ROCm's runtime there, and `unknown` where nothing tells it."""
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    try:
        library = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(80)
        if library.nvmlInit_v2() or library.nvmlSystemGetDriverVersion(text, len(text)):
            return "unknown"
        library.nvmlShutdown()
        return text.value.decode("ascii", "replace")
    except (OSError, AttributeError):  # no such library, or an old one
        return "unknown"
