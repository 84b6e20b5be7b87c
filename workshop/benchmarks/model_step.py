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
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import itertools
import os
import runpy
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

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
    _import_comfyui(arguments.device)
    runpy.run_path(str(ROOT / "workshop" / "pack.py"))["load_pack"]()
    frames, height, width = arguments.latent
    tokens = frames * (height // 2) * (width // 2)
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    print(
        f"{where}, torch {torch.__version__}: {arguments.layers} layers, {arguments.heads} heads, {tokens} video tokens"
    )
    print(f"{'method':32} {'type':>9} {'s/step':>8} {'best':>8} {'first':>8} {'x dense':>8} {'sparsity':>9} {'GB':>6}")
    for dtype in arguments.dtype:
        _measure(arguments, dtype)
    return 0


def _measure(arguments: argparse.Namespace, dtype: str) -> None:
    """Time every method on the model in one type. A separate function, so that its weights are freed afterwards."""
    model = _random_model(arguments, getattr(torch, dtype))
    if arguments.model == "cogvideox-5b":
        model = _corrected(model)
    dense = None
    for name, patched in _methods(model, arguments):
        if name == "dense" and arguments.no_dense:
            continue
        types = _query_types(patched, arguments)  # also compiles and warms up
        if types != {getattr(torch, dtype)}:
            raise RuntimeError(f"{name}: attention received queries in {types} instead of {dtype}")
        if arguments.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        runs = [_sample(patched, arguments, arguments.steps) for _ in range(arguments.runs)]
        first, seconds = (
            statistics.median(run[0] for run in runs),
            [second for run in runs for second in run[1:] or run],
        )
        median = statistics.median(seconds)
        dense = dense or (median if name == "dense" else float("nan"))
        memory = torch.cuda.max_memory_allocated() / 1e9 if arguments.device == "cuda" else 0.0
        sparsity, fallbacks = _report(patched)
        figures = f"{median:8.3f} {min(seconds):8.3f} {first:8.3f} {dense / median:8.2f} {sparsity:>9} {memory:6.1f}"
        print(
            f"{name:32} {dtype:>9} {figures}", *fallbacks, sep="\n    stayed dense: " if fallbacks else "", flush=True
        )


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
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    arguments = parser.parse_args()
    for name, value in MODELS[arguments.model].items():
        if getattr(arguments, name, None) is None:
            setattr(arguments, name, value)
    return arguments


def _import_comfyui(device: str) -> None:
    folder = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".dev" / "ComfyUI")
    if not (folder / "comfy").is_dir():
        sys.exit(f"There is no ComfyUI in {folder}; set COMFYUI_PATH")
    # ComfyUI has a top-level module `nodes`, which this pack's must not shadow.
    sys.path[:] = [str(folder), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import comfy.cli_args

    comfy.cli_args.args.cpu = device == "cpu"
    comfy.cli_args.args.use_pytorch_cross_attention = True
    comfy.cli_args.args.gpu_only = device == "cuda"


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


def _query_types(model: Any, arguments: argparse.Namespace) -> set[torch.dtype]:
    """The types of the queries that reach a MODEL's attention override in one step."""
    from comfyui_psa.patching import core

    watched, override, found = model.clone(), core.get_override(model), set()

    def watch(attention: Any, q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        found.add(q.dtype)
        return override(attention, q, *args, **kwargs) if override else attention(q, *args, **kwargs)

    core.set_override(watched, watch)
    _sample(watched, arguments, steps=1)
    return found


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
    times: list[float] = []

    def first_call(executor: Any, *args: Any, **kwargs: Any) -> Any:
        if not times:
            times.append(_now(arguments.device))
        return executor(*args, **kwargs)

    import comfy.patcher_extension

    timed = model.clone()
    timed.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "benchmark", first_call)
    comfy.sample.sample_custom(
        timed, noise, arguments.guidance, sampler, sigmas, *conds, torch.zeros_like(noise), seed=1, disable_pbar=True,
        callback=lambda *_: times.append(_now(arguments.device)),
    )  # fmt: skip
    return [end - begin for begin, end in itertools.pairwise(times)]


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _report(model: Any) -> tuple[str, list[str]]:
    handle = model.get_attachment("psa")
    report = handle.report if handle is not None else None
    if not report:
        return "0", []
    mean = report["mean_sparsity"]
    return ("-" if mean is None else f"{mean:.3f}"), [entry["reason"] for entry in report["fallbacks"]]


if __name__ == "__main__":
    sys.exit(main())
