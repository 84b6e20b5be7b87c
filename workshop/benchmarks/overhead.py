"""How much time per step recording and the page's live curve cost: a model's attention calls with and without a `Run`.

    python workshop/benchmarks/overhead.py            Wan 1.3B at 720p on a GPU, the demo's shape on a CPU

Prints the milliseconds of one step: the attention calls alone, recorded, recorded with a live curve, and for the last
sparse step, which also saves the maps. Needs torch and triton, but no ComfyUI.
"""

from __future__ import annotations

import runpy
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
STEPS, REPEATS = 20, 5


def main() -> None:
    """Measure and print."""
    runpy.run_path(str(ROOT / "workshop" / "pack.py"))["load_pack"]()
    from comfyui_psa.choices.settings import make_settings
    from comfyui_psa.kernels.attention import pyramid_sparse_attention
    from comfyui_psa.kernels.order import TokenLayout
    from comfyui_psa.sampling.run import Run

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    grid, heads, layers = ((18, 45, 80), 12, 30) if gpu else ((9, 32, 32), 2, 6)
    torch.manual_seed(0)
    q, k, v = (smooth(grid, heads, 128, device) for _ in range(3))
    settings = make_settings(preset="module-default", start_percent=0.0, min_tokens=0)
    layout, schedule, messages = TokenLayout(grid), torch.linspace(1, 0, STEPS + 1), []

    def run_of(live: bool) -> Run:
        run = Run(settings, 2.0, 0.0, pictured_block=layers // 2, on_step=messages.append if live else None)
        run.plan(schedule.tolist(), device)
        return run

    def attend(run: Run):
        order = run.order(device)
        return pyramid_sparse_attention(q, k, v, settings.config, layout=layout, order=order)

    def step(run: Run, index: int) -> None:
        run.begin_model_call(1 - index / STEPS, layout, ())
        for block in range(layers):
            run.begin_self_attention(block)
            run.sparse_call(attend(run))

    def seconds(work) -> float:
        if gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    step(run_of(True), 0)  # compiles
    rows = []
    for _ in range(REPEATS):
        plain, recorded, live, last = run_of(False), run_of(False), run_of(True), run_of(True)
        step(recorded, 0)
        step(live, 0)
        step(last, STEPS - 2)
        rows.append(
            [
                seconds(lambda run=plain: [attend(run) for _ in range(layers)]),
                seconds(lambda run=recorded: step(run, 1)),
                seconds(lambda run=live: step(run, 1)),
                seconds(lambda run=last: step(run, STEPS - 1)),
            ]
        )
    best = [min(column) * 1000 for column in zip(*rows, strict=True)]
    print(torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads")
    for name, ms in zip(("attention alone", "recorded", "with a live curve", "with the maps"), best, strict=True):
        print(f"{name:18s} {ms:8.2f} ms  {100 * (ms / best[0] - 1):+.2f} %")


def smooth(grid: tuple[int, int, int], heads: int, dim: int, device: torch.device) -> torch.Tensor:
    """Tokens [1, heads, T*H*W, dim] that vary slowly over the video, so that the levels resemble a real video's."""
    coarse = torch.randn(heads * dim, 1, 6, 8, 10, device=device)
    fine = torch.nn.functional.interpolate(coarse, grid, mode="trilinear").view(heads, dim, -1).transpose(1, 2)[None]
    return (3 * fine).to(torch.bfloat16 if device.type == "cuda" else torch.float32).contiguous()


if __name__ == "__main__":
    main()
