"""Seconds per step of Wan 1.3B and 14B at 1280x720x69 on one GPU and on all of them, dense and with PSA.

diffusers' own pipeline and context parallel (Ulysses) with random weights of real size, in bfloat16, without guidance.
On one GPU every process computes the same; then all compute together. The rows are written as they are measured.

    torchrun --nproc-per-node 2 workshop/benchmarks/several_gpus.py --csv several-gpus.csv

A run is one dense step and then sparse ones, so the correction is measured and given back as by default. `exchange` is
the share of a step in which a GPU exchanges queries, keys, values and outputs, or waits for the others to do so.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import itertools
import os
import runpy
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
MODELS = {
    "wan14b": {"heads": 40, "layers": 40, "hidden": 13824},
    "wan1.3b": {"heads": 12, "layers": 30, "hidden": 8960},
}
TEXT, TEXT_WIDTH, DIM = 512, 4096, 128


def main() -> None:
    """Measure every model: alone and together, dense and with PSA."""
    began = time.perf_counter()
    arguments = _arguments()
    rank = int(os.environ["RANK"])
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    runpy.run_path(str(ROOT / "workshop" / "pack.py"))["load_pack"]()
    try:
        for model in arguments.models:
            for row in _rows(model, arguments, device, lambda: time.perf_counter() - began < arguments.seconds):
                if rank == 0:
                    _write(arguments.csv, row)
    finally:
        dist.destroy_process_group()


def _rows(name: str, arguments: argparse.Namespace, device: torch.device, on_time: Any) -> Iterator[dict[str, Any]]:
    """The rows of one model. on_time: whether there is time for another measurement; rank 0 decides for all."""
    from diffusers import ContextParallelConfig, FlowMatchEulerDiscreteScheduler, WanPipeline

    size = MODELS[name] | {key: value for key in ("heads", "layers") if (value := getattr(arguments, key))}
    transformer = _random_transformer(device, **size)
    parts = {"tokenizer": None, "text_encoder": None, "vae": None}
    pipe = WanPipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0), **parts)
    pipe.set_progress_bar_config(disable=True)
    ranks, alone = dist.get_world_size(), {}
    for count in dict.fromkeys((1, ranks)):
        if count > 1:
            with _at_least_one_device():
                transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=count))
        for method in ("dense", "psa"):
            if not _agreed(on_time(), device):
                print(f"no time is left for {name}, {method}, {count} ranks", flush=True)
                continue
            found = _measure(pipe, method, arguments, device)
            alone.setdefault(method, found)
            yield _row(name, size, method, count, found, alone[method], arguments, device)
    del pipe, transformer
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _measure(pipe: Any, method: str, arguments: argparse.Namespace, device: torch.device) -> SimpleNamespace:
    """One run of the pipeline: median seconds of its steps without the first ones, and what else is in a row."""
    from comfyui_psa.for_diffusers import apply_psa

    applied = None
    if method == "psa":
        applied = apply_psa(pipe, arguments.sparsity, warm_up=1, min_tokens=arguments.min_tokens)
    _synchronise(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    dist.barrier()
    ends, exchanged = [time.perf_counter()], []
    with _timed_exchange(device) as exchange:

        def end_of_step(_: Any, __: int, ___: Any, given: dict[str, Any]) -> dict[str, Any]:
            _synchronise(device)
            ends.append(time.perf_counter())
            exchanged.append(exchange())
            return given

        latents = _run(pipe, arguments, device, end_of_step, steps=arguments.steps if applied else 3)
    # The first step sets up the libraries, and the first sparse one compiles the kernels.
    skipped = 2 if applied else 1
    seconds = [end - begin for begin, end in itertools.pairwise(ends)][skipped:]
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    found = SimpleNamespace(
        seconds=_largest(statistics.median(seconds), device),
        exchange=_largest(statistics.median(exchanged[skipped:]), device),
        memory=_largest(memory, device),
        latents=latents,
        sparsity=None if applied is None else applied.mean_sparsity(),
        correction=None if applied is None else (applied.reports()[0] or {}).get("correction"),
    )
    if applied is not None:
        for reason, calls in applied.fallbacks.items():
            print(f"{calls} calls stayed dense: {reason}", flush=True)
        applied.remove()
    return found


def _run(pipe: Any, arguments: argparse.Namespace, device: torch.device, end_of_step: Any, steps: int) -> torch.Tensor:
    frames, height, width = arguments.latent
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn((1, 16, frames, height, width), generator=generator).to(device)
    text = torch.randn((1, TEXT, TEXT_WIDTH), generator=generator).to(device, torch.bfloat16)
    with torch.no_grad():
        return pipe(
            prompt_embeds=text,
            latents=latents,
            num_inference_steps=steps,
            guidance_scale=1.0,
            height=8 * height,
            width=8 * width,
            num_frames=4 * frames - 3,
            output_type="latent",
            callback_on_step_end=end_of_step,
        ).frames.cpu()


def _row(
    name: str,
    size: dict[str, int],
    method: str,
    ranks: int,
    found: SimpleNamespace,
    alone: SimpleNamespace,
    arguments: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    frames, height, width = arguments.latent
    tokens = frames * (height // 2) * (width // 2)
    # A rank sends its share of q, k, v and of the output to every other one.
    sent = 4 * size["layers"] * tokens * size["heads"] * DIM * 2 * (ranks - 1) / ranks**2
    difference = float((found.latents - alone.latents).norm() / alone.latents.norm())
    correction = found.correction or {}
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "model": name,
        "layers": size["layers"],
        "tokens": tokens,
        "method": method,
        "ranks": ranks,
        "seconds": f"{found.seconds:.3f}",
        "efficiency": f"{alone.seconds / ranks / found.seconds:.3f}",
        "exchange": f"{found.exchange / found.seconds:.4f}",
        "sent_gb": f"{sent / 1e9:.4g}",
        "peak_gb": f"{found.memory:.1f}",
        "sparsity": "" if found.sparsity is None else f"{found.sparsity:.3f}",
        "correction": correction.get("size") or "",
        "difference": f"{difference:.2g}",
    }


def _random_transformer(device: torch.device, heads: int, layers: int, hidden: int) -> Any:
    """The same on every rank."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = WanTransformer3DModel(
                num_attention_heads=heads, attention_head_dim=DIM, num_layers=layers, ffn_dim=hidden
            )
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


