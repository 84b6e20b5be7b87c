"""`python dev.py bench`: the whole PSA call against dense attention in the same run, with its error beside its time.

On a CPU one shape (the demo's), on a GPU the shapes of the models. Medians; ratios within one run are what counts.
Figures go to `benchmarks/results/*.csv`.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from synthetic import smooth_qkv
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {
    "synthetic": (2, (9, 32, 32), 128),
    "wan1.3b-480p": (12, (21, 30, 52), 128),
    "wan1.3b-720p": (12, (18, 45, 80), 128),
    "wan14b-720p": (40, (18, 45, 80), 128),
    "cogvideox-5b": (48, (13, 30, 45), 64),
}
COLUMNS = ["gpu", "date", "torch", "triton", "shape", "method", "precision", "density", "ms", "dense_ms", "speedup"]
COLUMNS += ["rel_l1", "extra_mb"]


def load_pack():
    """The pack, imported as ComfyUI does it."""
    spec = importlib.util.spec_from_file_location(
        "comfyui_psa", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules["comfyui_psa"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def settings() -> Iterator[tuple[str, object]]:
    """The settings that are compared: the published default, and ours at several densities."""
    from comfyui_psa.kernels import load_presets

    published = load_presets()["module-default (published)"]
    yield "psa-published", published.config(None, order="curve")
    for sparsity in (0.85, 0.9, 0.95):
        yield f"psa-{sparsity}", load_presets()["module-default"].config(sparsity)
    for order, tile in (("raster", (1, 8, 8)), ("curve", (1, 8, 8)), ("tiles", (1, 8, 8)), ("tiles", (4, 4, 4))):
        name = order if order != "tiles" else "tiles" + "x".join(map(str, tile))
        yield f"psa-0.85-{name}", load_presets()["module-default"].config(0.85, order=order, tile=tile)


def median_ms(call: Callable[[], object], cuda: bool, runs: int) -> float:
    """Median time of a call in milliseconds; device events and a flushed L2 on a GPU."""
    call()
    times = []
    flush = torch.empty(2**26, dtype=torch.int32, device="cuda") if cuda else None
    for _ in range(runs):
        if cuda:
            flush.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="shape to measure; may be repeated")
    parser.add_argument("--runs", type=int, default=None, help="timed runs (default: 20 on a GPU, 5 on a CPU)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    load_pack()
    from comfyui_psa.kernels import TokenLayout, make_order, pyramid_sparse_attention

    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    runs = arguments.runs or (20 if cuda else 5)
    gpu = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    triton = importlib.util.find_spec("triton") and __import__("triton").__version__
    common = {"gpu": gpu, "date": datetime.date.today().isoformat(), "torch": torch.__version__, "triton": triton}
    rows = []
    for shape in arguments.shape or (list(SHAPES) if cuda else ["synthetic"]):
        heads, grid, dim = SHAPES[shape]
        q, k, v = smooth_qkv(heads, grid, dim, dtype, device)
        dense_backend = SDPBackend.CUDNN_ATTENTION if cuda else SDPBackend.FLASH_ATTENTION

        def dense(q=q, k=k, v=v, dense_backend=dense_backend) -> torch.Tensor:
            with sdpa_kernel(dense_backend):
                return F.scaled_dot_product_attention(q, k, v)

        reference = dense().float()
        dense_ms = median_ms(dense, cuda, runs)
        method = "sdpa-cudnn" if cuda else "sdpa"
        precision = str(dtype).removeprefix("torch.")
        rows.append(common | dict(shape=shape, method=method, precision=precision, density=1, ms=dense_ms))
        print(f"{shape:14s} {method:18s} {dense_ms:9.2f} ms", flush=True)
        for name, config in settings():
            order = make_order(config.order, grid, config.tile, device)

            def sparse(q=q, k=k, v=v, config=config, grid=grid, order=order):
                return pyramid_sparse_attention(q, k, v, config, layout=TokenLayout(grid), order=order)

            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            result = sparse()
            extra = (torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else None
            error = ((result.output.float() - reference).abs().mean() / reference.abs().mean()).item()
            density = result.density.item()
            del result
            ms = median_ms(sparse, cuda, runs)
            rows.append(
                common
                | dict(shape=shape, method=name, precision=precision, density=round(density, 4), ms=round(ms, 3))
                | dict(
                    dense_ms=round(dense_ms, 3), speedup=round(dense_ms / ms, 3), rel_l1=round(error, 5), extra_mb=extra
                )
            )
            figures = f"{ms:9.2f} ms  {dense_ms / ms:5.2f}x  density {density:.3f}  rel_l1 {error:.4f}"
            print(f"{shape:14s} {name:18s} {figures}", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"attention-{'gpu' if cuda else 'cpu'}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"written to {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
