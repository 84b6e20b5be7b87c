"""Time per step of a full-size model, dense and with PSA, in one process: CogVideoX-5B at 720x480x49, and Wan2.1-1.3B
and 14B at 1280x720x69, in bfloat16 and in float16.

Runs ComfyUI's own model code and sampling with random weights, the same in both types. Needs COMFYUI_PATH set to a
ComfyUI folder, ComfyUI's packages, and a GPU with 40 GB or more (without one: `--layers 1 --heads 2 --latent 4 24 32
--device cpu`).
If diffusers is installed, CogVideoX gets PSA's corrections and its sampler; otherwise ComfyUI's euler, which makes the
same model calls. Since the weights are random, the results say nothing about quality.

The first step is told apart from the others: in a corrected run it is dense and learns what PSA loses. With
`--correction host` nothing of that is held on the GPU.

    COMFYUI_PATH=... python workshop/benchmarks/model_step.py cogvideox-5b --sparsity 0.85 0.9

With `--gpus 1 2` every method is timed on one GPU, and then on two as ComfyUI's MultiGPU CFG Split uses them: each GPU
computes one of the two prompts of a step. On a CPU, the CPU under another name plays the second GPU.

    COMFYUI_PATH=... python workshop/benchmarks/model_step.py wan1.3b --gpus 1 2 --guidance 5 --sparsity 0.85 \\
        --dtype bfloat16 --steps 3 --runs 1 --csv two-prompts-gpu.csv
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import importlib.util
import itertools
import runpy
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from comfy_steps import import_comfyui, step_seconds

ROOT = Path(__file__).resolve().parents[2]
TEXT_WIDTH = 4096
MODELS = {
    "cogvideox-5b": {"layers": 42, "heads": 48, "latent": [13, 60, 90], "text": 226, "preset": "cogvideox-5b-4step"},
    "wan1.3b": {"layers": 30, "heads": 12, "latent": [18, 90, 160], "text": 512, "preset": "auto", "hidden": 8960},
    "wan14b": {"layers": 40, "heads": 40, "latent": [18, 90, 160], "text": 512, "preset": "auto", "hidden": 13824},
}


def main() -> int:
    """Build the model, time every method and print one line each."""
    arguments = _arguments()
    import_comfyui(arguments.device)
    runpy.run_path(str(ROOT / "workshop" / "pack.py"))["load_pack"]()
    print(
        f"{_where(arguments)}, torch {torch.__version__}: {arguments.layers} layers, {arguments.heads} heads, "
        f"{_tokens(arguments)} video tokens, {_prompts(arguments)} prompts a step"
    )
    print(
        f"{'method':32} {'type':>9} {'GPUs':>4} {'s/step':>8} {'best':>8} {'first':>8} {'x dense':>8} {'sparsity':>9} "
        f"{'GB':>6}"
    )
    for dtype in arguments.dtype:
        _measure(arguments, dtype)
    return 0


def _measure(arguments: argparse.Namespace, dtype: str) -> None:
    """Time every method on the model in one type. A separate function, so that its weights are freed afterwards."""
    kind = getattr(torch, dtype)
    model = _random_model(arguments, kind)
    if arguments.model == "cogvideox-5b":
        model = _corrected(model)
    dense = float("nan")
    for gpus in arguments.gpus:
        for name, patched in _methods(_on_gpus(model, gpus, arguments, kind), arguments):
            if name == "dense" and arguments.no_dense:
                continue
            types, threads = _watched_step(patched, arguments)  # also compiles and warms up
            if types != {kind}:
                raise RuntimeError(f"{name}: attention received queries in {types} instead of {dtype}")
            if threads != gpus:
                raise RuntimeError(f"{name}: {threads} of {gpus} GPUs computed a part of the step")
            for index in _cuda_devices(arguments):
                torch.cuda.reset_peak_memory_stats(index)
            runs = [_sample(patched, arguments, arguments.steps) for _ in range(arguments.runs)]
            seconds = [second for run in runs for second in run[1:] or run]
            peaks = [torch.cuda.max_memory_allocated(index) / 1e9 for index in _cuda_devices(arguments)]
            sparsity, fallbacks = _report(patched)
            row = {
                "dtype": dtype,
                "gpus": gpus,
                "method": name,
                "sparsity": sparsity,
                "seconds_per_step": statistics.median(seconds),
                "best": min(seconds),
                "first_step": statistics.median(run[0] for run in runs),
                "peak_gb": max(peaks, default=0.0),
            }
            if name == "dense" and gpus == arguments.gpus[0]:
                dense = row["seconds_per_step"]
            _tell(arguments, row | {"speedup": dense / row["seconds_per_step"]}, fallbacks)


def _tell(arguments: argparse.Namespace, row: dict[str, Any], fallbacks: list[str]) -> None:
    """Print a row, and add it to the table if there is one."""
    from comfyui_psa.workshop.table import write_rows

    sparsity = "-" if row["sparsity"] is None else f"{row['sparsity']:.3f}"
    times = " ".join(f"{row[name]:8.3f}" for name in ("seconds_per_step", "best", "first_step"))
    figures = f"{times} {row['speedup']:8.2f} {sparsity:>9} {row['peak_gb']:6.1f}"
    line = f"{row['method']:32} {row['dtype']:>9} {row['gpus']:4} {figures}"
    print(line, *fallbacks, sep="\n    stayed dense: ", flush=True)
    if arguments.csv is not None:
        row = {
            "gpu": _where(arguments),
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "model": arguments.model,
            "layers": arguments.layers,
            "video_tokens": _tokens(arguments),
            "prompts": _prompts(arguments),
        } | row
        write_rows(arguments.csv, list(row), [row], append=arguments.csv.exists())


def _where(arguments: argparse.Namespace) -> str:
    return torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"


def _tokens(arguments: argparse.Namespace) -> int:
    frames, height, width = arguments.latent
    return frames * (height // 2) * (width // 2)


def _prompts(arguments: argparse.Namespace) -> int:
    return 2 if arguments.guidance > 1 else 1


def _cuda_devices(arguments: argparse.Namespace) -> range:
    return range(max(arguments.gpus) if arguments.device == "cuda" else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--latent", type=int, nargs=3, help="frames, rows, columns")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--guidance", type=float, default=1.0, help="above 1, every step batches two model calls")
    parser.add_argument("--preset")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.85, 0.9])
    types = ["bfloat16", "float16"]
    parser.add_argument("--dtype", choices=types, nargs="+", default=types, help="the model's type; default: both")
    parser.add_argument("--no-dense", action="store_true", help="only the sparse methods, without their gain")
    corrections = ["auto", "full", "half", "quarter", "eighth", "off", "host"]
    parser.add_argument("--correction", choices=corrections, nargs="+", default=["auto"])
    parser.add_argument("--gpus", type=int, nargs="+", choices=[1, 2], default=[1], help="2: one for each prompt")
    parser.add_argument("--csv", type=Path, help="a table to add the rows to")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    arguments = parser.parse_args()
    if max(arguments.gpus) > _prompts(arguments):
        parser.error("--gpus: two GPUs need two prompts a step; pass --guidance, above 1")
    for name, value in MODELS[arguments.model].items():
        if getattr(arguments, name, None) is None:
            setattr(arguments, name, value)
    return arguments


def _random_model(arguments: argparse.Namespace, dtype: torch.dtype) -> Any:
    """A ComfyUI MODEL with the real layer sizes and random weights, loaded in a 16-bit type and computing in it."""
    import comfy.model_management
    import comfy.ops
    import comfy.sd

    comfy.model_management.unload_all_models()  # two models, one per type, may not fit
    gc.collect()
    common = {"operations": comfy.ops.disable_weight_init, "dtype": torch.bfloat16, "device": "meta"}
    if arguments.model == "cogvideox-5b":
        import comfy.ldm.cogvideo.model

        blank = comfy.ldm.cogvideo.model.CogVideoXTransformer3DModel(
            num_attention_heads=arguments.heads,
            num_layers=arguments.layers,
            text_embed_dim=TEXT_WIDTH,
            use_rotary_positional_embeddings=True,
            **common,
        )
    else:
        import comfy.ldm.wan.model

        blank = comfy.ldm.wan.model.WanModel(
            dim=128 * arguments.heads,
            ffn_dim=arguments.hidden,
            num_heads=arguments.heads,
            num_layers=arguments.layers,
            **common,
        )
    generator = torch.Generator(arguments.device).manual_seed(0)
    state = {}
    for name, parameter in blank.state_dict().items():
        value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=arguments.device)
        if parameter.ndim == 1:
            value.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            value.normal_(std=0.02, generator=generator)
        state[name] = value.to(dtype)
    model = comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": dtype})
    if model.model.get_dtype_inference() != dtype:  # on a CPU, ComfyUI prefers to compute in another type
        model.set_model_compute_dtype(dtype)
    del state, value
    gc.collect()
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return model


def _corrected(model: Any) -> Any:
    if importlib.util.find_spec("diffusers") is None:
        print("diffusers is not installed: using ComfyUI's positions and euler sampler")
        return model
    from comfyui_psa.cogvideox.corrections import correct_model

    return correct_model(model)


def _methods(model: Any, arguments: argparse.Namespace):
    from comfyui_psa.patching import override
    from comfyui_psa.patching.patch import patch_model

    yield "dense", model
    usual = override.COMFYUI
    without_room = dataclasses.replace(usual, memory=dataclasses.replace(usual.memory, free=lambda device: 0))
    settings = {"preset": arguments.preset, "start_percent": 0.0, "end_percent": 1.0, "min_tokens": 0}
    for sparsity, correction in itertools.product(arguments.sparsity, arguments.correction):
        override.COMFYUI = without_room if correction == "host" else usual
        size = "full" if correction == "host" else correction
        patched = patch_model(model, sparsity=sparsity, correction=size, **settings)
        yield f"{arguments.preset} {sparsity}, {correction}", patched


def _on_gpus(model: Any, gpus: int, arguments: argparse.Namespace, dtype: torch.dtype) -> Any:
    """A MODEL as MultiGPU CFG Split makes it, with a copy of the weights on every further GPU."""
    if gpus == 1:
        return model
    import comfy.multigpu

    split = model.clone()
    split.cached_patcher_init = (lambda **_: _random_model(arguments, dtype), ())
    if arguments.device == "cuda":
        return comfy.multigpu.create_multigpu_deepclones(split, gpus)
    devices = [torch.device("cpu"), torch.device("cpu", 0)]
    with mock.patch("comfy.model_management.get_all_torch_devices", return_value=devices):
        return comfy.multigpu.create_multigpu_deepclones(split, gpus)


def _watched_step(model: Any, arguments: argparse.Namespace) -> tuple[set[torch.dtype], int]:
    """The types of the queries that reach a MODEL's attention override in one step, and how many threads bring them;
    ComfyUI has one for each GPU."""
    from comfyui_psa.patching import core

    watched, override, found, threads = model.clone(), core.get_override(model), set(), set()

    def watch(attention: Any, q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        found.add(q.dtype)
        threads.add((q.device, threading.get_ident()))
        return override(attention, q, *args, **kwargs) if override else attention(q, *args, **kwargs)

    core.set_override(watched, watch)
    _sample(watched, arguments, steps=1)
    return found, len(threads)


def _sample(model: Any, arguments: argparse.Namespace, steps: int) -> list[float]:
    """Sample and return the seconds of every step, the first counted from the first model call."""
    import comfy.sample
    import comfy.samplers

    noise = torch.randn((1, 16, *arguments.latent), generator=torch.Generator().manual_seed(1))
    text = torch.randn((1, arguments.text, TEXT_WIDTH), generator=torch.Generator().manual_seed(2))
    conds = [[[text, {}]], [[text, {}]]]
    if arguments.model != "cogvideox-5b" or importlib.util.find_spec("diffusers") is None:
        sampler = comfy.samplers.sampler_object("euler")
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    else:
        from comfyui_psa.cogvideox.sampler import make_sampler
        from comfyui_psa.cogvideox.schedule import trailing_sigmas

        sampler, sigmas = make_sampler("dpm"), trailing_sigmas(model, steps, 1.0)

    def sample(timed: Any, callback: Callable[..., None]) -> None:
        comfy.sample.sample_custom(
            timed, noise, arguments.guidance, sampler, sigmas, *conds, torch.zeros_like(noise), seed=1,
            disable_pbar=True, callback=callback,
        )  # fmt: skip

    return step_seconds(model, sample, lambda: _now(arguments))


def _now(arguments: argparse.Namespace) -> float:
    for index in _cuda_devices(arguments):
        torch.cuda.synchronize(index)
    return time.perf_counter()


def _report(model: Any) -> tuple[float | None, list[str]]:
    handle = model.get_attachment("psa")
    report = handle.report if handle is not None else None
    if not report:
        return 0.0, []
    return report["mean_sparsity"], [entry["reason"] for entry in report["fallbacks"]]


if __name__ == "__main__":
    sys.exit(main())