@contextmanager
def _timed_exchange(device: torch.device) -> Iterator[Any]:
    """Times the exchanges of diffusers; the function that it gives returns the seconds since it was last called."""
    from diffusers.models import attention_dispatch

    genuine, spans = attention_dispatch._all_to_all_single, []

    def timed(*args: Any) -> torch.Tensor:
        begin = _now(device)
        output = genuine(*args)
        spans.append((begin, _now(device)))
        return output

    def seconds() -> float:
        total = sum(begin.elapsed_time(end) / 1e3 if device.type == "cuda" else end - begin for begin, end in spans)
        spans.clear()
        return total

    with mock.patch.object(attention_dispatch, "_all_to_all_single", timed):
        yield seconds


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _at_least_one_device() -> Any:
    """diffusers divides by the number of GPUs, of which a CPU has none."""
    return mock.patch("torch.accelerator.device_count", return_value=max(1, torch.accelerator.device_count()))


def _agreed(yes: bool, device: torch.device) -> bool:
    answer = torch.tensor([float(yes)], device=device)
    dist.broadcast(answer, 0)
    return bool(answer)


def _largest(value: float, device: torch.device) -> float:
    """The largest value of any rank."""
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _write(path: Path, row: dict[str, Any]) -> None:
    """Add a row to the table, and print it."""
    print("  ".join(f"{key} {value}" for key, value in row.items() if value != ""), flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layers", type=int, help="a few instead of all")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--latent", type=int, nargs=3, default=[18, 90, 160], help="frames, rows, columns")
    parser.add_argument("--sparsity", type=float, default=0.85)
    parser.add_argument("--min_tokens", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5, help="of a run with PSA; the first is dense")
    parser.add_argument("--seconds", type=float, default=200, help="after these, nothing more is begun")
    parser.add_argument("--csv", type=Path, default=Path("several-gpus.csv"), help="the rows are added to this file")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    return parser.parse_args()


if __name__ == "__main__":
    main()
