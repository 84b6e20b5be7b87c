"""The attention kernel's tile, measured on the GPU that runs it: once per GPU and kind of call, kept in Triton's cache.

There is no search on GPUs that we measured (`tiles.MEASURED`), nor on ROCm. The search is short by design: a handful of
tiles on one small problem of random numbers, the built-in tile first; the fastest is kept. The environment variable
PSA_AUTOTUNE=0 switches it off.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable, Iterable

import torch
import triton
from triton.runtime import driver
from triton.testing import do_bench

from ..config import PyramidConfig
from ..int8 import mean_key, quantise_keys
from ..levels import BlockLists, group_by_level
from ..pyramid import Pyramid, build_pyramid
from .attend import attend_triton
from .cache import read_fact, source_of, write_fact
from .tiles import MEASURED, AttendTile, attend_tile, gpu_of, padded_dim

log = logging.getLogger("ComfyUI-PSA")

SWITCH = "PSA_AUTOTUNE"
FILE = "comfyui_psa_tile.json"

# No candidate starts that would probably finish later than this, so that the whole search stays under 20 s.
_SECONDS = 16.0
# Of these, the last ones are for a look at int8 keys, which nobody asked for.
_SECONDS_OF_INT8 = 4.0
_WORTH_SAYING = 1.05
# About a dozen calls each on the GPUs that we know.
_WARM_UP_MS, _MEASURED_MS = 5, 20
# Enough programs for several waves on any GPU; levels and density (about .15) are those of the presets.
_HEADS, _TOKENS = 4, 16_384
_LEVELS = (1, 2, 8)
_SHARES = {1: 0.10, 2: 0.05, 8: 0.20}


@dataclasses.dataclass(frozen=True)
class Case:
    """What a tile is chosen for; dim is a power of two."""

    dim: int
    block_q: int
    block_kv: int
    dtype: torch.dtype
    int8: bool

    @classmethod
    def of(cls, q: torch.Tensor, config: PyramidConfig) -> Case:
        """The kind of call that q [B, H, L, D] with this setting is."""
        int8 = config.precision == "int8" and 1 in config.stored_factors
        return cls(padded_dim(q.shape[-1], int8), config.block_q, config.block_kv, q.dtype, int8)


def choose_tile(device: torch.device, case: Case) -> AttendTile:
    """The tile for a call on `device`; on a GPU that we have not measured, the first call of a kind runs the search.

    The search itself never raises: if it has no result, the built-in tile is used, and may fail as it would anyway.
    """
    gpu = gpu_of(device)
    built_in = attend_tile(gpu, case.dim)
    if gpu in MEASURED or not _searches(gpu):
        return built_in
    if torch.cuda.is_current_stream_capturing():  # nothing can be timed there
        return built_in
    return _tuned(device, case) or built_in


def is_tuned(q: torch.Tensor, config: PyramidConfig) -> bool:
    """Whether calls on tensors like q [B, H, L, D] have a tile that was measured on their GPU, by us or by a search."""
    gpu = gpu_of(q.device)
    return gpu in MEASURED or (_searches(gpu) and _tuned(q.device, Case.of(q, config)) is not None)


def _searches(gpu: str) -> bool:
    return gpu not in ("interpreter", "hip") and os.environ.get(SWITCH) != "0"


@functools.lru_cache(maxsize=64)
def _tuned(device: torch.device, case: Case) -> AttendTile | None:
    key = cache_key(torch.cuda.get_device_name(device), case)
    tile = read_tile(key)
    if tile is None:
        tile = tune(device, case)
        if tile is not None:
            write_fact(key, FILE, dataclasses.asdict(tile))
    return tile


def tune(device: torch.device, case: Case) -> AttendTile | None:
    """Measure the candidates on a GPU and return the fastest; None if nothing could be measured."""
    name = torch.cuda.get_device_name(device)
    kind = "int8" if case.int8 else str(case.dtype).removeprefix("torch.")
    log.info("PSA tunes its attention kernel for %s, heads of %d, %s: up to 20 s, once per GPU", name, case.dim, kind)
    try:
        with torch.cuda.device(device):
            began = time.monotonic()
            found = _search(device, case, _SECONDS if case.int8 else _SECONDS - _SECONDS_OF_INT8)
    except Exception as failure:  # such as no memory left; the call itself will say so
        log.info("PSA could not tune its attention kernel: %s", failure)
        return None
    if found is None:
        return None
    tile, milliseconds = found
    if not case.int8 and time.monotonic() - began <= _SECONDS - _SECONDS_OF_INT8:
        _compare_int8(device, case, milliseconds)
    return tile


def _search(device: torch.device, case: Case, seconds: float) -> tuple[AttendTile, float] | None:
    run, tiles = _problem(device, case), candidates(gpu_of(device), case, _shared_memory(device))
    return fastest(tiles, lambda tile: _milliseconds(run, tile), seconds)


def _compare_int8(device: torch.device, case: Case, milliseconds: float) -> None:
    """Log it if int8 keys are faster than the best tile without them, as far as a few tiles can tell.

    Only the user can weigh that against the error of int8 keys, so precision `auto` stays at 16 bits.
    """
    int8 = dataclasses.replace(case, int8=True, dim=padded_dim(case.dim, int8=True))
    try:
        with torch.cuda.device(device):
            found = _search(device, int8, _SECONDS_OF_INT8)
    except Exception as failure:
        log.debug("PSA could not measure int8 keys: %s", failure)
        return
    if found is None or milliseconds < _WORTH_SAYING * found[1]:
        return
    log.info(
        "PSA: on %s the attention kernel is %.2f times as fast with int8 keys (%.2f instead of %.2f ms); precision "
        "auto stays at 16 bits, set precision to int8 to try it",
        torch.cuda.get_device_name(device),
        milliseconds / found[1],
        found[1],
        milliseconds,
    )


def candidates(gpu: str, case: Case, shared_memory: int) -> list[AttendTile]:
    """Tiles that fit `shared_memory` bytes, the most likely to be fast first, starting with the built-in one."""
    built_in = attend_tile(gpu, case.dim)
    row_bytes = case.dim * (case.dtype.itemsize + (1 if case.int8 else case.dtype.itemsize))
    shapes = [
        # rows, warps, stages
        *((64, 4, 2), (64, 8, 2), (64, 4, 3), (128, 8, 2), (32, 4, 3), (64, 8, 3), (64, 4, 1), (128, 8, 3), (32, 4, 2)),
        *((128, 4, 2), (128, 8, 1), (32, 4, 4), (64, 8, 1), (64, 4, 4)),
    ]
    found = [built_in]
    for rows, warps, stages in shapes:
        tile = dataclasses.replace(built_in, rows=rows, warps=warps, stages=stages)
        # What waits in the pipeline after the current tile; a tile that needs more than that fails and is skipped.
        if tile not in found and max(1, stages - 1) * rows * row_bytes <= shared_memory:
            found.append(tile)
    if built_in.bulk:  # also worth trying without, after the best half of the others
        found.insert(len(found) // 2, dataclasses.replace(built_in, bulk=False))
    return found


def fastest(
    tiles: Iterable[AttendTile],
    time_of: Callable[[AttendTile], float],
    seconds: float = _SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[AttendTile, float] | None:
    """The fastest tile and its time; tiles that fail are skipped, and none starts that would not finish within
    `seconds`. None if all failed."""
    began, longest = clock(), 0.0
    best: tuple[AttendTile, float] | None = None
    for tile in tiles:
        start = clock()
        if best is not None and start - began + longest > seconds:
            break
        try:
            needed = time_of(tile)
        except Exception as failure:  # does not compile, or does not fit
            log.debug("PSA: %s cannot be used here: %s", tile, failure)
            continue
        finally:
            longest = max(longest, clock() - start)
        if best is None or needed < best[1]:
            best = tile, needed
    return best


def _problem(device: torch.device, case: Case) -> Callable[[AttendTile], None]:
    """A call of the attention kernel on random numbers, by tile."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, _HEADS, _TOKENS, case.dim)
    q, k, v = (torch.empty(shape, dtype=case.dtype, device=device).normal_(generator=generator) for _ in range(3))
    pyramid, lists = _pyramid(k, v, case), _lists(generator, case, device)
    out = torch.empty_like(q)

    def run(tile: AttendTile) -> None:
        attend_triton(q, pyramid, lists, case.block_q, case.dim**-0.5, None, None, out, tile=tile)

    return run


