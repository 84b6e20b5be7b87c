"""`python dev.py bench`: times attention methods against dense attention in the same run, and measures their error.

On a CPU it uses the demo's shape, on a GPU those of real models too. The data is smooth and synthetic, or captured from
the demo model (`demo`); on a GPU it is bfloat16, and float16 for some rows. Times are medians. Compare only within one
run: `speedup` is relative to dense attention in the row's own type. Errors are relative to float64, see `truth.py`.
Results go to `workshop/results/attention-gpu.csv` or `-cpu.csv`, and the stages of the PSA call to `stages-gpu.csv`,
replacing earlier rows of the same shapes. `python dev.py bench --plot` plots error against time from them, and
`--crossover` prints from how many tokens on PSA is faster than dense (`crossover.py`).
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import importlib.util
import runpy
import sys
from pathlib import Path

import compile_ahead
import crossover
import methods
import torch
from captured import demo_qkv
from synthetic import smooth_qkv
from timing import extra_mb, host_ms, median_ms
from truth import exact_rows

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "workshop" / "results"
COLUMNS = ["gpu", "date", "torch", "triton", "shape", "method", "precision", "density", "ms", "dense_ms", "speedup"]
COLUMNS += ["rel_l1", "extra_mb", "setting", "host_ms"]
STAGE_COLUMNS = ["gpu", "date", "torch", "triton", "shape", "precision", "order", "means", "pyramid", "move_q"]
STAGE_COLUMNS += ["importance", "levels", "attend", "preparation_share"]
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072, 262144)


def main() -> int:
    """Measure what the command line asks for and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=methods.SHAPES, help="shape to measure; may be repeated")
    parser.add_argument("--runs", type=int, help="timed runs per method (default: 10 on a GPU, 5 on a CPU)")
    parser.add_argument("--full", action="store_true", help="add the settings for the curves of error against time")
    parser.add_argument("--only", help="methods whose name or setting matches: 'sol-attn', '*tail*'; always dense")
    parser.add_argument("--lengths", action="store_true", help="only cost against length, 4k to 260k tokens, 4 heads")
    parser.add_argument("--crossover", action="store_true", help="only print from how many tokens on PSA is faster")
    parser.add_argument("--plot", action="store_true", help="only draw the plots, from existing results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--compile-part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    runpy.run_path(str(ROOT / "workshop" / "pack.py"))["load_pack"]()
    if arguments.plot:
        from plot import draw

        return draw(arguments.out)
    cuda = torch.cuda.is_available()
    runs = arguments.runs or (10 if cuda else 5)
    shapes = {name: methods.SHAPES[name] for name in arguments.shape or _all_shapes(cuda)}
    if arguments.lengths:
        lengths = LENGTHS if cuda else LENGTHS[:2]
        shapes = {f"length-{n}": (4, (n // 1024, 32, 32), 128) for n in lengths}
    if arguments.crossover:
        shapes = {f"heads of {dim}": (1, crossover.GRIDS[0], dim) for dim in (64, 128)}
    if arguments.compile_part:
        compile_ahead.compile_part(
            {dim: _chosen(dim, arguments) for _, _, dim in shapes.values()}, arguments.compile_part
        )
        return 0
    if cuda:
        compile_ahead.compile_all(sys.argv[1:])
    if arguments.crossover:
        crossover.print_crossover(_machine(cuda), runs)
        return 0
    for name, shape in shapes.items():
        rows, stages = _measure(name, shape, runs, _chosen(shape[2], arguments), not arguments.lengths)
        _write(arguments.out / f"attention-{'gpu' if cuda else 'cpu'}.csv", COLUMNS, rows)
        if stages:
            _write(arguments.out / "stages-gpu.csv", STAGE_COLUMNS, stages)
    return 0


def _all_shapes(cuda: bool) -> list[str]:
    return [name for name in methods.SHAPES if name == "demo" or (name == "synthetic") != cuda]


def _chosen(dim: int, arguments: argparse.Namespace) -> list[methods.Method]:
    """The methods to measure, including the dense ones they are compared with."""
    cuda = torch.cuda.is_available()
    if arguments.crossover:
        return crossover.crossover_methods(dim, cuda)
    every = methods.length_methods(dim, cuda) if arguments.lengths else methods.methods(dim, cuda, arguments.full)
    pattern = arguments.only or "*"
    wanted, seen = [], set()
    for method in every:
        first = method.dtype not in seen
        if first or fnmatch.fnmatch(method.name, pattern) or fnmatch.fnmatch(method.setting, pattern):
            wanted.append(method)
        seen.add(method.dtype)
    return wanted


def _measure(
    name: str, shape: tuple, runs: int, chosen: list[methods.Method], stages: bool
) -> tuple[list[dict], list[dict]]:
    heads, grid, dim = shape
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    q, k, v = demo_qkv(dtype, device) if name == "demo" else smooth_qkv(heads, grid, dim, dtype, device)
    truth = exact_rows(q, k, v)
    common, rows = _machine(cuda) | {"shape": name}, []
    cast, baselines, times = {dtype: (q, k, v)}, {}, {}
    for method in chosen:
        kind = method.dtype or dtype
        dense_ms = baselines.get(kind)
        try:
            if kind not in cast:  # the same numbers in another type, so that the exact result stays valid
                cast = {kind: tuple(x.to(kind) for x in (q, k, v))}
            call, density = method.make(*cast[kind], grid)
            error = None if method.knows_result else truth.error(getattr(call, "restore", lambda x: x)(call()))
            memory, ms, host = extra_mb(call), median_ms(call, runs), host_ms(call, runs)
        except Exception as failure:  # a rival that fails here must not end the run
            if dense_ms is None:
                raise
            reason = " ".join(str(failure).split())[:140]
            print(f"{name:16s} {method.name:15s} skipped: {type(failure).__name__}: {reason}", flush=True)
            continue
        dense_ms = baselines.setdefault(kind, ms)
        row = {"method": method.name, "precision": method.precision, "density": round(density(), 4), "ms": round(ms, 3)}
        row |= {
            "dense_ms": round(dense_ms, 3),
            "speedup": round(dense_ms / ms, 3),
            "rel_l1": "" if error is None else round(error, 5),
        }
        row |= {"extra_mb": "" if memory is None else memory, "setting": method.setting}
        rows.append(common | row | {"host_ms": "" if host is None else round(host, 3)})
        figures = f"{ms:9.2f} ms {dense_ms / ms:6.2f}x  error {'-' if error is None else f'{error:.4f}'}"
        times[method.name, method.setting, method.precision] = ms
        usual = times.get((method.name, method.setting, chosen[0].precision))
        ratio = f"  {method.precision}/{chosen[0].precision} {ms / usual:.3f}" if method.dtype and usual else ""
        print(f"{name:16s} {method.name:15s} {figures}  {method.precision:9s} {method.setting}{ratio}", flush=True)
    return rows, _stages(q, k, v, grid, runs, common) if stages and cuda else []


def _stages(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: tuple, runs: int, common: dict) -> list[dict]:
    """Milliseconds of every stage of the Triton backend, in its own order, for the setting behind `auto` at 0.85."""
    from comfyui_psa.choices.presets import RANKING
    from comfyui_psa.kernels import PyramidConfig, make_order
    from comfyui_psa.kernels.gpu.attend import attend_triton
    from comfyui_psa.kernels.gpu.autotune import Case, choose_tile
    from comfyui_psa.kernels.gpu.backend import FINDS_QUERIES, means
    from comfyui_psa.kernels.gpu.importance import reduced_softmax_triton
    from comfyui_psa.kernels.gpu.levels import choose_lists_triton
    from comfyui_psa.kernels.gpu.order import apply_order_triton, undo_order_triton
    from comfyui_psa.kernels.gpu.pyramid import build_pyramid_triton
    from comfyui_psa.kernels.importance import group_size, key_groups

    rows, scale, length = [], q.shape[-1] ** -0.5, q.shape[2]
    for order_name in ("raster", "curve"):
        for precision in ("bf16", "int8"):
            config = PyramidConfig(
                shares=methods.PUBLISHED, mode="topk", sparsity=0.85, order=order_name, precision=precision, tail=False,
                **RANKING,
            )  # fmt: skip
            order, out = make_order(order_name, grid, device=q.device), torch.empty_like(q)

            def pool(c=config, o=order):
                queries = means(q, c.block_q, (group_size(c.ranking, c.block_q),), o)
                return queries + means(k, c.block_kv, key_groups(c.ranking), o)

            pooled = pool()
            inside = order.index is None or q.shape[-1] <= FINDS_QUERIES
            queries = q if inside else apply_order_triton(q, order)

            def rank(p=pooled, c=config):
                return reduced_softmax_triton(p[0], p[1], scale, c.reduction, p[-1])

            scores = rank()
            lists = choose_lists_triton(scores, config, None, length)

            def build(c=config, o=order):
                return build_pyramid_triton(k, v, c.stored_factors, c.block_kv, o, int8=c.precision == "int8")

            def attend(pyramid=build(), x=queries, li=lists, c=config, y=out, o=order if inside else None):  # noqa: B008
                tile = choose_tile(x.device, Case.of(x, c))
                attend_triton(x, pyramid, li, c.block_q, scale, None, None, y, order=o, tile=tile)

            def move(o=order, y=out, needed=not inside):
                if needed:
                    undo_order_triton(apply_order_triton(q, o), o, y)

            calls = {
                "means": pool,
                "pyramid": build,
                "move_q": move,
                "importance": rank,
                "levels": lambda s=scores, c=config: choose_lists_triton(s, c, None, length),
                "attend": attend,
            }
            times = {stage: round(median_ms(call, runs), 3) for stage, call in calls.items()}
            share = round(1 - times["attend"] / sum(times.values()), 3)
            rows.append(common | {"precision": precision, "order": order_name} | times | {"preparation_share": share})
            print(f"{common['shape']:16s} stages             {order_name} {precision} {times} preparation {share:.0%}")
    return rows


def _machine(cuda: bool) -> dict[str, object]:
    triton = importlib.util.find_spec("triton") and __import__("triton").__version__
    gpu = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    return {"gpu": gpu, "date": datetime.date.today().isoformat(), "torch": torch.__version__, "triton": triton}


def _write(path: Path, columns: list[str], rows: list[dict]) -> None:
    """Write the rows to the file, replacing those of the same shapes."""
    from comfyui_psa.workshop.table import read_rows, write_rows

    measured = {row["shape"] for row in rows}
    kept = [row for row in read_rows(path) if row["shape"] not in measured] if path.exists() else []
    write_rows(path, columns, kept + rows)
    print(f"written to {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
