"""The attention kernel's tile, measured on the GPU that runs it: once per GPU and kind of call, kept in a file.

Not for GPUs whose tile was measured by us (`tiles.MEASURED`), nor for ROCm. The search is short by design: a handful of
tiles on one small problem of random numbers, the built-in one first, and the fastest is kept. The environment variable
PSA_AUTOTUNE=0 switches it off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ..levels import BlockLists, group_by_level
from ..pyramid import Pyramid, build_pyramid
from .tiles import MEASURED, AttendTile, attend_tile, gpu_of

log = logging.getLogger("ComfyUI-PSA")

SWITCH = "PSA_AUTOTUNE"
FILE = "comfyui-psa-tiles.json"

# No candidate begins that would probably end later, so that all of it stays under 20 s.
_SECONDS = 16.0
_RUNS = 5
# Enough programs for several waves on any GPU; the levels and the density, about .15, are those of the presets.
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


def choose_tile(device: torch.device, case: Case) -> AttendTile:
    """The tile for a call on `device`; the first call of a kind on a GPU that we have not measured takes the search.

    Never raises for the search's sake: without a result the built-in tile is tried, and fails as it would have.
    """
    gpu = gpu_of(device)
    built_in = attend_tile(gpu, case.dim)
    if gpu in ("interpreter", "hip") or gpu in MEASURED or os.environ.get(SWITCH) == "0":
        return built_in
    if torch.cuda.is_current_stream_capturing():  # nothing can be timed there
        return built_in
    return _tuned(device, case) or built_in


@functools.lru_cache(maxsize=64)
def _tuned(device: torch.device, case: Case) -> AttendTile | None:
    path, key = cache_folder() / FILE, cache_key(torch.cuda.get_device_name(device), case)
    tile = read_tile(path, key)
    if tile is None:
        tile = tune(device, case)
        if tile is not None:
            write_tile(path, key, tile)
    return tile


def tune(device: torch.device, case: Case) -> AttendTile | None:
    """Measure the candidates on a GPU and return the fastest; None where nothing could be measured."""
    name = torch.cuda.get_device_name(device)
    kind = "int8" if case.int8 else str(case.dtype).removeprefix("torch.")
    log.info("PSA tunes its attention kernel for %s, heads of %d, %s: up to 20 s, once per GPU", name, case.dim, kind)
    try:
        with torch.cuda.device(device):
            run, tiles = _problem(device, case), candidates(gpu_of(device), case, _shared_memory(device))
            return fastest(tiles, lambda tile: _milliseconds(run, tile))
    except Exception as failure:  # such as no memory left; the call itself will say so
        log.info("PSA could not tune its attention kernel: %s", failure)
        return None


def candidates(gpu: str, case: Case, shared_memory: int) -> list[AttendTile]:
    """Tiles that fit `shared_memory` bytes, those most likely to be fast first: the built-in one before all."""
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
        # What waits in the pipeline behind the tile at work; a tile that needs more than that fails and is skipped.
        if tile not in found and max(1, stages - 1) * rows * row_bytes <= shared_memory:
            found.append(tile)
    if built_in.bulk:  # worth a try without, behind the best half of the others
        found.insert(len(found) // 2, dataclasses.replace(built_in, bulk=False))
    return found


def fastest(
    tiles: Iterable[AttendTile],
    time_of: Callable[[AttendTile], float],
    seconds: float = _SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> AttendTile | None:
    """The tile of the least time; tiles that fail are skipped, and none begins that would not end within `seconds`."""
    began, longest = clock(), 0.0
    best: tuple[float, AttendTile] | None = None
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
        if best is None or needed < best[0]:
            best = needed, tile
    return None if best is None else best[1]


def _problem(device: torch.device, case: Case) -> Callable[[AttendTile], None]:
    """A call of the attention kernel on random numbers, by tile."""
    from .attend import attend_triton

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
    if not case.int8:
        return pyramid
    from ..int8 import mean_key, quantise_keys

    return quantise_keys(pyramid, mean_key(k))


def _lists(generator: torch.Generator, case: Case, device: torch.device) -> BlockLists:
    blocks = -(-_TOKENS // case.block_q), -(-_TOKENS // case.block_kv)
    draw = torch.rand((1, _HEADS, *blocks), generator=generator, device=device)
    factors, bound = torch.zeros_like(draw, dtype=torch.int16), sum(_SHARES.values())
    for level in reversed(_LEVELS):
        factors = torch.where(draw < bound, level, factors).to(torch.int16)
        bound -= _SHARES[level]
    return group_by_level(factors, _LEVELS)


def _shared_memory(device: torch.device) -> int:
    """Bytes that one program may take at most."""
    from triton.runtime import driver

    return driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]


def _milliseconds(run: Callable[[AttendTile], None], tile: AttendTile) -> float:
    run(tile)  # compiles
    times = []
    for _ in range(_RUNS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run(tile)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def cache_folder() -> Path:
    """Triton's cache folder where the user has set one, else the user's own."""
    for variable, inside in (("TRITON_CACHE_DIR", ""), ("XDG_CACHE_HOME", "comfyui-psa")):
        if os.environ.get(variable):
            return Path(os.environ[variable]) / inside
    return Path(os.path.expanduser("~/.cache/comfyui-psa"))  # noqa: PTH111 (pathlib's raises where there is no home)


def cache_key(gpu_name: str, case: Case) -> str:
    """Everything that a measured tile depends on: GPU, Triton, the kernel's source and the kind of call."""
    import triton

    files = (Path(__file__).with_name(name) for name in ("attend.py", "attend_tile.py"))
    source = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    kind = f"head_dim {case.dim}, blocks {case.block_q} {case.block_kv}, {str(case.dtype).removeprefix('torch.')}"
    return f"{gpu_name}, triton {triton.__version__}, kernel {source}, {kind}{', int8 keys' if case.int8 else ''}"


def read_tile(path: Path, key: str) -> AttendTile | None:
    """The tile kept under a key; None where there is none that can be read."""
    entry = _read(path).get(key)
    fields = dataclasses.fields(AttendTile)
    if not isinstance(entry, dict) or set(entry) != {field.name for field in fields}:
        return None
    if not all(type(entry[field]) is int and entry[field] > 0 for field in ("rows", "warps", "stages")):
        return None
    if not all(type(entry[field]) is bool for field in ("bulk", "wait", "halves")):
        return None
    return AttendTile(**entry)


def write_tile(path: Path, key: str, tile: AttendTile) -> None:
    """Keep a tile beside those that are there; another process never sees a part of the file. Failure is no error."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = _read(path) | {key: dataclasses.asdict(tile)}
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            temporary = Path(file.name)
            json.dump(entries, file, indent=1, sort_keys=True)
        temporary.replace(path)
    except (OSError, ValueError) as failure:  # a name that the file system cannot write is a ValueError
        log.debug("PSA could not keep its tile in %s: %s", path, failure)
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _read(path: Path) -> dict[str, object]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}