def _pyramid(k: torch.Tensor, v: torch.Tensor, case: Case) -> Pyramid:
    pyramid = build_pyramid(k, v, _LEVELS, case.block_kv)
    return quantise_keys(pyramid, mean_key(k)) if case.int8 else pyramid


def _lists(generator: torch.Generator, case: Case, device: torch.device) -> BlockLists:
    blocks = -(-_TOKENS // case.block_q), -(-_TOKENS // case.block_kv)
    draw = torch.rand((1, _HEADS, *blocks), generator=generator, device=device)
    factors, bound = torch.zeros_like(draw, dtype=torch.int16), sum(_SHARES.values())
    for level in reversed(_LEVELS):
        factors = torch.where(draw < bound, level, factors).to(torch.int16)
        bound -= _SHARES[level]
    return group_by_level(factors, _LEVELS)


def _shared_memory(device: torch.device) -> int:
    """The most bytes that one program may use."""
    return driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]


def _milliseconds(run: Callable[[AttendTile], None], tile: AttendTile) -> float:
    """The median time of a few calls, with the second-level cache flushed before each."""
    return do_bench(lambda: run(tile), warmup=_WARM_UP_MS, rep=_MEASURED_MS, return_mode="median")


def cache_key(gpu_name: str, case: Case) -> str:
    """Everything that a measured tile depends on: GPU, Triton, the kernel's source and the kind of call."""
    source = source_of("attend.py", "attend_tile.py")
    kind = f"head_dim {case.dim}, blocks {case.block_q} {case.block_kv}, {str(case.dtype).removeprefix('torch.')}"
    return f"{gpu_name}, triton {triton.__version__}, kernel {source}, {kind}{', int8 keys' if case.int8 else ''}"


def read_tile(key: str) -> AttendTile | None:
    """The tile that Triton's cache keeps under a key; None if there is none that can be read."""
    entry = read_fact(key, FILE)
    fields = {field.name: field.type for field in dataclasses.fields(AttendTile)}
    if not isinstance(entry, dict) or {name: type(value).__name__ for name, value in entry.items()} != fields:
        return None
    return AttendTile(**entry) if min(entry["rows"], entry["warps"], entry["stages"]) > 0 else None
